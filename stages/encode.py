"""encode: sample store + teacher → coupling store.

This file encodes one unit; pipeline/encode_job.py spreads the units over the machines of a Ray cluster.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from nfm.models.tarflow import FlowBlock, TarFlow, TarFlowConfig
from nfm.stages.checkpoint import load_network, read_teacher_training, weights_sha256
from nfm.stages.errors import StageError
from nfm.stages.section import Section
from nfm.stages.support import check_network
from nfm.storage_specs.format.codecs import ZDtype, int8_scale
from nfm.storage_specs.format.noise import NOISE_LAW, standard_normal
from nfm.storage_specs.format.pixels import to_float
from nfm.storage_specs.format.schema import (
    LayoutName,
    NetworkSpec,
    NfmCoupling,
    NoiseDtype,
    NoiseSpec,
    Precision,
    Spec,
)
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.files import sha256
from nfm.storage_specs.storage.npy import npy_bytes
from nfm.storage_specs.writing.units import NonFiniteError, Unit, UnitWriter
from nfm.storage_specs.writing.writer import StoreWriter, read_started_spec

CALIBRATION_ROWS = 256  # images whose z sets the scale of int8
CALIBRATION_BATCH = 32
# Tokens that pass through the teacher at once: enough to fill a GPU, few enough for the cache of a CPU. It is not a
# setting, since z must not depend on how a job was split.
BATCH_TOKENS = {"cuda": 16_384, "cpu": 1024}
MAX_PENDING_WRITES = 2  # draws that wait to be written; with more, the teacher waits


class EncodeConfig(Section):
    """How many noise draws are encoded, how they are stored, and which workers do it. η is the teacher's."""

    draws: int = Field(ge=1, le=1 << 16, description="K, the noise draws stored for each image.")
    layout: LayoutName = Field(default="webdataset", description="File layout of the coupling store.")
    z_dtype: ZDtype = Field(
        default="float16", description="Number format in which z is stored; nfm store info shows what it costs."
    )
    noise: Literal["stored", "derived"] = Field(
        default="stored",
        description='"stored": ε′ is written beside z. '
        '"derived": it takes no bytes, and readers compute the same bits again from `seed`.',
    )
    noise_dtype: NoiseDtype = Field(
        default="float16", description="Number format to which ε′ is rounded before the teacher sees it."
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=1 << 31,
        description="Seed of the noise: ε′ depends on this seed, the index of the image and the number of the draw.",
    )
    precision: Precision = Field(
        default="fp32",
        description='Arithmetic of the teacher: "fp32" without TF32, "tf32" for matrix products, or "bf16" autocast.',
    )
    max_bad: int = Field(
        default=0,
        ge=0,
        description="Pairs whose z is not finite that the job tolerates before it stops at once. "
        "With any, it still fails at the end and lists them; a unit with such a pair is not written.",
    )
    device: Literal["cuda", "cpu"] | None = Field(
        default=None,
        description="Device of the workers. "
        'Without it: "cuda" if the cluster has a GPU when the job starts, else "cpu".',
    )
    workers: int | None = Field(
        default=None,
        ge=1,
        description="Largest number of workers. "
        "Without it: one for each GPU of the cluster, or on CPUs one for each `cpus_per_worker` cores.",
    )
    cpus_per_worker: int = Field(default=1, ge=1, description="CPU cores of each worker.")
    insecure_cluster: bool = Field(
        default=False,
        description="Whether the cluster that RAY_ADDRESS names may be one without authentication. "
        "Whoever reaches such a cluster can run code in it.",
    )


@dataclass(frozen=True)
class EncodedUnit:
    """The report of a worker about one unit."""

    images: int
    pairs: int  # images × draws, each one forward pass of the teacher; 0 if the unit was committed before
    seconds: float
    bad: tuple[tuple[int, int], ...] = ()  # (image, draw) pairs whose z is not finite; with any, nothing is committed


@dataclass(frozen=True)
class Speed:
    """The speed of one worker on a device. A pair is one image with one draw: one forward pass of the teacher."""

    pairs_per_second: float
    device: str


def load_teacher(url: str) -> tuple[TarFlow, dict[str, Any]]:
    """A teacher, and the document of its checkpoint. Raises StoreError or StageError if there is none at the URL."""
    network, document = load_network(url, "TarFlow")
    assert isinstance(network, TarFlow)
    return network, document


def batch_rows(config: TarFlowConfig, device: str) -> int:
    """The number of images that pass through a teacher at once on a "cpu" or "cuda" device."""
    return max(1, BATCH_TOKENS[device] // config.tokens)


def device_name(device: torch.device) -> str:
    """The name of a GPU as its maker calls it, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def output_spec(
    config: EncodeConfig, samples: Store, teacher: str, out: str
) -> tuple[Spec, NDArray[np.float32] | None]:
    """The spec of the store that encoding `samples` with the teacher at a URL gives. Writes nothing.

    For int8 z it also returns the scale of z, float32 (C, H, W), unless `out` holds a started store, which keeps its
    own scale. Raises StageError if teacher and samples do not fit each other.
    """
    network, document = load_teacher(teacher)
    spec = coupling_spec(config, samples, network, document, teacher)
    if config.z_dtype != "int8":
        return spec, None
    scale = None
    started_spec = read_started_spec(out)
    if started_spec is not None and started_spec.coupling is not None and started_spec.nfm.z_scale_sha256:
        digest = started_spec.nfm.z_scale_sha256  # another machine may compute a scale of other bits
    else:
        scale = calibrate(samples, network, spec.nfm.eta, spec.nfm.noise)
        digest = sha256(npy_bytes(scale))
    spec_document = spec.model_dump(mode="json")
    spec_document["coupling"] |= {"z_dtype": "int8", "z_scale_sha256": digest}
    return Spec.model_validate(spec_document, strict=False), scale


@torch.no_grad()
def calibrate(samples: Store, teacher: TarFlow, eta: float, noise: NoiseSpec) -> NDArray[np.float32]:
    """The int8 scale of each dimension of z, float32 (C, H, W), from the z of the first images, and their first draw
    in each view."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher.to(device)
    spec = samples.spec
    index = spec.indices(0)[: CALIBRATION_ROWS // len(spec.views)]
    y = torch.tensor(samples.column("label", 0)[: len(index)])
    z: list[Tensor] = []
    for draw, view in enumerate(spec.views):
        stored_noise = standard_normal(noise.seed, index, draw, spec.shape).astype(noise.dtype)
        x = to_float(samples.x_in(0, view)[: len(index)], spec.x)
        noisy = x + eta * torch.from_numpy(stored_noise).float()
        batches = zip(noisy.split(CALIBRATION_BATCH), y.split(CALIBRATION_BATCH), strict=True)
        z += [teacher(noisy_batch.to(device), y_batch.to(device)).z.cpu() for noisy_batch, y_batch in batches]
    return int8_scale(torch.cat(z).numpy())


def coupling_spec(config: EncodeConfig, samples: Store, teacher: TarFlow, document: dict[str, Any], url: str) -> Spec:
    """The spec of the store that encoding `samples` with a teacher gives, where `document` is that of the teacher's
    checkpoint and `url` is for messages. For int8 z, whose scale is not known here, it has float16.

    Raises StageError if teacher, samples and number of draws do not fit each other.
    """
    source = samples.spec
    if config.draws % len(source.views):
        raise StageError(
            f"{samples.url}: got encode.draws = {config.draws} for images in {len(source.views)} views "
            f"({', '.join(source.views)}), which draws show in turn; expected an even number, "
            f"as {config.draws + 1}, so that each view is shown equally often"
        )
    check_network(teacher, document, url, samples)
    training = read_teacher_training(document, url)
    coupling = NfmCoupling(
        kind="nfm",
        draws=config.draws,
        eta=training.eta,
        precision=config.precision,
        z_dtype="float16" if config.z_dtype == "int8" else config.z_dtype,
        z_scale_sha256=None,
        noise=NoiseSpec(law=NOISE_LAW, seed=config.seed, dtype=config.noise_dtype, stored=config.noise == "stored"),
        teacher=NetworkSpec(
            architecture=document["architecture"],
            sha256=weights_sha256(teacher.state_dict()),
            training={
                "config": training.config,
                "images": training.images,
                "val_nll": training.val_nll,
            },
        ),
        source=samples.dataset.id,
    )
    return source.model_copy(update={"kind": "couplings", "layout": config.layout, "coupling": coupling})


class UnitEncoder:
    """Holds a teacher, and encodes units of `samples` into the store at `out`, which was started with `spec`.

    `encode` may be called from several threads. With two, the teacher always has work: while it encodes one unit, the
    next one is read and its noise is drawn, and the one before is written. `threads` is the number of CPU cores for
    noise. Raises StageError if samples or teacher are not those of the spec, or if the device cannot do its precision;
    RuntimeError if this node has no usable GPU, since another one may have.
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
        coupling = self.writer.spec.nfm
        self.coupling = coupling
        if self.samples.dataset.id != coupling.source:
            raise StageError(
                f"{samples}: got other samples on this node than on the driver; give all nodes the same store"
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("no GPU is usable in this worker")
        self.device = torch.device(device)
        if coupling.precision == "tf32" and device == "cpu":
            raise StageError("got encode.precision tf32, which only GPUs have, and a worker without one; use fp32")
        torch.backends.cuda.matmul.allow_tf32 = coupling.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = coupling.precision == "tf32"
        network, _ = load_teacher(teacher)
        if weights_sha256(network.state_dict()) != coupling.teacher.sha256:
            raise StageError(
                f"{teacher}: got another teacher on this node than on the driver; give all nodes the same file"
            )
        self.batch_rows = min(batch_rows(network.config, self.device.type), self.writer.spec.block_rows)
        self.teacher = network.to(self.device)
        self.threads = threads
        if device == "cuda":
            self._compile()
        self.teacher_lock = Lock()  # held by the unit that the teacher encodes
        self.pairs_done: dict[Unit, int] = {}  # so far, of the units that are being encoded
        self.prefetch_pool = ThreadPoolExecutor(2, "nfm-prefetch")  # prepares the input of the next draw
        self.noise_pool = ThreadPoolExecutor(threads, "nfm-noise")  # draws parts of the noise of one draw
        self.write_pool = ThreadPoolExecutor(MAX_PENDING_WRITES, "nfm-write")

    def _compile(self) -> None:
        """Compile the teacher for a GPU, and run it once, so that no unit waits for it.

        It is compiled layer by layer, as all layers are the same code. The choice of kernels is deterministic: not by
        timing, which may choose others on another node.
        """
        for block in self.teacher.blocks:
            assert isinstance(block, FlowBlock)
            for layer in block.attn_blocks:
                layer.compile(options={"deterministic": True})
        x = torch.zeros(self.batch_rows, *self.writer.spec.shape)
        self.forward(x, torch.zeros(self.batch_rows, dtype=torch.int64, device=self.device)).cpu()

    def encode(self, unit: Unit) -> EncodedUnit:
        """Encode, write and commit one unit: z = f(x + η·ε′, c), with x in the view of the draw, and ε′ rounded to its
        stored dtype before the teacher sees it. A unit that is committed already is left as it is."""
        spec = self.writer.spec
        images = spec.rows_of(unit.block)
        if self.writer.root.exists(unit.commit_file):
            return EncodedUnit(images, 0, 0.0)
        label = self.samples.column("label", unit.block)
        x = [to_float(self.samples.x_in(unit.block, view), spec.x) for view in spec.views]
        y = torch.tensor(label).to(self.device)
        unit_writer = self.writer.unit_writer(unit, label)
        names = self.samples.image_names_of(unit.block) if unit.has_base else None
        stored_x = {column: self.samples.column(column, unit.block) for column in spec.image_columns}
        image_write = self.write_pool.submit(unit_writer.write_base, stored_x, names)

        def prepare_input(draw: int) -> Future[tuple[NDArray[Any], Tensor]]:
            return self.prefetch_pool.submit(self.add_noise, unit.block, draw, x[draw % len(x)])

        next_input = prepare_input(unit.first)
        draw_writes: list[Future[list[tuple[int, int]]]] = []
        with self.teacher_lock:
            self.pairs_done[unit] = 0
            started_at = time.monotonic()
            for draw in unit.draws:
                noise, noisy = next_input.result()
                if draw + 1 < unit.stop:
                    next_input = prepare_input(draw + 1)
                z = self.forward(noisy, y, unit)
                if len(draw_writes) >= MAX_PENDING_WRITES:
                    draw_writes[-MAX_PENDING_WRITES].result()  # waits: z of every pending write takes memory
                stored_noise = noise if self.coupling.noise.stored else None
                draw_writes.append(self.write_pool.submit(write_draw, unit_writer, draw, z, stored_noise))
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.monotonic() - started_at
        image_write.result()
        bad = tuple(pair for draw_write in draw_writes for pair in draw_write.result())
        if not bad:
            unit_writer.commit(seconds, device_name(self.device))
        del self.pairs_done[unit]
        return EncodedUnit(images, images * len(unit.draws), seconds, bad)

    def add_noise(self, block: int, draw: int, x: Tensor) -> tuple[NDArray[Any], Tensor]:
        """ε′ of a draw as it is stored, and x + η·ε′ in float32; x and both are (rows, C, H, W).

        They are computed on the CPU, so that they have the same bits for all devices of the teacher.
        """
        spec = self.writer.spec
        noise = self.coupling.noise

        def draw_part(index: NDArray[np.int64]) -> NDArray[np.float32]:
            return standard_normal(noise.seed, index, draw, spec.shape)

        parts = list(self.noise_pool.map(draw_part, np.array_split(spec.indices(block), self.threads)))
        stored_noise = torch.from_numpy(np.concatenate(parts)).to(getattr(torch, noise.dtype))
        noisy = x + self.coupling.eta * stored_noise.float()
        if self.device.type == "cuda":
            noisy = noisy.pin_memory()
        return stored_noise.numpy(), noisy

    @torch.no_grad()
    def forward(self, noisy: Tensor, y: Tensor, unit: Unit | None = None) -> Tensor:
        """z, float32 on the device, of noisy images and labels y (rows,); noisy and z are (rows, C, H, W).

        All batches have one shape, the last one padded, so that all rows of a block pass through the same kernels. The
        rows of each batch are counted in `pairs_done` of `unit`.
        """
        is_bf16 = self.coupling.precision == "bf16"
        z = []
        with torch.autocast(self.device.type, torch.bfloat16) if is_bf16 else nullcontext():
            for noisy_batch, y_batch in zip(noisy.split(self.batch_rows), y.split(self.batch_rows), strict=True):
                rows = len(noisy_batch)
                padding = self.batch_rows - rows
                noisy_batch = noisy_batch.to(self.device, non_blocking=True)
                padded = F.pad(noisy_batch, (0, 0, 0, 0, 0, 0, 0, padding))  # (batch_rows, C, H, W)
                z.append(self.teacher(padded, F.pad(y_batch, (0, padding))).z[:rows])
                if unit is not None:
                    self.pairs_done[unit] += rows  # a GPU may not have finished the last of them
        return torch.cat(z).float()

    def find_faults(self, unit: Unit) -> list[str]:
        """What is wrong with the files of a committed unit, in words; it reads all of them."""
        return self.writer.find_faults(unit)

    def measure_speed(self, seconds: float) -> Speed:
        """The median speed of the teacher on images of the first block, measured for about so many seconds, after two
        passes to warm up."""
        x = to_float(self.samples.column("x", 0)[: self.batch_rows], self.samples.spec.x)
        y = torch.tensor(self.samples.column("label", 0)[: self.batch_rows]).to(self.device)
        times: list[float] = []
        for _ in range(2):
            self.forward(x, y).cpu()
        while sum(times) < seconds or len(times) < 3:
            started_at = time.monotonic()
            self.forward(x, y).cpu()
            times.append(time.monotonic() - started_at)
        return Speed(len(x) / float(np.median(times)), device_name(self.device))


def write_draw(unit_writer: UnitWriter, draw: int, z: Tensor, noise: NDArray[Any] | None) -> list[tuple[int, int]]:
    """Write one draw of a unit; returns the (image, draw) pairs whose z is not finite, of which nothing is written."""
    try:
        unit_writer.write_draw(draw, z.cpu().numpy(), noise)
    except NonFiniteError as error:
        return [(image, draw) for image in error.images]
    return []
