"""Couplings: which noise endpoint ε a student sees for a data point x. Everything else in its training is the same.

A coupling turns the (x, z / σ_f) pairs of a store into the pairs that the flow-matching loss regresses on.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

CouplingName = Literal["nfm", "independent"]
Coupling = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def nfm(x: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
    """ε = z_ε′ = f(x + η·ε′, c) / σ_f, the teacher's (NFM paper section 3.2)."""
    return z


def independent(x: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
    """ε ~ N(0, I), drawn anew each time: plain flow matching (section 2.1.1)."""
    return torch.randn(x.shape, generator=generator).to(x.device)


COUPLINGS: dict[CouplingName, Coupling] = {"nfm": nfm, "independent": independent}
