"""encode: sample store + teacher → coupling store. This file encodes one block; pipeline/encode_job.py spreads the
blocks over the machines of a Ray cluster."""

import time
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from tqdm import tqdm

from models.tarflow import TarFlow
from stages.checkpoint import load_network, weights_sha256
from stages.section import Section, StageError
from storage_specs.codecs import ZDtype, decode, encode, int8_scale
from storage_specs.errors import StoreError
from storage_specs.files import sha256
from storage_specs.noise import NOISE_LAW, standard_normal
from storage_specs.pixels import to_float
from storage_specs.schema import Commit, CouplingSpec, LayoutName, NoiseDtype, NoiseSpec, Spec, TeacherSpec
from storage_specs.store import Store
from storage_specs.writer import StoreWriter, begun, npy

Positive = Annotated[int, Field(ge=1)]
# Of z encoded again: float32 on another machine moves it by 1e-5 σ_f, which can turn the rounding of a codec over.
REENCODE_TOLERANCE = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 5e-2, "int8": 8e-2}
CALIBRATION_ROWS = 256  # images whose z sets the scale of int8


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
    batch_size: Positive = 256
    workers: Positive | None = None  # None: one for each GPU of the cluster, else one for each cpus_per_worker
    cpus_per_worker: Positive = 1


def load_teacher(url: str) -> tuple[TarFlow, dict[str, Any]]:
    network, document = load_network(url, "TarFlow")
    assert isinstance(network, TarFlow)
    return network, document


def begin(config: EncodeConfig, samples: Store, teacher: str, out: str) -> StoreWriter:
    """Claim `out` for the couplings of `samples` and the teacher at a URL, or continue there. Raises StageError where
    teacher and samples do not fit each other, StoreError where `out` holds another store."""
    network, document = load_teacher(teacher)
    spec, scale = coupling_spec(config, samples, network, document, teacher), None
    if config.z_dtype == "int8":
        there = begun(out)
        if there is not None and there.coupling is not None and there.coupling.z_scale_sha256:
            digest = there.coupling.z_scale_sha256  # what was begun keeps its scale, whatever this machine rounds to
        else:
            assert spec.coupling is not None
            scale = calibrate(samples, network, spec.coupling.eta, spec.coupling.noise)
            digest = sha256(npy(scale))
        spec = Spec.model_validate(_with_scale(spec, digest), strict=False)
    writer = StoreWriter(out, spec)
    writer.begin(scale)
    return writer


def _with_scale(spec: Spec, digest: str) -> dict[str, Any]:
    document = spec.model_dump(mode="json")
    document["coupling"] |= {"z_dtype": "int8", "z_scale_sha256": digest}
    return document


@torch.no_grad()
def calibrate(samples: Store, teacher: TarFlow, eta: float, noise: NoiseSpec) -> np.ndarray[Any, np.dtype[np.float32]]:
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


class BlockEncoder:
    """Holds a teacher and encodes blocks, one call each, into a store that was begun with `spec`."""

    def __init__(self, samples: str, teacher: str, out: str, spec: dict[str, Any], batch_size: int) -> None:
        self.samples = Store(samples, kind="samples")
        self.writer = StoreWriter(out, Spec.model_validate(spec, strict=False))
        self.batch_size = batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cuda.matmul.allow_tf32 = False  # fp32 throughout: bf16 moves z by more than fp16 storage does
        torch.backends.cudnn.allow_tf32 = False
        network, _ = load_teacher(teacher)
        coupling = self.writer.spec.coupling
        assert coupling is not None and weights_sha256(network.state_dict()) == coupling.teacher.sha256
        self.teacher, self.coupling = network.to(self.device), coupling

    @torch.no_grad()
    def encode(self, block: int) -> Commit:
        """All draws of one block: z = f(x + η·ε′, c), with ε′ rounded to its stored dtype before the teacher sees
        it.
        """
        start = time.monotonic()
        spec, coupling = self.writer.spec, self.coupling
        index = spec.indices(block)
        base = {"x": self.samples.column("x", block), "label": self.samples.column("label", block)}
        x = to_float(base["x"])
        y = torch.from_numpy(base["label"])
        noise = np.empty((spec.draws, len(index), *spec.shape), dtype=coupling.noise.dtype)
        z = np.empty((spec.draws, len(index), *spec.shape), dtype=np.float32)
        for draw in range(spec.draws):
            noise[draw] = standard_normal(coupling.noise.seed, index, draw, spec.shape)
            noisy = x + coupling.eta * torch.from_numpy(noise[draw]).float()
            for rows in torch.arange(len(index)).split(self.batch_size):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                encoded = self.teacher(noisy[part].to(self.device), y[part].to(self.device))
                z[draw, part] = encoded.z.cpu().numpy()
        kept = noise if coupling.noise.stored else None
        return self.writer.write_block(block, base, z, kept, seconds=time.monotonic() - start)


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
        allowed = REENCODE_TOLERANCE[coupling.z_dtype]
        if not difference <= allowed:
            raise StoreError(
                f"{store.url}: z of image {image}, draw {draw}, is {difference:.2e} σ_f away from what {teacher} "
                "gives, "
                f"expected at most {allowed}; the store is not what its spec says"
            )
        worst = max(worst, difference)
    return worst
