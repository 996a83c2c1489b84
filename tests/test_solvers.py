"""Solvers against closed forms, and the curvature of paths whose shape is known."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nfm.models.fields import VelocityField
from nfm.models.metrics import curvature
from nfm.models.solvers import SOLVERS, Sampler, SolverName, dopri5, euler, heun, parse_sampler, schedule

X = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.zeros(3, dtype=torch.int64)


def linear(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """dx/dt = x, so x(0) = x(1) / e."""
    return x


def cubic(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """dx/dt = 3 t², so x(0) = x(1) - 1."""
    return 3 * t.view(-1, 1, 1, 1) ** 2 * torch.ones_like(x)


def constant(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return torch.full_like(x, 2.0)


def test_schedules() -> None:
    assert schedule("t", 4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert schedule("t2", 4) == [1.0, 0.5625, 0.25, 0.0625, 0.0]


@pytest.mark.parametrize("solver", [euler, heun, dopri5])
def test_a_constant_field_is_solved_exactly(solver: Callable[..., object]) -> None:
    torch.testing.assert_close(solver(constant, X, Y, schedule("t2", 3)).x, X - 2)  # type: ignore[attr-defined]  # each has its own signature


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver: SolverName, order: int) -> None:
    """Halving the step divides the error by 2^order."""

    def error(steps: int) -> float:
        # Heun's last step is Euler's; end before it so that the method's own order shows.
        times = [1 - 0.5 * i / steps for i in range(steps + 1)]
        return (SOLVERS[solver](linear, X, Y, times).x - X * math.exp(-0.5)).abs().max().item()

    assert math.log2(error(20) / error(40)) == pytest.approx(order, abs=0.1)


def test_euler_by_hand() -> None:
    torch.testing.assert_close(euler(linear, X, Y, [1.0, 0.5, 0.0]).x, X * 0.5 * 0.5)


def test_heun_by_hand() -> None:
    """A trapezoid from 1 to ½, then an Euler step."""
    trapezoid = 1 - 0.5 * (1 + 0.5) / 2
    torch.testing.assert_close(heun(linear, X, Y, [1.0, 0.5, 0.0]).x, X * trapezoid * 0.5)


@pytest.mark.parametrize(("field", "expected"), [(linear, X / math.e), (cubic, X - 1)])
def test_dopri5_meets_its_tolerance(field: VelocityField, expected: Tensor) -> None:
    solution = dopri5(field, X, Y, [1.0, 0.0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(solution.x, expected, atol=1e-6, rtol=0)
    assert solution.nfe < 400


def test_dopri5_takes_fewer_steps_for_looser_tolerances() -> None:
    loose, tight = (dopri5(linear, X, Y, [1.0, 0.0], rtol=tol, atol=tol) for tol in (1e-3, 1e-10))
    assert loose.nfe < tight.nfe


def test_dopri5_stops_on_a_field_that_is_not_finite() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        dopri5(lambda x, t, y: x * math.nan, X, Y, [1.0, 0.0])


@pytest.mark.parametrize(("text", "steps"), [("heun31", 16), ("heun7", 4), ("euler5", 5), ("euler128:t", 128)])
def test_samplers_count_nfe_as_the_paper(text: str, steps: int) -> None:
    calls = 0

    def counting(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x

    sampler = parse_sampler(text)
    assert sampler.name == text
    trajectory = sampler(counting, X, Y)
    assert calls == trajectory.nfe == sampler.nfe
    assert len(trajectory.velocities) == steps


@pytest.mark.parametrize(
    "text",
    [
        "heun30",
        "euler0",
        "rk4",
        "euler",
        "euler5:cos",
        "heun-3",
        "euler٣",
        "euler²",
        "euler10001",
        "euler" + "9" * 30,
    ],
)
def test_unknown_samplers(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_sampler(text)


def test_curvature_of_a_straight_path_is_zero() -> None:
    torch.testing.assert_close(curvature(Sampler("euler", 5)(constant, X, Y)), torch.zeros(3, dtype=X.dtype))


def test_curvature_by_hand() -> None:
    """Two Euler steps of v = 1 then v = 3 on the linear schedule: chord 2, so κ = (1² + 1²) / 2 in every dimension."""

    def turning(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t.view(-1, 1, 1, 1) > 0.75, 1.0, 3.0).expand_as(x)

    torch.testing.assert_close(
        curvature(Sampler("euler", 2, "t")(turning, X.float(), Y)), torch.ones(3), atol=1e-6, rtol=0
    )
