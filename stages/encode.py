"""encode: sample store + teacher → coupling store. This file encodes one block; pipeline/encode_job.py spreads the
blocks over the machines of a Ray cluster."""

import time
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from models.tarflow import TarFlow
from stages.checkpoint import load_network, weights_sha256
from stages.section import Section, StageError
from storage_specs.noise import NOISE_LAW, standard_normal
from storage_specs.pixels import to_float
from storage_specs.schema import Commit, CouplingSpec, FloatDtype, LayoutName, NoiseSpec, Spec, TeacherSpec
from storage_specs.store import Store
from storage_specs.writer import StoreWriter

Positive = Annotated[int, Field(ge=1)]


class EncodeConfig(Section):
    """η is the teacher's own; what remains to choose is how many draws, how they are stored, and on what they are
    made.
    """

    draws: Annotated[int, Field(ge=1, le=1 << 16)]
    layout: LayoutName = "webdataset"
    z_dtype: FloatDtype = "float16"
    noise_dtype: FloatDtype = "float16"
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    batch_size: Positive = 256
    workers: Positive | None = None  # None: one for each GPU of the cluster, else one for each cpus_per_worker
    cpus_per_worker: Positive = 1


def load_teacher(url: str) -> tuple[TarFlow, dict[str, Any]]:
    network, document = load_network(url, "TarFlow")
    assert isinstance(network, TarFlow)
    return network, document


def coupling_spec(config: EncodeConfig, samples: Store, teacher: TarFlow, document: dict[str, Any], url: str) -> Spec:
    """The spec of the store to write. Raises StageError where teacher and samples do not fit each other."""
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
        z_dtype=config.z_dtype,
        noise=NoiseSpec(law=NOISE_LAW, seed=config.seed, dtype=config.noise_dtype),
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
        noise = np.empty((spec.draws, len(index), *spec.shape), dtype=spec.dtype("noise"))
        z = np.empty((spec.draws, len(index), *spec.shape), dtype=spec.dtype("z"))
        for draw in range(spec.draws):
            noise[draw] = standard_normal(coupling.noise.seed, index, draw, spec.shape)
            noisy = x + coupling.eta * torch.from_numpy(noise[draw]).float()
            for rows in torch.arange(len(index)).split(self.batch_size):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                encoded = self.teacher(noisy[part].to(self.device), y[part].to(self.device))
                z[draw, part] = encoded.z.cpu().numpy()
        return self.writer.write_block(block, base, {"z": z, "noise": noise}, seconds=time.monotonic() - start)
