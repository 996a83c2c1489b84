"""encode: sample store + teacher → coupling store. This file encodes one unit; pipeline/encode_job.py spreads the units
over the machines of a Ray cluster."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from nfm.models.tarflow import FlowBlock, TarFlow, TarFlowConfig
from nfm.stages.checkpoint import load_network, weights_sha256
from nfm.stages.errors import StageError
from nfm.stages.section import Section
from nfm.storage_specs.format.codecs import ZDtype, decode, encode, int8_scale
from nfm.storage_specs.format.noise import NOISE_LAW, standard_normal
from nfm.storage_specs.format.pixels import to_float
from nfm.storage_specs.format.schema import (
    CouplingSpec,
    LayoutName,
    NoiseDtype,
    NoiseSpec,
    Precision,
    Spec,
    TeacherSpec,
)
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import sha256
from nfm.storage_specs.storage.npy import npy
from nfm.storage_specs.writing.units import NonFiniteError, Unit
from nfm.storage_specs.writing.writer import StoreWriter, begun

Positive = Annotated[int, Field(ge=1)]
# Of z encoded again: float32 on another machine moves it by 1e-5 σ_f, which can turn the rounding of a codec over.
REENCODE_TOLERANCE = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 5e-2, "int8": 8e-2}
PRECISION_TOLERANCE = {"fp32": 0.0, "tf32": 2e-2, "bf16": 0.2}  # what coarser products add to it
CALIBRATION_ROWS = 256  # images whose z sets the scale of int8
# Tokens that pass through the teacher at once. z must not depend on how a job was cut up, so this is no setting: it
# fills a GPU, and keeps a CPU's activations in its cache.
BATCH_TOKENS = {"cuda": 16_384, "cpu": 1024}
WRITES_PENDING = 2  # draws that wait for the disk before the teacher waits for them


class EncodeConfig(Section):
    """η is the teacher's own; what remains to choose is how many draws, how they are stored, and on what they are
    made. Derived noise takes no bytes: its law gives it back, bit for bit.
    """

    draws: Annotated[int, Field(ge=1, le=1 << 16)]
    layout: LayoutName = "webdataset"
    z_dtype: ZDtype = "float16"
    noise: Literal["stored", "derived"] = "stored"
    noise_dtype: NoiseDtype = "float16"
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    precision: Precision = "fp32"
    max_bad: Annotated[int, Field(ge=0)] = 0  # pairs with a z that is not finite, before the job stops
    device: Literal["cuda", "cpu"] | None = None  # None: cuda where the cluster has a GPU when the job starts
    workers: Positive | None = None  # None: one for each GPU of the cluster, or for each cpus_per_worker
    cpus_per_worker: Positive = 1


@dataclass(frozen=True)
class EncodedUnit:
    """What a worker tells of a unit. `bad` are the (image, draw) pairs whose z is not finite; with any, nothing of the
    unit is committed."""

    images: int
    draws: int  # forward passes of the teacher, one an image and draw; none where the unit was committed already
    seconds: float
    bad: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Speed:
    """What one worker does: teacher forwards a second, on which device."""

    draws_per_second: float
    device: str


def load_teacher(url: str) -> tuple[TarFlow, dict[str, Any]]:
    network, document = load_network(url, "TarFlow")
    assert isinstance(network, TarFlow)
    return network, document


def batch_rows(config: TarFlowConfig, device: str) -> int:
    """Images that pass through a teacher at once on a "cpu" or "cuda" device."""
    return max(1, BATCH_TOKENS[device] // config.tokens)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def output_spec(
    config: EncodeConfig, samples: Store, teacher: str, out: str
) -> tuple[Spec, NDArray[np.float32] | None]:
    """The spec of the couplings of `samples` and the teacher at a URL, and the scale of int8 z where it has one that is
    not in `out` yet. Writes nothing. Raises StageError where teacher and samples do not fit each other."""
    network, document = load_teacher(teacher)
    spec = coupling_spec(config, samples, network, document, teacher)
    if config.z_dtype != "int8":
        return spec, None
    there, scale = begun(out), None
    if there is not None and there.coupling is not None and there.coupling.z_scale_sha256:
        digest = there.coupling.z_scale_sha256  # what was begun keeps its scale, whatever this machine rounds to
    else:
        assert spec.coupling is not None
        scale = calibrate(samples, network, spec.coupling.eta, spec.coupling.noise)
        digest = sha256(npy(scale))
    described = spec.model_dump(mode="json")
    described["coupling"] |= {"z_dtype": "int8", "z_scale_sha256": digest}
    return Spec.model_validate(described, strict=False), scale


@torch.no_grad()
def calibrate(samples: Store, teacher: TarFlow, eta: float, noise: NoiseSpec) -> NDArray[np.float32]:
    """The int8 scale of each dimension of z, float32 (C, H, W), from the first images with their first draw."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    index = samples.spec.indices(0)[:CALIBRATION_ROWS]
    drawn = standard_normal(noise.seed, index, 0, samples.spec.shape).astype(noise.dtype)
    x = to_float(samples.column("x", 0)[: len(index)]) + eta * torch.from_numpy(drawn).float()
    y = torch.from_numpy(samples.column("label", 0)[: len(index)])
    z = [teacher.to(device)(a.to(device), b.to(device)).z.cpu() for a, b in zip(x.split(32), y.split(32), strict=True)]
    return int8_scale(torch.cat(z).numpy())


def coupling_spec(config: EncodeConfig, samples: Store, teacher: TarFlow, document: dict[str, Any], url: str) -> Spec:
    """The spec of the store to write, but for the scale of int8: that is float16 here."""
    source, shape = samples.spec, (teacher.config.channels, teacher.config.image_size, teacher.config.image_size)
    if (shape, teacher.config.num_classes) != (source.shape, source.num_classes):
        raise StageError(
            f"{url}: got a teacher of {shape} images with {teacher.config.num_classes} classes, expected "
            f"{source.shape} with {source.num_classes} classes as in {samples.url}; use the teacher trained on "
            "these samples"
        )
    trained = document["run"]["teacher"]
    coupling = CouplingSpec(
        draws=config.draws,
        eta=trained["eta"],
        precision=config.precision,
        z_dtype="float16" if config.z_dtype == "int8" else config.z_dtype,
        z_scale_sha256=None,
        noise=NoiseSpec(law=NOISE_LAW, seed=config.seed, dtype=config.noise_dtype, stored=config.noise == "stored"),
        teacher=TeacherSpec(
            architecture=document["architecture"],
            sha256=weights_sha256(teacher.state_dict()),
            training={
                "config": trained,
                "images": document["training"]["images"],
                "val_nll": document["training"]["val"],
            },
        ),
        source=samples.dataset.id,
    )
    return source.model_copy(update={"kind": "couplings", "layout": config.layout, "coupling": coupling})


class UnitEncoder:
    """Holds a teacher and encodes units into a store that was begun with `spec`.

    `encode` may be called from several threads at once, and should be from two: the teacher serves one unit at a time,
    and meanwhile the next is read, its noise drawn, and the last is written.
    """

    def __init__(
        self,
        samples: str,
        teacher: str,
        out: str,
        spec: dict[str, Any],
        threads: int = 1,
        device: Literal["cuda", "cpu"] = "cpu",
    ) -> None:
        self.samples = Store(samples, kind="samples")
        self.writer = StoreWriter(out, Spec.model_validate(spec, strict=False))
        coupling = self.writer.spec.coupling
        assert coupling is not None
        self.coupling = coupling
        if self.samples.dataset.id != coupling.source:
            raise StageError(
                f"{samples}: got other samples on this node than on the driver's; give all nodes one store"
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("no GPU is usable in this worker")  # on this node: another may have one
        self.device = torch.device(device)
        if coupling.precision == "tf32" and device == "cpu":
            raise StageError("got encode.precision tf32, which only GPUs have, and a worker without one; use fp32")
        torch.backends.cuda.matmul.allow_tf32 = coupling.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = coupling.precision == "tf32"
        network, _ = load_teacher(teacher)
        if weights_sha256(network.state_dict()) != coupling.teacher.sha256:
            raise StageError(f"{teacher}: got another teacher on this node than on the driver's; give all of them one")
        self.rows = min(batch_rows(network.config, self.device.type), self.writer.spec.block_rows)
        self.teacher, self.threads = network.to(self.device), threads
        if device == "cuda":
            self._compile()
        self.turn = Lock()
        self.ahead, self.drawing = ThreadPoolExecutor(2, "nfm-ahead"), ThreadPoolExecutor(threads, "nfm-noise")
        self.behind = ThreadPoolExecutor(WRITES_PENDING, "nfm-write")

    def _compile(self) -> None:
        """Layer by layer, as all of them are the same code, with kernels that are chosen by rule and not by a race; and
        once now, so that no unit waits for it."""
        for block in self.teacher.blocks:
            assert isinstance(block, FlowBlock)
            for layer in block.attn_blocks:
                layer.compile(options={"deterministic": True})
        x = torch.zeros(self.rows, *self.writer.spec.shape)
        self.forward(x, torch.zeros(self.rows, dtype=torch.int64, device=self.device)).cpu()

    def encode(self, unit: Unit) -> EncodedUnit:
        """All draws of one unit: z = f(x + η·ε′, c), with ε′ rounded to its stored dtype before the teacher sees it."""
        images = self.writer.spec.rows_of(unit.block)
        if self.writer.root.exists(unit.commit_file):
            return EncodedUnit(images, 0, 0.0)
        base = {name: self.samples.column(name, unit.block) for name in ("x", "label")}
        x, y = to_float(base["x"]), torch.from_numpy(base["label"]).to(self.device)
        writing = self.writer.unit(unit)
        based = self.behind.submit(writing.base, base)
        next_noise = self.ahead.submit(self._noise, unit.block, unit.first, x)
        written: list[Future[list[tuple[int, int]]]] = []
        with self.turn:
            start = time.monotonic()
            for draw in unit.draws:
                noise, noisy = next_noise.result()
                if draw + 1 < unit.stop:
                    next_noise = self.ahead.submit(self._noise, unit.block, draw + 1, x)
                z = self.forward(noisy, y)
                if len(written) >= WRITES_PENDING:
                    written[-WRITES_PENDING].result()
                kept = noise if self.coupling.noise.stored else None
                written.append(self.behind.submit(_write, writing.draw, draw, z, kept))
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.monotonic() - start
        based.result()
        bad = tuple(pair for future in written for pair in future.result())
        if not bad:
            writing.commit(seconds, device_name(self.device))
        return EncodedUnit(images, images * len(unit.draws), seconds, bad)

    def _noise(self, block: int, draw: int, x: Tensor) -> tuple[NDArray[Any], Tensor]:
        """ε′ (rows, C, H, W) as it is stored, and x + η·ε′ in float32: on the CPU, so that they have the same bits
        wherever the teacher is."""
        spec, noise = self.writer.spec, self.coupling.noise
        parts = np.array_split(spec.indices(block), self.threads)
        drawn = self.drawing.map(lambda index: standard_normal(noise.seed, index, draw, spec.shape), parts)
        stored = torch.from_numpy(np.concatenate(list(drawn))).to(getattr(torch, noise.dtype))
        noisy = x + self.coupling.eta * stored.float()
        return stored.numpy(), noisy.pin_memory() if self.device.type == "cuda" else noisy

    @torch.no_grad()
    def forward(self, noisy: Tensor, y: Tensor) -> Tensor:
        """z (rows, C, H, W) float32 on the device. Every batch has one shape, the last padded, so that every row of a
        block passes through the same kernels."""
        bf16 = self.coupling.precision == "bf16"
        z = []
        with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
            for part, labels in zip(noisy.split(self.rows), y.split(self.rows), strict=True):
                empty = self.rows - len(part)
                padded = F.pad(part.to(self.device, non_blocking=True), (0, 0, 0, 0, 0, 0, 0, empty))
                z.append(self.teacher(padded, F.pad(labels, (0, empty))).z[: len(part)])
        return torch.cat(z).float()

    def faults(self, unit: Unit) -> list[str]:
        """What is wrong with a committed unit, found by reading it back."""
        return self.writer.faults(unit)

    def speed(self, seconds: float) -> Speed:
        """Times the teacher on images of the first block for about as long as this, after two passes to warm up."""
        x = to_float(self.samples.column("x", 0)[: self.rows])
        y = torch.from_numpy(self.samples.column("label", 0)[: self.rows]).to(self.device)
        times: list[float] = []
        for _ in range(2):
            self.forward(x, y).cpu()
        while sum(times) < seconds or len(times) < 3:
            start = time.monotonic()
            self.forward(x, y).cpu()
            times.append(time.monotonic() - start)
        return Speed(len(x) / float(np.median(times)), device_name(self.device))


def _write(put: Any, draw: int, z: Tensor, noise: NDArray[Any] | None) -> list[tuple[int, int]]:
    """Write one draw; the (image, draw) pairs that are not finite."""
    try:
        put(draw, z.cpu().numpy(), noise)
    except NonFiniteError as error:
        return [(image, draw) for image in error.images]
    return []


@torch.no_grad()
def reencode(store: Store, teacher: str, count: int, seed: int) -> float:
    """Run the teacher again on `count` random records; the largest difference between their stored and new z,
    both as the codec rounds them, in units of σ_f. Raises StoreError if one is not the teacher's."""
    network, _ = load_teacher(teacher)
    coupling = store.spec.coupling
    assert coupling is not None
    if weights_sha256(network.state_dict()) != coupling.teacher.sha256:
        raise StageError(f"{teacher}: got another teacher than the one that encoded {store.url}; give that one")
    rng, worst = np.random.default_rng(seed), 0.0
    records = rng.choice(
        store.spec.rows * store.spec.draws, min(count, store.spec.rows * store.spec.draws), replace=False
    )
    for record in tqdm(sorted(records.tolist()), desc="encode again", unit="record", leave=False):
        image, draw = divmod(record, store.spec.draws)
        block, row = divmod(image, store.spec.block_rows)
        noise = np.asarray(store.column("noise", block, draw)[row], dtype=np.float32)
        x = to_float(store.column("x", block)[row]) + coupling.eta * torch.from_numpy(noise)
        y = torch.tensor([store.column("label", block)[row]])
        again = network(x[None], y).z[0].numpy()
        stored = decode(store.column("z", block, draw)[row], coupling.z_dtype, store.z_scale)
        rounded = decode(encode(again, coupling.z_dtype, store.z_scale), coupling.z_dtype, store.z_scale)
        difference = float((np.abs(stored - rounded) / store.sigma_f).max())
        allowed = REENCODE_TOLERANCE[coupling.z_dtype] + PRECISION_TOLERANCE[coupling.precision]
        if not difference <= allowed:
            raise StoreError(
                f"{store.url}: z of image {image}, draw {draw}, is {difference:.2e} σ_f away from what {teacher} "
                "gives, "
                f"expected at most {allowed}; the store is not what its spec says"
            )
        worst = max(worst, difference)
    return worst
