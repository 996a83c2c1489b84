"""The training loop of teacher and student.

It counts images, not epochs. All random numbers of a step come from a generator that is seeded by (seed, images seen,
rank), so a resumed run is bit-identical on CPU, and there is no generator state to save.
"""

import gc
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
from nfm.stages.checkpoint import (
    Checkpoint,
    Curves,
    add_prefix,
    architecture,
    exists,
    load,
    load_weights,
    remove,
    save,
)
from nfm.stages.errors import StageError
from nfm.stages.progress import Progress
from nfm.stages.section import Section
from nfm.stages.training_checks import check_points, divergence_error, read_state
from nfm.storage_specs.reading.batches import Batch
from nfm.storage_specs.reading.stream import CouplingStream, Source, View
from nfm.storage_specs.storage.documents import list_differences
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import Root

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    """Budget and optimizer of one network. Budgets and intervals are counted in images, not in steps or epochs."""

    images: int = Field(ge=1, description="Budget: training images that the network sees, over all epochs.")
    batch_size: int = Field(ge=1, description="Images in one step, of all processes together.")
    lr: float = Field(gt=0, description="Learning rate of AdamW at the end of the warm-up.")
    lr_schedule: Literal["constant", "cosine"] = Field(
        default="constant",
        description='Learning rate over the budget: "constant", or "cosine", half a cosine from `lr` to `lr / 20`.',
    )
    warmup_images: int = Field(ge=0, description="Images over which the learning rate rises linearly from 0.")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False, description="β₁ and β₂ of AdamW.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of AdamW.")
    clip: float = Field(
        default=1.0, gt=0, description="Largest L2 norm of the gradient. A longer gradient is scaled down to it."
    )
    ema: float = Field(
        default=0.9999,
        ge=0,
        lt=1,
        description="Decay β, per step, of the exponential moving average of the weights, "
        "which is the network that is kept. "
        "Early steps use `min(β, (1 + step) / (10 + step))`.",
    )
    log_images: int = Field(ge=1, description="Images between two points of the recorded loss curve.")
    checkpoint_images: int = Field(
        ge=1,
        description="Images between two checkpoints, from which the same command continues. "
        "The teacher is validated at each.",
    )
    window_blocks: int | None = Field(
        default=None,
        ge=1,
        description="Blocks of the store whose rows are shuffled together. "
        "With fewer blocks, less of a remote store is needed at once. "
        "Without it: all blocks.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=1 << 31,
        description="Seed of the initial weights, the order of the images and all random draws of training.",
    )


# Loss of a batch: (network, batch, generator) to per-sample losses (B,).
Loss = Callable[[nn.Module, Batch, torch.Generator], Tensor]
# Validation of the EMA network at each checkpoint: (network, progress) to a number of which lower is better.
Validate = Callable[[nn.Module, Progress], float]


@dataclass(frozen=True)
class World:
    """The processes that train one network together, seen from this one, which has number `rank` of `size`."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first_rank(self) -> bool:
        """Whether this process is the one that writes checkpoints and shows progress."""
        return self.rank == 0


@contextmanager
def join_world() -> Iterator[World]:
    """Join the process group that torchrun or Ray Train describe in environment variables, if there is one."""
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World(0, 1, device)
        return
    starts_group = not dist.is_initialized()
    if starts_group:
        dist.init_process_group("nccl" if has_gpu else "gloo")
    try:
        yield World(dist.get_rank(), size, device)
    finally:
        if starts_group:
            gc.collect()  # DDP is in a cycle, and keeps the threads of the group alive until Python ends under them
            dist.destroy_process_group()


def open_stream(url: str | Sequence[Source], view: View, config: TrainConfig, world: World) -> CouplingStream:
    """This rank's share of the training data.

    Raises StageError if the batch cannot be split equally among the ranks, StoreError for a broken store.
    """
    if config.batch_size % world.size:
        raise StageError(
            f"got batch_size {config.batch_size} for {world.size} processes; expected a multiple of {world.size}"
        )
    try:
        return CouplingStream(
            url,
            batch_size=config.batch_size,
            seed=config.seed,
            view=view,
            rank=world.rank,
            world_size=world.size,
            window_blocks=config.window_blocks,
            stored=world.device.type == "cuda",  # a GPU converts to float32 itself, so fewer bytes are copied to it
        )
    except ValueError as error:
        raise StageError(str(error)) from error


def step_seed(seed: int, images: int, rank: int) -> int:
    """The seed of a step's random numbers, from the run's seed, the images seen before the step, and the rank.

    It is 32 bits of a hash: torch's CPU generator uses no more.
    """
    digest = hashlib.sha256(f"{seed} {images} {rank}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def learning_rate(config: TrainConfig, images: int) -> float:
    """The learning rate of the step after `images` images: a linear warm-up, then constant, or half a cosine down to a
    twentieth of `lr`."""
    warmup = 1.0
    if config.warmup_images:
        warmup = min(1.0, (images + config.batch_size) / config.warmup_images)
    if config.lr_schedule == "constant":
        return config.lr * warmup
    fraction_done = min(1.0, images / config.images)
    cosine = 0.5 * (1 + math.cos(math.pi * fraction_done))  # from 1 down to 0
    return config.lr * warmup * (0.05 + 0.95 * cosine)


@dataclass
class DataWaits:
    """Seconds for which a run waited for its batches since it was started or resumed."""

    started_at: float = field(default_factory=time.monotonic)
    first_batch: float | None = None
    other_batches: float = 0.0

    def next_batch(self, stream: CouplingStream) -> Batch:
        """The next batch of the stream; the time that it takes is added."""
        wait_started_at = time.monotonic()
        batch = next(stream)
        seconds = time.monotonic() - wait_started_at
        if self.first_batch is None:
            self.first_batch = seconds
        else:
            self.other_batches += seconds
        return batch

    def summarize(self) -> dict[str, float]:
        """The timing in a finished model's document. `data_wait` is the share of the time after the first batch in
        which no batch was ready."""
        seconds = time.monotonic() - self.started_at
        first_batch = self.first_batch or 0.0
        return {
            "seconds_since_resume": round(seconds, 2),
            "first_batch_seconds": round(first_batch, 3),
            "data_wait": round(self.other_batches / max(seconds - first_batch, 1e-9), 5),
        }


class Trainer:
    """Trains one network in the folder `out`, which holds `state.safetensors` while the run is not finished, and
    `model.safetensors` afterwards.

    `document` is JSON that identifies the run (its config and data): a state of another run is refused, not continued.
    `validate` chooses the weights that are kept: those of the checkpoint with the lowest value. Without it, they are
    the last ones. Both are averages (EMA).
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
        world: World,
        validate: Validate | None = None,
    ) -> None:
        self.name = name
        self.loss = loss
        self.stream = stream
        self.config = config
        self.out = out
        self.document = document
        self.world = world
        self.validate = validate
        check_points(name, config.images, config.batch_size, (config.log_images, config.checkpoint_images))
        with Progress("copy the network for its average", enabled=world.is_first_rank):
            self.network = network.to(world.device)
            self.ema = EMA(self.network, config.ema)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.images = 0  # seen so far
        self.curves = Curves()
        self.best: dict[str, Tensor] = {}  # weights with the lowest validation so far; empty without validation
        self.best_val = math.inf

    @property
    def model_url(self) -> str:
        return checkpoint_urls(self.out)[0]

    @property
    def state_url(self) -> str:
        return checkpoint_urls(self.out)[1]

    def run(self) -> dict[str, Any]:
        """Train to the end, from the last state if there is one; returns the finished model's document.

        Raises StageError if the folder belongs to another run, FloatingPointError if the loss, the gradient or the
        validation is not finite.
        """
        if exists(self.model_url):
            with Progress("read model.safetensors", enabled=self.world.is_first_rank):
                document = load(self.model_url).document
            return check_same_run(document, self.document, self.model_url)
        self._on_first_rank(Root(self.out).check_writable)
        if exists(self.state_url):
            self._restore()
        done = min(self.images, self.config.images)
        try:
            with Progress(self.name, self.config.images, "image", done, self.world.is_first_rank) as progress:
                waits = self._train(progress)
        finally:
            self.stream.close()
        return self._finish(waits.summarize())

    def _train(self, progress: Progress) -> DataWaits:
        """The loop over batches, until all images of the budget were seen."""
        config = self.config
        model: nn.Module = self.network
        first_step_note = "first step"
        if self.world.device.type == "cuda":
            first_step_note = "first step: the network is compiled"
            model = cast(nn.Module, torch.compile(model))  # a module in, a module out; torch types it as any callable
        if self.world.size > 1:
            model = DistributedDataParallel(model)
        loss_sum = torch.zeros((), device=self.world.device)  # since the last point of the loss curve
        loss_steps = 0
        waits = DataWaits()
        progress.set_note("waiting for the first batch")
        while self.images < config.images:
            is_first_step = waits.first_batch is None
            batch = waits.next_batch(self.stream)
            if is_first_step:
                progress.set_note(first_step_note)
            batch = self.stream.to_float(batch.to(self.world.device))
            loss = self._step(model, batch)
            loss_sum += loss.detach()
            loss_steps += 1
            self.images += config.batch_size
            is_finished = self.images >= config.images
            is_checkpoint = is_finished or crosses_multiple(self.images, config.batch_size, config.checkpoint_images)
            # The loss curve gets a point at each checkpoint too, so that a resumed run records the same curve.
            if is_checkpoint or crosses_multiple(self.images, config.batch_size, config.log_images):
                self.curves.images.append(self.images)
                self.curves.loss.append(self._mean_over_ranks(loss_sum) / loss_steps)
                loss_sum = torch.zeros_like(loss_sum)
                loss_steps = 0
            note = f"loss {self.curves.loss[-1]:.4f}" if self.curves.loss else ""
            progress.advance(min(config.batch_size, config.images - progress.done), note)
            if is_checkpoint:
                self._checkpoint(progress)
        return waits

    def _step(self, model: nn.Module, batch: Batch) -> Tensor:
        """One step of the optimizer and the EMA; returns the mean loss of the batch.

        Raises FloatingPointError if the loss or the gradient is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.images)
        generator = torch.Generator().manual_seed(step_seed(self.config.seed, self.images, self.world.rank))
        with torch.autocast("cuda", torch.bfloat16, enabled=self.world.device.type == "cuda"):
            losses = self.loss(model, batch, generator)
        loss = losses.mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        # After `backward`, which averages over the ranks: what is not finite on one of them stops all of them.
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise divergence_error(self.name, self.images, batch, losses)
        self.optimizer.step()
        self.ema.update(self.network, self.images // self.config.batch_size)
        return loss

    def _mean_over_ranks(self, value: Tensor) -> float:
        """The mean of a scalar of all ranks. It overwrites `value`."""
        if self.world.size > 1:
            dist.all_reduce(value)
        return value.item() / self.world.size

    def _checkpoint(self, progress: Progress) -> None:
        """Validate the EMA network, and write the state from which the same run continues."""
        if self.validate is not None:
            val = self.validate(self.ema.network, progress)
            if not math.isfinite(val):
                raise FloatingPointError(f"{self.name}: validation is {val} at {self.images} images")
            self.curves.val_images.append(self.images)
            self.curves.val.append(val)
            if val < self.best_val:
                self.best_val = val
                self.best = {name: tensor.clone() for name, tensor in self.ema.network.state_dict().items()}
        tensors = add_prefix("network", self.network.state_dict())
        tensors |= add_prefix("ema", self.ema.network.state_dict())
        tensors |= add_prefix("best", self.best)
        for number, entry in self.optimizer.state_dict()["state"].items():
            tensors |= add_prefix(f"optimizer.{number}", entry)
        document = {
            "run": self.document,
            "images": self.images,
            "stream": vars(self.stream.state),
            "curves": vars(self.curves),
            "best_val": self.best_val if self.best else None,
        }
        with progress.step("write state.safetensors"):
            self._on_first_rank(lambda: save(self.state_url, Checkpoint(tensors, document)))

    def _on_first_rank(self, write: Callable[[], None]) -> None:
        """Write to `out` on the first rank. If that fails, every rank raises, so that none waits for another."""
        failure: OSError | StoreError | None = None
        if self.world.is_first_rank:
            try:
                write()
            except (OSError, StoreError) as error:
                failure = error
        failures = torch.tensor(float(failure is not None), device=self.world.device)
        if self.world.size > 1:
            dist.all_reduce(failures)
        if failure is not None:
            raise failure
        if failures:
            raise StageError(f"{self.out}: the first process could not write it, and says why")

    def _restore(self) -> None:
        """Continue from `state.safetensors`. Raises StageError if it is of another run, or not what one wrote."""
        with Progress("read state.safetensors", enabled=self.world.is_first_rank):
            state = load(self.state_url)
        check_same_run(state.document, self.document, self.state_url)
        restored = read_state(state, self.network, self.state_url)
        load_weights(self.network, state.group("network"), self.state_url)
        load_weights(self.ema.network, state.group("ema"), self.state_url)
        optimizer = self.optimizer.state_dict()
        numbers = range(len(optimizer["param_groups"][0]["params"]))
        optimizer["state"] = {number: state.group(f"optimizer.{number}") for number in numbers}
        self.optimizer.load_state_dict(optimizer)
        self.images = restored.images
        try:
            self.stream.state = restored.stream
        except ValueError as error:  # a position that the data do not have
            raise StageError(f"{self.state_url}: {error}; begin again in another folder") from error
        self.curves = restored.curves
        self.best = {name: tensor.to(self.world.device) for name, tensor in state.group("best").items()}
        self.best_val = math.inf if restored.best_val is None else restored.best_val

    def _finish(self, timing: dict[str, float]) -> dict[str, Any]:
        """Write the finished model in place of the state; returns its document."""
        weights = self.ema.network.state_dict()
        val = None
        chosen_at = self.images  # training images after which the network had the weights that are kept
        if self.best:
            weights = self.best
            val = self.best_val
            chosen_at = self.curves.val_images[self.curves.val.index(self.best_val)]
        document = {
            "run": self.document,
            "architecture": architecture(self.network),
            "x": self.stream.spec.x.model_dump(mode="json"),
            "training": {"images": self.images, "val": val, "chosen_at": chosen_at, **timing},
            "curves": vars(self.curves),
        }
        with Progress("write model.safetensors", enabled=self.world.is_first_rank):
            self._on_first_rank(lambda: save(self.model_url, Checkpoint(add_prefix("model", weights), document)))
        if self.world.is_first_rank:
            remove(self.state_url)
        return document


def checkpoint_urls(out: str) -> tuple[str, str]:
    """The URLs of the finished model, and of the state of a run that is not finished, in the folder `out`."""
    return f"{out}/model.safetensors", f"{out}/state.safetensors"


def check_same_run(document: dict[str, Any], expected: dict[str, Any], url: str) -> dict[str, Any]:
    """Returns the document of the checkpoint at `url`. Raises StageError naming all differences unless it is of the run
    that `expected` identifies."""
    if different := list_differences(expected, document["run"]):
        raise StageError(
            f"{url} is of another run ({'; '.join(different)}); write to another folder, or delete this one"
        )
    return document


def crosses_multiple(images: int, batch_size: int, interval: int) -> bool:
    """Whether a batch that ended at `images` images reached or crossed a multiple of `interval`."""
    return images // interval > (images - batch_size) // interval
