"""Velocity fields: what solvers integrate and networks learn, and the wrappers that make one field from another."""

from typing import Protocol

import torch
from torch import Tensor, nn

from nfm.models.labels import NULL_LABEL


class VelocityField(Protocol):
    """v(x_t, t, y): x (B, C, H, W), t (B,) in [0, 1], y (B,) labels with -1 = dropped; returns (B, C, H, W)."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor: ...


class Guided(nn.Module):
    """Classifier-free guidance: v_∅ + w·(v_c - v_∅), where w is `weight`; w = 1 is the conditional field itself.

    With `guided_channels`, only that many first channels are guided, and the others stay conditional. The published SiT
    code guides three of four latent channels, and its numbers can be reproduced only that way.
    """

    def __init__(self, field: VelocityField, weight: float, guided_channels: int | None = None) -> None:
        super().__init__()
        self.field = field
        self.weight = weight
        self.guided_channels = guided_channels

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.weight == 1:
            return self.field(x, t, y)
        null = torch.full_like(y, NULL_LABEL)  # (B,)
        both = self.field(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))  # (2B, C, H, W)
        conditional, unconditional = both.chunk(2)  # (B, C, H, W) each
        guided = unconditional + self.weight * (conditional - unconditional)  # (B, C, H, W)
        if self.guided_channels is None:
            return guided
        return torch.cat([guided[:, : self.guided_channels], conditional[:, self.guided_channels :]], dim=1)
