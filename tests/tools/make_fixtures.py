"""Writes frozen stores of the schema of today: `python -m tests.tools.make_fixtures FOLDER`.

It is run by hand, once for each schema, and what it wrote is never changed: tests/test_formats.py reads it with every
later nfm.

Each store is a tar, <layout>-<name>.tar.gz; values.npz holds what was written into all of them. Equal inputs give equal
bytes.
"""

import gzip
import io
import sys
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nfm.storage_specs.format.attribution import Attribution
from nfm.storage_specs.format.commits import Cost
from nfm.storage_specs.format.image_names import ImageName
from nfm.storage_specs.format.schema import LayoutName, Spec
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.writing.publish import annotate_store, tag_version
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.kinds import BOTH, Kind, Values, write_draws
from tests.tools.stores import LAYOUT_NAMES

SMALL = Kind(shape=(3, 2, 3), rows=7, block_rows=3)
FIXTURES = {
    "samples-names": replace(SMALL, names=True),
    "samples-views": replace(SMALL, views=BOTH, classes=0, shape=(3, 2, 4)),
    "float16-stored": replace(SMALL, z="float16", stored=True, shape=(3, 2, 2)),
    "int8-derived": replace(SMALL, z="int8"),
    "bfloat16-derived": replace(SMALL, z="bfloat16", noise="float32"),
    "pixels-views": replace(SMALL, z="float16", views=BOTH, draws=4, shape=(1, 3, 4)),
    "latents-views": replace(SMALL, z="float16", x="bfloat16", stored=True, views=BOTH, shape=(4, 2, 2), names=True),
    "unlabelled": replace(SMALL, z="float32", classes=0, shape=(2, 3, 2)),
    "versions": replace(SMALL, z="float16", draws=4, shape=(3, 2, 2)),
}
VERSIONS = "versions"  # has three: two draws; four; attribution. The tag is of the first
FIRST_DRAWS, TAG = 2, "first"
ATTRIBUTION = Attribution(
    licence="CC-BY-4.0",
    citation="Doe, J. (2026). Ants, bees & cats. @inproceedings{doe}",
    creator="Jane Doe",
    source_url="https://example.org/data?a=1&b=2",
    notes="Made for tests:\n- one\n- two",
)
COST = Cost(seconds={"CPU": 1.5, "NVIDIA H100": 0.25})


def write_store(url: str, spec: Spec, values: Values) -> None:
    """Write a store of these values, or add the draws that it lacks."""
    writer = StoreWriter(url, spec)
    writer.initialize(values.z_scale)
    for unit in writer.list_missing_units():
        write_draws(writer, values, unit)
    writer.finalize(COST if spec.coupling else None)


def write_fixture(url: str, name: str, spec: Spec, values: Values) -> None:
    """Write a store with all its versions."""
    if name == VERSIONS:
        coupling = spec.nfm.model_copy(update={"draws": FIRST_DRAWS})
        write_store(url, spec.model_copy(update={"coupling": coupling}), values)
        tag_version(Store(url), TAG)
    write_store(url, spec, values)
    if name == VERSIONS:
        annotate_store(Store(url), ATTRIBUTION)


def pack(folder: Path) -> bytes:
    """All files of a folder as a tar.gz; equal files give equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            info = tarfile.TarInfo(str(path.relative_to(folder)))
            info.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(info, file)
    return gzip.compress(buffer.getvalue(), 9, mtime=0)


def to_arrays(name: str, values: Values) -> dict[str, NDArray[Any]]:
    """The values of a fixture as arrays for values.npz."""
    arrays = {"x": values.x, "x_mirrored": values.x_mirrored, "label": values.label, "z": values.z}
    arrays |= {"noise": values.noise, "z_scale": values.z_scale}
    if values.names is not None:
        arrays |= {"names": np.array(values.names)}  # (N, 2) of text: name, sha256
    return {f"{name}/{column}": array for column, array in arrays.items() if array is not None}


def from_arrays(name: str, arrays: dict[str, NDArray[Any]]) -> Values:
    """The values of a fixture, from values.npz."""
    own = {key.removeprefix(f"{name}/"): array for key, array in arrays.items() if key.startswith(f"{name}/")}
    names = own.pop("names", None)
    columns = {column: own.get(column) for column in ("x_mirrored", "z", "noise", "z_scale")}
    return Values(
        x=own["x"],
        label=own["label"],
        names=None if names is None else [ImageName(*row) for row in names.tolist()],
        **columns,
    )


def first_draws(values: Values) -> Values:
    """The values of version 1 of the fixture with versions."""
    assert values.z is not None and values.noise is not None
    return replace(values, z=values.z[:FIRST_DRAWS], noise=values.noise[:FIRST_DRAWS])


def make_fixtures(out: Path) -> None:
    """Write all fixtures to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, NDArray[Any]] = {}
    for name, kind in FIXTURES.items():
        arrays |= to_arrays(name, kind.values())
        for layout in LAYOUT_NAMES:
            (out / f"{layout}-{name}.tar.gz").write_bytes(_packed_fixture(name, layout, kind))
    np.savez_compressed(out / "values.npz", **arrays)  # type: ignore[arg-type]  # names are none of its own parameters


def _packed_fixture(name: str, layout: LayoutName, kind: Kind) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_fixture(f"{folder}/store", name, kind.spec(layout), kind.values())
        return pack(Path(folder, "store"))


if __name__ == "__main__":
    make_fixtures(Path(sys.argv[1]))
