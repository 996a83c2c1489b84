"""Coupling stores of random numbers, of any shape, layout and dtype."""

from collections.abc import Sequence

import numpy as np

from nfm.storage_specs.format.codecs import ZDtype
from nfm.storage_specs.format.schema import LayoutName, NetworkSpec, NfmCoupling, NoiseSpec, PixelSpec, Spec
from nfm.storage_specs.storage.files import sha256
from nfm.storage_specs.storage.npy import npy_bytes
from nfm.storage_specs.writing.writer import StoreWriter

BLOCK_ROWS = 32


def random_coupling_spec(
    layout: LayoutName,
    shape: tuple[int, int, int],
    rows: int,
    draws: int,
    z_dtype: ZDtype = "float16",
    z_scale_sha256: str | None = None,
    block_rows: int = BLOCK_ROWS,
    class_names: Sequence[str] = ("a", "b", "c"),
) -> Spec:
    """The spec of a coupling store whose noise is not stored."""
    return Spec(
        kind="couplings",
        layout=layout,
        rows=rows,
        block_rows=block_rows,
        shape=shape,
        x=PixelSpec(dtype="uint8"),
        views=["plain"],
        num_classes=len(class_names),
        class_names=list(class_names),
        names=False,
        preprocessing={},
        coupling=NfmCoupling(
            kind="nfm",
            draws=draws,
            eta=0.1,
            precision="fp32",
            z_dtype=z_dtype,
            z_scale_sha256=z_scale_sha256,
            noise=NoiseSpec(law="philox-as241-v1", seed=0, dtype="float16", stored=False),
            teacher=NetworkSpec(architecture={}, sha256="0" * 64, training={}),
            source="0" * 64,
        ),
    )


def write_random_couplings(
    url: str,
    layout: LayoutName,
    shape: tuple[int, int, int],
    rows: int,
    draws: int,
    z_dtype: ZDtype = "float16",
    seed: int = 0,
) -> None:
    """Write a store with uniform x and labels and normal z. int8 z has another scale in each dimension."""
    rng = np.random.default_rng(seed)
    z_scale = None
    z_scale_sha256 = None
    if z_dtype == "int8":
        z_scale = rng.uniform(0.03, 0.05, shape).astype("<f4")
        z_scale_sha256 = sha256(npy_bytes(z_scale))
    spec = random_coupling_spec(layout, shape, rows, draws, z_dtype, z_scale_sha256)
    writer = StoreWriter(url, spec)
    writer.initialize(z_scale)
    for block in range(spec.num_blocks):
        block_rows = spec.rows_of(block)
        x = rng.integers(0, 256, (block_rows, *shape), dtype=np.uint8)
        z = rng.standard_normal((draws, block_rows, *shape), dtype=np.float32)
        writer.write_block(block, {"x": x, "label": rng.integers(0, 3, block_rows)}, z, None)
    writer.finalize()
