"""Exponential moving average of a network's parameters."""

import copy

import torch
from torch import nn


class EMA:
    """θ_ema ← β·θ_ema + (1 - β)·θ after each step, where β = min(decay, (1 + step) / (10 + step)).

    `network` is a copy of the network with the averaged parameters, in evaluation mode.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Average in the parameters of `network` after step number `step` (0 is the first)."""
        beta = min(self.decay, (1 + step) / (10 + step))
        averages = self.network.state_dict()
        values = network.state_dict()
        names = [name for name, value in averages.items() if value.is_floating_point()]
        torch._foreach_lerp_([averages[name] for name in names], [values[name] for name in names], 1 - beta)
