"""What a training refuses: states that no run wrote, numbers that are not finite, curves too long for a checkpoint."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nfm.stages.checkpoint import Checkpoint, Curves, add_prefix, read_curves
from nfm.stages.errors import StageError
from nfm.storage_specs.reading.batches import Batch
from nfm.storage_specs.reading.stream import StreamState

MAX_POINTS = 300_000  # of the curves of a run: they stand in the header of its checkpoint


@dataclass(frozen=True)
class RunState:
    """Images seen, the place in the data, the curves so far, and the lowest validation (None without one)."""

    images: int
    stream: StreamState
    curves: Curves
    best_val: float | None


def read_state(state: Checkpoint, network: nn.Module, url: str) -> RunState:
    """The numbers of a state. Raises StageError unless state and numbers are such as a run of `network` writes."""
    _check_shapes(state, network, url)
    document = state.document
    curves = read_curves(document, url)
    images, best_val = document.get("images"), document.get("best_val")
    place: Any = document.get("stream")
    is_place = isinstance(place, dict) and place.keys() == {"epoch", "position"}
    if not (is_place and all(type(count) is int and count >= 0 for count in place.values())):
        raise _state_error(url, f"stream {place!r}, expected an epoch and a position")
    if images != curves.images[-1]:
        raise _state_error(url, f"{images!r} images, expected the {curves.images[-1]} at which its curves end")
    has_best = any(name.startswith("best.") for name in state.tensors)
    if (best_val is not None) != has_best or (has_best and best_val not in curves.val):
        raise _state_error(url, f"{best_val!r} as its lowest validation, expected one of its curve")
    return RunState(images, StreamState(**place), curves, best_val)


def _check_shapes(state: Checkpoint, network: nn.Module, url: str) -> None:
    """Raise StageError naming the first tensor that is not there, or that is not expected."""
    weights = {name: tensor.shape for name, tensor in network.state_dict().items()}
    expected = add_prefix("network", weights) | add_prefix("ema", weights)
    if any(name.startswith("best.") for name in state.tensors):
        expected |= add_prefix("best", weights)
    for number, parameter in enumerate(network.parameters()):
        entry = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        expected |= add_prefix(f"optimizer.{number}", entry)
    actual = {name: tensor.shape for name, tensor in state.tensors.items()}
    if actual != expected:
        name = min(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
        got, wanted = (f"shape {list(shapes[name])}" if name in shapes else "none" for shapes in (actual, expected))
        raise _state_error(url, f"tensor {name!r} of {got}, expected {wanted}")


def _state_error(url: str, got: str) -> StageError:
    return StageError(f"{url}: got a state with {got}; the file is damaged, begin again in another folder")


def check_points(name: str, images: int, batch_size: int, intervals: tuple[int, ...]) -> None:
    """Raise StageError if the curves of a run get more points than a checkpoint holds. There is one at each of the
    `intervals`, which are counted in images, and at most one a batch."""
    points = sum(images // max(interval, batch_size) for interval in intervals)
    if points > MAX_POINTS:
        raise StageError(
            f"{name}: got log_images and checkpoint_images that give curves of {points} points, "
            f"expected at most {MAX_POINTS}; give larger ones"
        )


def divergence_error(name: str, images: int, batch: Batch, losses: Tensor) -> FloatingPointError:
    """The error for the step after `images` images, whose `losses` (B,) or gradient are not finite. It blames images of
    the store only if their values are not finite: else the training has diverged."""
    got = f"{name}: the loss is {losses.mean().item()} after {images} images"
    if torch.isfinite(losses).all():
        got = f"{name}: the gradient is not finite after {images} images"
    values = torch.cat([batch.x.flatten(1), batch.z.flatten(1)] if len(batch.z) else [batch.x.flatten(1)], dim=1)
    bad_images = batch.index[~values.isfinite().all(dim=1)].tolist()
    if bad_images:
        return FloatingPointError(f"{got}; images {bad_images[:8]} of the store have values that are not finite")
    return FloatingPointError(
        f"{got}; the values of its images are finite, so the training has diverged: "
        "begin again in another folder with a lower lr, a longer warm-up or a lower clip"
    )
