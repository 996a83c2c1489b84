"""Stores of every kind that the schema holds, of known values, and what the values stand for, computed in the most
obvious way."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nfm.storage_specs.format.codecs import FloatDtype, ZDtype
from nfm.storage_specs.format.image_names import ImageName
from nfm.storage_specs.format.noise import standard_normal
from nfm.storage_specs.format.schema import (
    DecoderSpec,
    ImageView,
    LatentSpec,
    LayoutName,
    NetworkSpec,
    NfmCoupling,
    NoiseDtype,
    NoiseSpec,
    PixelSpec,
    Spec,
)
from nfm.storage_specs.reading.order import Mixture, choose_epoch_draws, make_epoch_order
from nfm.storage_specs.storage.files import sha256
from nfm.storage_specs.storage.npy import npy_bytes
from nfm.storage_specs.writing.units import Unit
from nfm.storage_specs.writing.writer import StoreWriter

NOISE_SEED = 7
CLASS_NAMES = ("ant", "bee", "cat")
PLAIN: tuple[ImageView, ...] = ("plain",)
BOTH: tuple[ImageView, ...] = ("plain", "mirrored")


@dataclass(frozen=True)
class Values:
    """What a store holds, before it was written: N rows, K draws."""

    x: NDArray[Any]  # (N, C, H, W) in the stored dtype
    x_mirrored: NDArray[Any] | None  # as x: the mirrored view of latents
    label: NDArray[np.int64]  # (N,), -1 without classes
    names: list[ImageName] | None  # (N,)
    z: NDArray[np.float32] | None  # (K, N, C, H, W), from the teacher
    noise: NDArray[Any] | None  # (K, N, C, H, W), as the teacher saw it
    z_scale: NDArray[np.float32] | None  # (C, H, W), of int8


@dataclass(frozen=True)
class Kind:
    """A kind of store."""

    z: ZDtype | None = None  # None: a store of samples
    stored: bool = False  # whether the noise is stored
    noise: NoiseDtype = "float16"
    draws: int = 2
    x: FloatDtype | None = None  # None: uint8 pixels
    views: tuple[ImageView, ...] = PLAIN
    classes: int = 3
    shape: tuple[int, int, int] = (3, 4, 4)
    names: bool = False
    rows: int = 11
    block_rows: int = 4
    seed: int = 10

    def spec(self, layout: LayoutName) -> Spec:
        """The spec of such a store."""
        return Spec(
            kind="samples" if self.z is None else "couplings",
            layout=layout,
            rows=self.rows,
            block_rows=self.block_rows,
            shape=self.shape,
            x=PixelSpec(dtype="uint8") if self.x is None else _latent_spec(self.x),
            views=list(self.views),
            num_classes=self.classes,
            class_names=[f"{CLASS_NAMES[i % 3]}{i // 3 or ''}" for i in range(self.classes)],
            names=self.names,
            preprocessing={"resize": "PIL box"},
            coupling=None if self.z is None else self._coupling(self.z),
        )

    def _coupling(self, z_dtype: ZDtype) -> NfmCoupling:
        scale = self.values().z_scale
        return NfmCoupling(
            kind="nfm",
            draws=self.draws,
            eta=0.25,
            precision="fp32",
            z_dtype=z_dtype,
            z_scale_sha256=None if scale is None else sha256(npy_bytes(scale)),
            noise=NoiseSpec(law="philox-as241-v1", seed=NOISE_SEED, dtype=self.noise, stored=self.stored),
            teacher=NetworkSpec(architecture={"name": "TarFlow"}, sha256="ab" * 32, training={"images": 1000}),
            source="cd" * 32,
        )

    @cache  # noqa: B019  (kinds are few and small)
    def values(self) -> Values:
        """The values of such a store, which depend on nothing else. One z lies beyond what int8 holds."""
        rng = np.random.default_rng(self.seed)
        shape = (self.rows, *self.shape)
        x, x_mirrored = rng.integers(0, 256, shape, dtype=np.uint8), None
        if self.x is not None:
            # Latents of the mirrored image are not mirrored latents, so both are random here.
            x, mirrored = (stored_float(rng.standard_normal(shape).astype(np.float32) * 5, self.x) for _ in range(2))
            x_mirrored = mirrored if self.views == BOTH else None
        label = rng.integers(0, self.classes, self.rows) if self.classes else np.full(self.rows, -1)
        names = [ImageName(f"{'ä' * (i % 3)}/{i}.png", hashlib.sha256(b"%d" % i).hexdigest()) for i in range(self.rows)]
        z = noise = z_scale = None
        if self.z is not None:
            z = rng.standard_normal((self.draws, *shape)).astype(np.float32)
            z *= rng.uniform(0.5, 2, self.shape).astype(np.float32)
            z[-1, -1, 0, -1, -1] = 40
            index = np.arange(self.rows)
            of_draws = [standard_normal(NOISE_SEED, index, draw, self.shape) for draw in range(self.draws)]
            noise = np.stack(of_draws).astype(self.noise)
            if self.z == "int8":
                z_scale = rng.uniform(0.03, 0.05, self.shape).astype(np.float32)
        return Values(x, x_mirrored, label, names if self.names else None, z, noise, z_scale)

    def write(self, url: str, layout: LayoutName) -> StoreWriter:
        """Write such a store, or what is missing of it."""
        spec, values = self.spec(layout), self.values()
        writer = StoreWriter(url, spec)
        writer.initialize(values.z_scale)
        for block in sorted({unit.block for unit in writer.list_missing_units()}):
            write_block(writer, values, block)
        writer.finalize()
        return writer


def _latent_spec(dtype: FloatDtype) -> LatentSpec:
    scale, shift = {"float16": (0.18215, 0.0), "bfloat16": (0.3611, 0.1159), "float32": (1.5305, -0.0609)}[dtype]
    decoder = DecoderSpec(name="AutoencoderKL", architecture={"latent_channels": 4}, sha256="ef" * 32)
    return LatentSpec(dtype=dtype, scale=scale, shift=shift, decoder=decoder)


def write_block(writer: StoreWriter, values: Values, block: int) -> None:
    """Write a block of known values with all its draws."""
    rows = rows_of(writer.spec, block)
    z, noise = values.z, values.noise if "noise" in writer.spec.draw_columns else None
    writer.write_block(
        block,
        base_columns(values, rows),
        None if z is None else z[:, rows],
        None if noise is None else noise[:, rows],
        None if values.names is None else values.names[rows],
    )


def write_draws(writer: StoreWriter, values: Values, unit: Unit) -> None:
    """Write the draws of a unit of known values, with x if they are the first, or if there are none."""
    rows = rows_of(writer.spec, unit.block)
    unit_writer = writer.unit_writer(unit, values.label[rows])
    unit_writer.write_base(base_columns(values, rows), None if values.names is None else values.names[rows])
    for draw in unit.draws:
        assert values.z is not None and values.noise is not None
        noise = values.noise[draw, rows] if "noise" in writer.spec.draw_columns else None
        unit_writer.write_draw(draw, values.z[draw, rows], noise)
    unit_writer.commit(0.5, "CPU")


def base_columns(values: Values, rows: slice) -> dict[str, NDArray[Any]]:
    """The columns without draws of some rows, as the writer takes them."""
    columns = {"x": values.x[rows], "label": values.label[rows]}
    return columns if values.x_mirrored is None else columns | {"x_mirrored": values.x_mirrored[rows]}


def rows_of(spec: Spec, block: int) -> slice:
    """The rows of a block."""
    return slice(block * spec.block_rows, min((block + 1) * spec.block_rows, spec.rows))


KINDS = {
    "samples": Kind(),
    "samples-names": Kind(names=True),
    "samples-views": Kind(views=BOTH, shape=(3, 4, 6)),
    "samples-unlabelled": Kind(classes=0, shape=(1, 2, 3), names=True),
    "samples-float16": Kind(x="float16", shape=(4, 4, 4)),
    "samples-bfloat16-unlabelled": Kind(x="bfloat16", shape=(4, 2, 3), classes=0),
    "samples-float32-views": Kind(x="float32", shape=(5, 3, 2), views=BOTH, names=True),
    "pairs-float32": Kind(z="float32", noise="float32", shape=(1, 1, 1), classes=1, draws=1),
    "pairs-float16-stored": Kind(z="float16", stored=True),
    "pairs-bfloat16-stored": Kind(z="bfloat16", stored=True, noise="float32", names=True),
    "pairs-int8": Kind(z="int8", classes=40),
    "pairs-views-stored": Kind(z="float16", stored=True, views=BOTH, draws=4, shape=(3, 4, 6)),
    "pairs-views-int8": Kind(z="int8", views=BOTH, shape=(7, 3, 5), names=True),
    "pairs-unlabelled": Kind(z="float32", classes=0, shape=(3, 2, 5)),
    "pairs-latents": Kind(z="bfloat16", x="bfloat16", shape=(4, 4, 4), draws=3),
    "pairs-latents-views": Kind(z="float16", x="float16", stored=True, views=BOTH, shape=(4, 4, 4), names=True),
    "pairs-latents-views-unlabelled": Kind(z="int8", x="float32", views=BOTH, draws=4, classes=0, shape=(2, 5, 3)),
}


def all_kinds() -> dict[str, Kind]:
    """Every combination of dtypes, views, labels and stored noise; half of them with names."""
    kinds: dict[str, Kind] = {}
    z_dtypes: tuple[ZDtype | None, ...] = (None, "float32", "float16", "bfloat16", "int8")
    x_dtypes: tuple[FloatDtype | None, ...] = (None, "float32", "float16", "bfloat16")
    for z, x, views, classes, stored in product(z_dtypes, x_dtypes, (PLAIN, BOTH), (0, 3), (False, True)):
        if z is None and stored:
            continue
        words = (z or "samples", x or "pixels", "-".join(views), f"{classes}-classes", *(["stored"] if stored else []))
        names = (views == BOTH) != (classes == 0)
        kinds["-".join(words)] = Kind(
            z, stored, x=x, views=views, classes=classes, names=names, shape=(2, 3, 4), rows=7
        )
    return kinds


def stored_float(values: NDArray[np.float32], dtype: FloatDtype) -> NDArray[Any]:
    """float32 values in a dtype; bfloat16 as uint16."""
    if dtype == "bfloat16":
        bits: NDArray[Any] = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
        return bits
    return values.astype(dtype)


def as_float(stored: NDArray[Any]) -> NDArray[np.float32]:
    """The float32 values of stored floats, of which uint16 are bfloat16."""
    if stored.dtype == np.uint16:
        values: NDArray[np.float32] = torch.from_numpy(stored.copy()).view(torch.bfloat16).float().numpy()
        return values
    return stored.astype(np.float32)


def stored_z(spec: Spec, values: Values) -> NDArray[Any]:
    """z as the files of a store hold it, (K, N, C, H, W)."""
    assert values.z is not None
    dtype = spec.nfm.z_dtype
    if dtype == "int8":
        assert values.z_scale is not None
        return np.clip(np.round(values.z / values.z_scale), -127, 127).astype(np.int8)
    return stored_float(values.z, dtype)


def read_z(spec: Spec, values: Values) -> NDArray[np.float32]:
    """z as readers get it, (K, N, C, H, W)."""
    stored = stored_z(spec, values)
    if stored.dtype == np.int8:
        assert values.z_scale is not None
        return stored.astype(np.float32) * values.z_scale
    return as_float(stored)


def stored_x(values: Values, view: ImageView) -> NDArray[Any]:
    """x in a view, (N, C, H, W) in the stored dtype."""
    if view == "plain":
        return values.x
    return values.x[..., ::-1] if values.x_mirrored is None else values.x_mirrored


def scaled_x(spec: Spec, stored: NDArray[Any]) -> NDArray[np.float32]:
    """The x that stored values stand for."""
    if isinstance(spec.x, PixelSpec):
        return stored.astype(np.float32) / np.float32(127.5) - np.float32(1)
    return (as_float(stored) - np.float32(spec.x.shift)) * np.float32(spec.x.scale)


@dataclass(frozen=True)
class Sample:
    """One sample of a stream."""

    x: NDArray[Any]  # (C, H, W)
    z: NDArray[Any] | None
    label: int
    index: int
    draw: int
    source: int


@dataclass(frozen=True)
class SlowReader:
    """The samples of a stream over a store, one at a time."""

    spec: Spec
    values: Values
    sigma_f: NDArray[np.float32] | None
    seed: int
    pairs: bool
    stored: bool
    window_blocks: int | None

    @cached_property
    def _z(self) -> NDArray[Any]:
        """z of all rows and draws, (K, N, C, H, W)."""
        if self.stored:
            return stored_z(self.spec, self.values)
        assert self.sigma_f is not None
        return read_z(self.spec, self.values) / self.sigma_f

    def sample(self, number: int, source: int = 0) -> Sample:
        """The sample with this number."""
        spec = self.spec
        epoch, position = divmod(number, spec.rows)
        order = make_epoch_order(spec.rows, spec.block_rows, self.seed, epoch, self.window_blocks)
        index = int(order.rows[position])
        cycle = spec.num_draws if self.pairs else len(spec.views)
        turn = int(choose_epoch_draws(spec.num_blocks, cycle, self.seed, epoch)[index // spec.block_rows])
        x, z = stored_x(self.values, spec.views[turn % len(spec.views)])[index], None
        if not self.stored:
            x = scaled_x(spec, x)
        if self.pairs:
            z = self._z[turn, index]
        return Sample(x, z, int(self.values.label[index]), index, turn if self.pairs else -1, source)


def mixed_samples(readers: list[SlowReader], weights: list[float], seed: int, count: int) -> Iterator[Sample]:
    """The first samples of a mixture of stores. The readers have the seeds that `derive_source_seed` gives."""
    next_numbers = [0] * len(readers)
    for source in Mixture(weights, seed).choose_sources(0, count).tolist():
        yield readers[source].sample(next_numbers[source], source)
        next_numbers[source] += 1
