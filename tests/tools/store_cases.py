"""Stores of every kind that can be written, with random values."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nfm.storage_specs.format import codecs
from nfm.storage_specs.format.attribution import Attribution
from nfm.storage_specs.format.image_names import ImageName
from nfm.storage_specs.format.schema import (
    DecoderSpec,
    LatentSpec,
    LayoutName,
    NetworkSpec,
    NfmCoupling,
    NoiseSpec,
    PixelSpec,
    Spec,
)
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.files import sha256
from nfm.storage_specs.storage.npy import npy_bytes
from nfm.storage_specs.writing.writer import StoreWriter

SHAPE = (1, 4, 4)
ROWS, BLOCK_ROWS = 70, 32
KNOWN = Attribution(
    licence="CC-BY-4.0",
    citation="@article{a,\n  title = {x}\n}",
    creator="Jane Doe",
    source_url="https://example.org/images",
    notes="For research only.",
)


@dataclass(frozen=True)
class Case:
    """Which store to write; by default, couplings of pixels with labels, whose noise is stored."""

    layout: LayoutName = "webdataset"
    samples: bool = False
    labels: bool = True
    latents: codecs.FloatDtype | None = None
    mirrored: bool = False
    names: bool = False
    noise_stored: bool = True
    z_dtype: codecs.ZDtype = "float16"
    class_names: tuple[str, ...] = ("a", "b", "c")
    teacher: str = "tarflow"
    decoder: str = "vae"

    def spec(self, z_scale: NDArray[np.float32]) -> Spec:
        coupling = NfmCoupling(
            kind="nfm",
            draws=2,
            eta=0.1,
            precision="fp32",
            z_dtype=self.z_dtype,
            z_scale_sha256=sha256(npy_bytes(z_scale)) if self.z_dtype == "int8" else None,
            noise=NoiseSpec(law="philox-as241-v1", seed=7, dtype="float16", stored=self.noise_stored),
            teacher=NetworkSpec(architecture={"name": self.teacher}, sha256="1" * 64, training={"images": 640}),
            source="2" * 64,
        )
        decoder = DecoderSpec(name=self.decoder, architecture={}, sha256="3" * 64)
        return Spec(
            kind="samples" if self.samples else "couplings",
            layout=self.layout,
            rows=ROWS,
            block_rows=BLOCK_ROWS,
            shape=SHAPE,
            x=LatentSpec(dtype=self.latents, scale=0.5, shift=-0.25, decoder=decoder)
            if self.latents
            else PixelSpec(dtype="uint8"),
            views=["plain", "mirrored"] if self.mirrored else ["plain"],
            num_classes=len(self.class_names) if self.labels else 0,
            class_names=list(self.class_names) if self.labels else [],
            names=self.names,
            preprocessing={"resize": "none"},
            coupling=None if self.samples else coupling,
        )


def write_case(url: Path, case: Case, attribution: Attribution = Attribution()) -> Store:  # noqa: B008  (it is immutable)
    """Write the store of a case, with random values."""
    rng = np.random.default_rng(0)
    z_scale = rng.uniform(0.03, 0.05, SHAPE).astype("<f4")
    spec = case.spec(z_scale)
    writer = StoreWriter(str(url), spec)
    writer.initialize(z_scale if case.z_dtype == "int8" and not case.samples else None)
    for block in range(spec.num_blocks):
        rows = spec.rows_of(block)
        base: dict[str, Any] = {"label": spec.indices(block) % max(1, spec.num_classes)}
        if not spec.has_labels:
            base["label"] = np.full(rows, -1)
        for column in spec.image_columns:
            base[column] = rng.integers(0, 256, (rows, *SHAPE), dtype=np.uint8)
            if case.latents is not None:
                base[column] = codecs.encode_float(rng.standard_normal((rows, *SHAPE), np.float32), case.latents)
        z = noise = None
        if not case.samples:
            z = rng.standard_normal((2, rows, *SHAPE), np.float32)
            noise = rng.standard_normal((2, rows, *SHAPE), np.float32).astype("<f2") if case.noise_stored else None
        names = [ImageName(f"i{index}.png", "4" * 64) for index in spec.indices(block)] if case.names else None
        writer.write_block(block, base, z, noise, names)
    writer.finalize(inherited=attribution)  # so that any text may be in it, as in a store of others
    return Store(str(url))
