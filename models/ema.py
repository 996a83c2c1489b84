"""Exponential moving average of a network's parameters."""

import copy

import torch
from torch import nn


class EMA:
    """θ_ema ← β·θ_ema + (1 - β)·θ after each step, with β warmed up as min(decay, (1 + step) / (10 + step))."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        beta = min(self.decay, (1 + step) / (10 + step))
        ours, theirs = self.network.state_dict(), network.state_dict()
        floating = [name for name, value in ours.items() if value.is_floating_point()]
        torch._foreach_lerp_([ours[name] for name in floating], [theirs[name] for name in floating], 1 - beta)
