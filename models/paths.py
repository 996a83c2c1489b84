"""The linear path between data and noise, and the flow-matching loss on it (NFM paper section 2.1, equation 1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nfm.models.fields import VelocityField


@dataclass(frozen=True)
class PathSample:
    """A point of the path: x_t (B, C, H, W), its time t (B,) in (0, 1), and the velocity target v (B, C, H, W)."""

    x_t: Tensor
    t: Tensor
    v: Tensor


def linear_path(x: Tensor, epsilon: Tensor, t: Tensor) -> PathSample:
    """x_t = (1 - t)·x + t·ε and v = ε - x: t = 0 is data, t = 1 is noise."""
    t_image = t.view(-1, 1, 1, 1)  # (B, 1, 1, 1)
    x_t = (1 - t_image) * x + t_image * epsilon  # (B, C, H, W)
    return PathSample(x_t, t, epsilon - x)


def logit_normal(batch: int, generator: torch.Generator, a: float = -0.2, b: float = 1.0) -> Tensor:
    """t = sigmoid(a + b·N(0, 1)), shape (batch,) (NFM paper section 4; Esser et al., 2024)."""
    return torch.sigmoid(a + b * torch.randn(batch, generator=generator))


def flow_matching_loss(field: VelocityField, path: PathSample, y: Tensor) -> Tensor:
    """Mean squared error of the velocity per dimension, shape (B,): ‖g(x_t, c, t) - v‖² / n (equation 1)."""
    predicted = field(path.x_t, path.t, y).float()  # (B, C, H, W)
    return (predicted - path.v).square().mean(dim=(1, 2, 3))
