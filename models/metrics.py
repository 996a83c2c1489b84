"""What the evaluation measures: curvature, z-space structure, Fréchet distance."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nfm.models.solvers import Trajectory

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance


def curvature(trajectory: Trajectory) -> Tensor:
    """κ = E_i[‖x_1 - x_m - v^(i)‖²] / n per sample, shape (B,) (NFM paper section 4.1.1; Lee et al., 2023).

    x_1 is the noise, x_m the sample, v^(i) the velocity the network predicted at the start of step i. It is zero for
    straight paths, and comparable only within one solver and schedule.
    """
    chord = trajectory.start - trajectory.x
    return torch.stack([(chord - v).square().mean(dim=(1, 2, 3)) for v in trajectory.velocities]).mean(dim=0)


def rms_distance(a: Tensor, b: Tensor) -> Tensor:
    """d(a, b) = ‖a - b‖₂ / √(2n) per pair, shape (B,): 1 on average for independent standard normals (section 3.3)."""
    return ((a - b).flatten(1).square().mean(dim=1) / 2).sqrt()


@dataclass(frozen=True)
class ZSpace:
    """Average distances of the three groups of Table 1, over pairs of representations of shape (B, C, H, W)."""

    different_x_different_noise: float
    same_x_different_noise: float
    different_x_same_noise: float


def z_space(x1_e1: Tensor, x1_e2: Tensor, x2_e1: Tensor, x2_e2: Tensor) -> ZSpace:
    """Distances between representations of images x1, x2 under noises ε1, ε2, all (B, C, H, W)."""
    return ZSpace(
        different_x_different_noise=rms_distance(x1_e1, x2_e2).mean().item(),
        same_x_different_noise=rms_distance(x1_e1, x1_e2).mean().item(),
        different_x_same_noise=rms_distance(x1_e1, x2_e1).mean().item(),
    )


class PixelFeatures(nn.Module):
    """Pixels themselves as features, for images too small for Inception. Never call the result FID."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def frechet_metric(features: nn.Module | int) -> "FrechetInceptionDistance":
    """torchmetrics' Fréchet distance in float64, over our features or (an int) over Inception's of that width.

    `update(images, real=…)` takes float images in [-1, 1] for our features, uint8 images for Inception.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # seconds to import, and only evaluation needs it

    metric = FrechetInceptionDistance(feature=features, reset_real_features=False, normalize=False)
    metric.set_dtype(torch.float64)
    return metric
