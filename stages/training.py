"""The one training loop, of teacher and student alike.

It counts images, not epochs. Every random number of a step comes from a generator seeded by (seed, images seen,
rank), so a resumed run is bit-identical on CPU and there is no generator state to save.
"""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nfm.models.ema import EMA
from nfm.stages.checkpoint import Checkpoint, architecture, exists, load, load_weights, remove, save
from nfm.stages.errors import StageError
from nfm.stages.progress import Progress
from nfm.stages.section import Section
from nfm.storage_specs.reading.batches import Batch
from nfm.storage_specs.reading.stream import CouplingStream, Source, StreamState, View
from nfm.storage_specs.storage.documents import list_differences

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    """Budget and optimizer of one network. Budgets and intervals are counted in images, not in steps or epochs."""

    images: int = Field(ge=1, description="Budget: training images that the network sees, over all epochs.")
    batch_size: int = Field(ge=1, description="Images in one step, of all processes together.")
    lr: float = Field(gt=0, description="Learning rate of AdamW at the end of the warm-up.")
    lr_schedule: Literal["constant", "cosine"] = Field(
        default="constant",
        description='Learning rate over the budget: "constant", or "cosine", half a cosine from `lr` down to lr / 20.',
    )
    warmup_images: int = Field(ge=0, description="Images over which the learning rate rises linearly from 0.")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), description="β₁ and β₂ of AdamW.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of AdamW.")
    clip: float = Field(
        default=1.0, gt=0, description="Largest L2 norm of the gradient. A longer gradient is scaled down to it."
    )
    ema: float = Field(
        default=0.9999,
        ge=0,
        lt=1,
        description="Decay β, per step, of the exponential moving average of the weights, which is the network that is "
        "kept. Early steps use min(β, (1 + step) / (10 + step)).",
    )
    log_images: int = Field(ge=1, description="Images between two points of the recorded loss curve.")
    checkpoint_images: int = Field(
        ge=1,
        description="Images between two checkpoints, from which the same command continues. The teacher is validated "
        "at each.",
    )
    window_blocks: int | None = Field(
        default=None,
        ge=1,
        description="Blocks of the store whose rows are shuffled together. Without it: all blocks. A window keeps the "
        "part of a remote store that is needed at a time small.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=1 << 31,
        description="Seed of the initial weights, the order of the images and all random draws of training.",
    )


# Loss of a batch: (network, batch, generator) to per-sample losses (B,).
Loss = Callable[[nn.Module, Batch, torch.Generator], Tensor]
# Validation of the EMA network, lower is better; run at each checkpoint.
Validate = Callable[[nn.Module], float]


@dataclass
class Curves:
    """What a run recorded: at `images[i]` seen, mean `loss[i]` since the last entry; the same for validation."""

    images: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    val_images: list[int] = field(default_factory=list)
    val: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class World:
    """This process among those that train together, from the standard environment variables."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextmanager
def world() -> Iterator[World]:
    """Join the process group that torchrun or Ray Train set up, if any."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World(0, 1, device)
        return
    joined_here = not dist.is_initialized()
    if joined_here:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield World(dist.get_rank(), size, device)
    finally:
        if joined_here:
            dist.destroy_process_group()


def open_stream(url: str | Sequence[Source], view: View, config: TrainConfig, here: World) -> CouplingStream:
    """This rank's share of the training data. Raises StageError if the ranks cannot share the batch equally."""
    if config.batch_size % here.size:
        raise StageError(f"got batch_size {config.batch_size} for {here.size} processes; expected a multiple of them")
    try:
        return CouplingStream(
            url,
            config.batch_size,
            config.seed,
            view,
            here.rank,
            here.size,
            window_blocks=config.window_blocks,
            stored=here.device.type == "cuda",
        )
    except ValueError as error:
        raise StageError(str(error)) from error


def step_seed(seed: int, images: int, rank: int) -> int:
    """32 well-mixed bits, all that torch's CPU generator takes, from what identifies a step."""
    return int.from_bytes(hashlib.sha256(f"{seed} {images} {rank}".encode()).digest()[:4], "big")


def learning_rate(config: TrainConfig, images: int) -> float:
    """Linear warm-up, then constant, or a half cosine down to a twentieth."""
    warmup = min(1.0, (images + config.batch_size) / config.warmup_images) if config.warmup_images else 1.0
    if config.lr_schedule == "constant":
        return config.lr * warmup
    return config.lr * warmup * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, images / config.images))))


class Trainer:
    """One run in the folder `out`: `state.safetensors` while it runs, `model.safetensors` once it is finished.

    `document` is JSON that identifies the run (config, data); a state of another run is refused, not continued.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        loss: Loss,
        stream: CouplingStream,
        config: TrainConfig,
        out: str,
        document: dict[str, Any],
        here: World,
        validate: Validate | None = None,
    ) -> None:
        self.name, self.loss, self.stream, self.config, self.out = name, loss, stream, config, out
        self.document, self.here, self.validate = document, here, validate
        self.network = network.to(here.device)
        self.ema = EMA(self.network, config.ema)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.images = 0
        self.curves = Curves()
        self.best: dict[str, Tensor] = {}
        self.best_val = math.inf

    @property
    def state_url(self) -> str:
        return f"{self.out}/state.safetensors"

    @property
    def model_url(self) -> str:
        return f"{self.out}/model.safetensors"

    def run(self) -> dict[str, Any]:
        """Train to the end, from the last state if there is one; returns the finished model's document."""
        if exists(self.model_url):
            return check_same_run(load(self.model_url).document, self.document, self.model_url)
        if exists(self.state_url):
            self._restore()
        model: nn.Module = self.network
        if self.here.device.type == "cuda":
            model = cast(nn.Module, torch.compile(model))  # a module in, a module out; torch types it as any callable
        if self.here.size > 1:
            model = DistributedDataParallel(model)
        config, window, window_images = self.config, torch.zeros((), device=self.here.device), 0
        start, waits = time.monotonic(), [0.0, 0.0]  # seconds for the first batch, and for all others
        begun = self.images
        shown = (
            Progress(self.name, config.images, "img", done=min(self.images, config.images)) if self.here.first else None
        )
        try:
            while self.images < config.images:
                asked = time.monotonic()
                batch = next(self.stream)
                waits[self.images > begun] += time.monotonic() - asked
                batch = self.stream.to_float(batch.to(self.here.device))
                loss = self._step(model, batch)
                window += loss.detach()
                window_images += config.batch_size
                self.images += config.batch_size
                checkpoint = (
                    _passed(self.images, config.batch_size, config.checkpoint_images) or self.images >= config.images
                )
                # A checkpoint ends the log's window too, so that a resumed run records the same curve.
                if checkpoint or _passed(self.images, config.batch_size, config.log_images):
                    mean = self._mean(window) * config.batch_size / window_images
                    self.curves.images.append(self.images)
                    self.curves.loss.append(mean)
                    window, window_images = torch.zeros_like(window), 0
                if checkpoint:
                    self._checkpoint()
                if shown:
                    recent = f"loss {self.curves.loss[-1]:.4f}" if self.curves.loss else ""
                    shown.advance(min(config.batch_size, config.images - shown.done), recent)
        finally:
            self.stream.close()
            if shown:
                shown.bar.close()
        seconds = time.monotonic() - start
        share = waits[1] / max(seconds - waits[0], 1e-9)
        return self._finish(
            {
                "seconds_since_resume": round(seconds, 2),
                "first_batch_seconds": round(waits[0], 3),
                "data_wait": round(share, 5),
            }
        )

    def _step(self, model: nn.Module, batch: Batch) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.images)
        generator = torch.Generator().manual_seed(step_seed(self.config.seed, self.images, self.here.rank))
        with torch.autocast("cuda", torch.bfloat16, enabled=self.here.device.type == "cuda"):
            losses = self.loss(model, batch, generator)
        loss = losses.mean()
        if not torch.isfinite(loss):
            bad = batch.index[~torch.isfinite(losses)].tolist()
            raise FloatingPointError(
                f"{self.name}: loss is {loss.item()} at {self.images} images; images {bad[:8]} of the store are "
                "not finite in it"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"{self.name}: the gradient is not finite at {self.images} images; "
                f"the batch was images {batch.index[:8].tolist()}… of the store"
            )
        self.optimizer.step()
        self.ema.update(self.network, self.images // self.config.batch_size)
        return loss

    def _mean(self, value: Tensor) -> float:
        if self.here.size > 1:
            dist.all_reduce(value)
        return value.item() / self.here.size

    def _checkpoint(self) -> None:
        if self.validate is not None:
            val = self.validate(self.ema.network)
            if not math.isfinite(val):
                raise FloatingPointError(f"{self.name}: validation is {val} at {self.images} images")
            self.curves.val_images.append(self.images)
            self.curves.val.append(val)
            if val < self.best_val:
                self.best_val = val
                self.best = {name: tensor.clone() for name, tensor in self.ema.network.state_dict().items()}
        if not self.here.first:
            return
        tensors = _prefixed("network", self.network.state_dict()) | _prefixed("ema", self.ema.network.state_dict())
        tensors |= _prefixed("best", self.best)
        for number, entry in self.optimizer.state_dict()["state"].items():
            tensors |= _prefixed(f"optimizer.{number}", entry)
        state = {
            "run": self.document,
            "images": self.images,
            "stream": vars(self.stream.state),
            "curves": vars(self.curves),
            "best_val": self.best_val if self.best else None,
        }
        save(self.state_url, Checkpoint(tensors, state))

    def _restore(self) -> None:
        state = load(self.state_url)
        check_same_run(state.document, self.document, self.state_url)
        load_weights(self.network, state.group("network"), self.state_url)
        load_weights(self.ema.network, state.group("ema"), self.state_url)
        optimizer = self.optimizer.state_dict()
        numbers = range(len(optimizer["param_groups"][0]["params"]))
        optimizer["state"] = {number: state.group(f"optimizer.{number}") for number in numbers}
        self.optimizer.load_state_dict(optimizer)
        self.images = state.document["images"]
        self.stream.state = StreamState(**state.document["stream"])
        self.curves = Curves(**state.document["curves"])
        self.best = {name: tensor.to(self.here.device) for name, tensor in state.group("best").items()}
        self.best_val = state.document["best_val"] if self.best else math.inf

    def _finish(self, timing: dict[str, float]) -> dict[str, Any]:
        weights = self.best or self.ema.network.state_dict()
        document = {
            "run": self.document,
            "architecture": architecture(self.network),
            "training": {
                "images": self.images,
                "val": self.best_val if self.best else None,
                "chosen_at": self.curves.val_images[self.curves.val.index(self.best_val)] if self.best else self.images,
                **timing,  # data_wait: the share of the time in which no batch was ready
            },
            "curves": vars(self.curves),
        }
        if self.here.first:
            save(self.model_url, Checkpoint(_prefixed("model", weights), document))
            remove(self.state_url)
        return document


def check_same_run(found: dict[str, Any], expected: dict[str, Any], url: str) -> dict[str, Any]:
    """`found`, the document of a checkpoint, if it is of the run `expected`; else StageError naming what differs."""
    if different := list_differences(expected, found["run"]):
        raise StageError(
            f"{url} is of another run ({'; '.join(different)}); write to another folder, or delete this one"
        )
    return found


def _passed(images: int, batch: int, every: int) -> bool:
    """Whether the last batch crossed a multiple of `every`."""
    return images // every > (images - batch) // every


def _prefixed(prefix: str, tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
