"""ODE solvers from noise (t = 1) to data (t = 0): dx/dt = v(x, t, y) (NFM paper equation 2).

Every solver is a plain function `solver(field, x, y, times)`: x (B, C, H, W) at times[0], y (B,) labels, `times`
falling from 1 to 0 with one more entry than there are steps. NFE is counted as the paper does.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from nfm.models.fields import VelocityField

MAX_NFE = 10_000  # of a sampler; a trajectory keeps the velocity of every step
SolverName = Literal["euler", "heun"]
ScheduleName = Literal["t", "t2"]


@dataclass(frozen=True)
class Trajectory:
    """What a solver returns: `x` at the last time, `start` at the first time, and for each step the velocity that the
    field predicted at its start, from which the curvature is computed; none if they were not to be kept. All are
    (B, C, H, W)."""

    x: Tensor
    start: Tensor
    velocities: tuple[Tensor, ...]
    nfe: int


class Solver(Protocol):
    """A function from noise to data, as described above. Without `keep_velocities` it takes less memory."""

    def __call__(
        self, field: VelocityField, x: Tensor, y: Tensor, times: Sequence[float], keep_velocities: bool = True
    ) -> Trajectory: ...


def schedule(name: ScheduleName, steps: int) -> list[float]:
    """`steps` + 1 times from 1 to 0 (NFM paper section 4). `t`: 1, 1 - δt, …, δt, 0 with δt = 1/steps; `t2`: their
    squares."""
    power = {"t": 1, "t2": 2}[name]
    return [(1 - i / steps) ** power for i in range(steps)] + [0.0]


def time_batch(x: Tensor, t: float) -> Tensor:
    """The time t for every row of x (B, C, H, W): shape (B,)."""
    return torch.full((len(x),), t, device=x.device)


def euler(
    field: VelocityField, x: Tensor, y: Tensor, times: Sequence[float], keep_velocities: bool = True
) -> Trajectory:
    """x ← x - Δt·v(x, t) (Euler, 1768). NFE = steps."""
    start = x
    velocities = []
    for t, t_next in pairwise(times):
        v = field(x, time_batch(x, t), y)
        if keep_velocities:
            velocities.append(v)
        x = x - (t - t_next) * v
    return Trajectory(x, start, tuple(velocities), nfe=len(times) - 1)


def heun(
    field: VelocityField, x: Tensor, y: Tensor, times: Sequence[float], keep_velocities: bool = True
) -> Trajectory:
    """Heun's second-order method, Euler for the last step (Karras et al., 2022, algorithm 1). NFE = 2·steps - 1."""
    start = x
    velocities = []
    nfe = 0
    for t, t_next in pairwise(times):
        v = field(x, time_batch(x, t), y)
        if keep_velocities:
            velocities.append(v)
        nfe += 1
        x_next = x - (t - t_next) * v
        if t_next > 0:
            v_next = field(x_next, time_batch(x, t_next), y)
            x_next = x - (t - t_next) * 0.5 * (v + v_next)
            nfe += 1
        x = x_next
    return Trajectory(x, start, tuple(velocities), nfe)


# Dormand and Prince (1980): stage times, stage weights, and fifth- minus fourth-order weights.
_C = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_A: tuple[tuple[float, ...], ...] = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_E = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def dopri5(
    field: VelocityField, x: Tensor, y: Tensor, times: Sequence[float], rtol: float = 1e-5, atol: float = 1e-5
) -> Trajectory:
    """Adaptive Dormand–Prince 5(4) from times[0] to times[-1], with one step size for the whole batch (Hairer,
    Nørsett & Wanner, section II.4). NFE counts all evaluations, also those of rejected steps.

    Raises FloatingPointError if the field is not finite, or so stiff that the step size vanishes.
    """
    start = x
    velocities = []
    t = times[0]
    end = times[-1]
    h = (t - end) / 20
    k = [field(x, time_batch(x, t), y)]
    nfe = 1
    while t - end > 1e-9:
        h = min(h, t - end)
        k = k[:1]
        for stage in range(1, 7):
            x_next = x - h * torch.stack([a * v for a, v in zip(_A[stage], k, strict=True)]).sum(dim=0)
            k.append(field(x_next, time_batch(x, t - _C[stage] * h), y))
        nfe += 6
        error = h * torch.stack([e * v for e, v in zip(_E, k, strict=True)]).sum(dim=0)
        scale = atol + rtol * torch.maximum(x.abs(), x_next.abs())
        ratio = (error / scale).square().mean().sqrt().item()
        if not math.isfinite(ratio):
            raise FloatingPointError(f"the velocity field is not finite near t = {t:.6f}")
        if ratio <= 1:
            velocities.append(k[0])
            t = t - h
            x = x_next
            k = k[-1:]  # the last stage of a step is the first of the next
        growth = 5.0
        if ratio > 0:
            growth = min(5.0, max(0.2, 0.9 * ratio**-0.2))
        h *= growth
        if not h > 1e-9:
            raise FloatingPointError(
                f"dopri5 step size vanished at t = {t:.6f}: the velocity field is too stiff for its tolerances"
            )
    return Trajectory(x, start, tuple(velocities), nfe)


SOLVERS: dict[SolverName, Solver] = {"euler": euler, "heun": heun}


@dataclass(frozen=True)
class Sampler:
    """A solver, a schedule and a budget of function evaluations, as the paper names them: heun31, euler5."""

    solver: SolverName
    nfe: int
    schedule: ScheduleName = "t2"

    def __post_init__(self) -> None:
        if not 1 <= self.nfe <= MAX_NFE or (self.solver == "heun" and self.nfe % 2 == 0):
            raise ValueError(
                f"got {self.solver} with NFE {self.nfe}; expected 1 to {MAX_NFE}, and for heun an odd number "
                "(2·steps - 1)"
            )

    @property
    def name(self) -> str:
        """What `parse_sampler` reads; the schedule is named where it is not the paper's usual one."""
        return f"{self.solver}{self.nfe}" + (":t" if self.schedule == "t" else "")

    def __call__(self, field: VelocityField, noise: Tensor, y: Tensor, keep_velocities: bool = True) -> Trajectory:
        """Integrate from noise (B, C, H, W) at t = 1 to images at t = 0, with labels y (B,)."""
        steps = (self.nfe + 1) // 2 if self.solver == "heun" else self.nfe
        trajectory = SOLVERS[self.solver](field, noise, y, schedule(self.schedule, steps), keep_velocities)
        assert trajectory.nfe == self.nfe
        return trajectory


# What parse_sampler accepts; printed by `nfm config` and in docs/config.md.
SAMPLER_GRAMMAR = """\
<solver><NFE>[:<schedule>]
  <solver>    euler or heun
  <NFE>       number of network evaluations for one image, up to 10000: steps of euler, 2·steps - 1 of heun (always odd)
  <schedule>  t2 (the default): times fall from 1 to 0 as (1 - i/steps)²; t: as 1 - i/steps
heun31 has 16 steps, euler5 has 5 steps, euler128:t has 128 steps of equal length."""


def parse_sampler(text: str) -> Sampler:
    """Returns the sampler of a name such as `heun31` or `euler128:t`.

    Raises ValueError for a name that SAMPLER_GRAMMAR does not allow.
    """
    head, _, schedule_name = text.partition(":")
    schedule_name = schedule_name or "t2"
    for solver in SOLVERS:
        digits = head.removeprefix(solver)
        if re.fullmatch("[0-9]{1,9}", digits) and schedule_name in ("t", "t2"):
            return Sampler(solver, int(digits), "t" if schedule_name == "t" else "t2")
    raise ValueError(f"got sampler {text!r}; expected euler<NFE> or heun<NFE>, optionally ':t' or ':t2'")
