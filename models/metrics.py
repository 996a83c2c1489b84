"""Measurements of the evaluation: curvature, distances in z-space, Fréchet distance."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nfm.models.solvers import Trajectory

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance


def curvature(trajectory: Trajectory) -> Tensor:
    """κ = E_i[‖x_1 - x_m - v^(i)‖²] / n per sample, shape (B,) (NFM paper section 4.1.1; Lee et al., 2023).

    x_1 is the noise, x_m the sample, and v^(i) the velocity that the network predicted at the start of step i. κ is
    zero for straight paths. Values of different solvers or schedules cannot be compared.
    """
    chord = trajectory.start - trajectory.x  # (B, C, H, W)
    deviations = [(chord - v).square().mean(dim=(1, 2, 3)) for v in trajectory.velocities]  # (B,) for each step
    return torch.stack(deviations).mean(dim=0)


def rms_distance(a: Tensor, b: Tensor) -> Tensor:
    """d(a, b) = ‖a - b‖₂ / √(2n) per pair, shape (B,): 1 on average for independent standard normals (section 3.3)."""
    return ((a - b).flatten(1).square().mean(dim=1) / 2).sqrt()


@dataclass(frozen=True)
class ZSpace:
    """Mean distances of the three kinds of pairs in Table 1 of the NFM paper."""

    different_x_different_noise: float
    same_x_different_noise: float
    different_x_same_noise: float


def z_space_distances(x1_e1: Tensor, x1_e2: Tensor, x2_e1: Tensor, x2_e2: Tensor) -> ZSpace:
    """The distances of Table 1, from representations (B, C, H, W) of images x1 and x2 under noises ε1 and ε2."""
    return ZSpace(
        different_x_different_noise=rms_distance(x1_e1, x2_e2).mean().item(),
        same_x_different_noise=rms_distance(x1_e1, x1_e2).mean().item(),
        different_x_same_noise=rms_distance(x1_e1, x2_e1).mean().item(),
    )


class PixelFeatures(nn.Module):
    """The pixels themselves as features, (B, C·H·W), for images too small for Inception. Such a distance is not FID."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)  # (B, C·H·W)


def frechet_metric(features: nn.Module | int) -> "FrechetInceptionDistance":
    """torchmetrics' Fréchet distance in float64, over the outputs of a module, or over Inception features.

    An int is the Inception feature width: 64, 192, 768 or 2048.

    `update(images, real=…)` takes float images in [-1, 1] for a module, and uint8 images for Inception. Raises
    ModuleNotFoundError for Inception where torch-fidelity is not installed.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes seconds to import; only evaluation needs it

    metric = FrechetInceptionDistance(feature=features, reset_real_features=False, normalize=False)
    metric.set_dtype(torch.float64)
    return metric
