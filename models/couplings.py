"""Couplings: which noise ε a student is shown with an image x. Everything else in its training is the same.

A coupling is a function of x, z / σ_f (both (B, C, H, W), from the store) and a random generator. It returns ε
(B, C, H, W), the end of the path that starts at x.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

CouplingName = Literal["nfm", "independent"]
Coupling = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def nfm(x: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
    """ε = z_ε′ = f(x + η·ε′, c) / σ_f, the teacher's (NFM paper section 3.2). `z` is already divided by σ_f."""
    return z


def independent(x: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
    """ε ~ N(0, I), a new draw each time: plain flow matching (NFM paper section 2.1.1)."""
    return torch.randn(x.shape, generator=generator).to(x.device)


COUPLINGS: dict[CouplingName, Coupling] = {"nfm": nfm, "independent": independent}
