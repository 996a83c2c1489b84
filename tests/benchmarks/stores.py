"""The data of the benchmarks: random arrays, and our stores of them."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nfm.storage_specs.format.layouts import LAYOUTS
from nfm.storage_specs.format.schema import LayoutName, Spec
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.documents import sealed_json
from nfm.storage_specs.storage.files import sha256
from nfm.storage_specs.writing.units import Unit, read_commit
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.random_couplings import random_coupling_spec

BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Case:
    name: str
    images: int
    shape: tuple[int, int, int]
    draws: int = 4


CASES = (Case("cifar-3x32x32", 50_000, (3, 32, 32)), Case("imagenet-3x64x64", 8_000, (3, 64, 64)))


def write_arrays(case: Case, folder: Path) -> None:
    """x.npy, z.npy, label.npy and sigma_f.npy, which the peers start from too."""
    if (folder / "sigma_f.npy").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    np.save(folder / "x.npy", rng.integers(0, 256, (case.images, *case.shape), dtype=np.uint8))
    z = np.lib.format.open_memmap(folder / "z.npy", "w+", np.float16, (case.draws, case.images, *case.shape))
    for plane in z:
        for start in range(0, case.images, 1000):
            part = plane[start : start + 1000]
            part[:] = rng.standard_normal(part.shape, dtype=np.float32)
    z.flush()
    np.save(folder / "label.npy", rng.integers(0, 10, case.images))
    np.save(folder / "sigma_f.npy", np.full(case.shape, 1.25, np.float32))


def spec_of(layout: LayoutName, rows: int, shape: tuple[int, int, int], draws: int) -> Spec:
    """The spec of a coupling store with ten classes, in blocks of BLOCK_ROWS rows."""
    class_names = [str(label) for label in range(10)]
    return random_coupling_spec(layout, shape, rows, draws, block_rows=BLOCK_ROWS, class_names=class_names)


def write_store(url: str, arrays: Path, layout: LayoutName) -> None:
    """The arrays as a store, continued where it was interrupted."""
    x, z = (np.load(arrays / f"{name}.npy", mmap_mode="r") for name in ("x", "z"))
    label = np.load(arrays / "label.npy")
    shape: tuple[int, int, int] = x.shape[1:]
    writer = StoreWriter(url, spec_of(layout, len(x), shape, len(z)))
    writer.initialize()
    if writer.is_complete():
        return
    for unit in writer.list_missing_units():
        rows = slice(unit.block * BLOCK_ROWS, (unit.block + 1) * BLOCK_ROWS)
        writing = writer.unit_writer(unit, label[rows])
        writing.write_base({"x": np.ascontiguousarray(x[rows])})
        for draw in unit.draws:
            writing.write_stored_draw(draw, np.ascontiguousarray(z[draw, rows]), None, 0.0)
        writing.commit()
    writer.finalize()


def write_repeated(url: str, source: Store, blocks: int) -> None:
    """A store of `blocks` whole blocks whose files are hard links to those of a small Zarr store, block after block: as
    many files and mappings as a store of that size has, without its bytes."""
    assert source.spec.layout == "zarr"
    spec = spec_of("zarr", blocks * BLOCK_ROWS, source.spec.shape, source.spec.num_draws)
    writer, layout = StoreWriter(url, spec), LAYOUTS["zarr"]
    writer.initialize()
    if writer.is_complete():
        return
    whole = source.spec.rows // BLOCK_ROWS
    for unit in writer.list_missing_units():
        twin = Unit(unit.block % whole, unit.first, unit.stop)
        commit = read_commit(source.root, source.spec, twin)
        files = []
        for file in commit.files:
            paths = {"z_sums": unit.z_sums_file, "z_class_sums": unit.z_class_sums_file}
            path = paths.get(file.column) or layout.file_path(file.column, unit.block, file.draw)
            changes = {"block": unit.block, "path": path}
            if file.column == "index":
                data = layout.encode_file(spec, "index", unit.block, {})
                writer.root.write(path, data)
                changes["sha256"] = sha256(data)
            else:
                link(Path(source.url) / file.path, Path(url) / path)
            files.append(file.model_copy(update=changes))
        commit = commit.model_copy(update={"lineage": spec.lineage, "block": unit.block, "files": files})
        writer.root.write(unit.commit_file, sealed_json(commit.model_dump(mode="json")))
    writer.finalize()


def link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    os.link(source, target)
