"""Hostile stores: a sound one, pickles that leave a mark when they are run, and changes whose hashes and id agree."""

import io
import json
import os
import pickle
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nfm.storage_specs.format.image_names import ImageName
from nfm.storage_specs.format.layouts import LAYOUTS
from nfm.storage_specs.format.manifest import FILE_SCHEMA, expected_keys
from nfm.storage_specs.format.noise import standard_normal
from nfm.storage_specs.format.schema import LayoutName, Spec
from nfm.storage_specs.storage.documents import parse_json
from nfm.storage_specs.storage.files import sha256
from nfm.storage_specs.storage.npy import npy_header
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.stores import block_of, sample_spec, sealed_document, tree

VERSION = "versions/0001"
MANIFEST, SIGMA_F = f"{VERSION}/manifest.parquet", f"{VERSION}/sigma_f.npy"
DOCUMENTS = ("dataset.json", MANIFEST, SIGMA_F)  # without which no stream opens a store
SUMS = (f"{VERSION}/z_sums.npy", f"{VERSION}/z_class_sums.npy")
CARDS = ("README.md", "croissant.json", f"{VERSION}/README.md", f"{VERSION}/croissant.json")
MIB = 1 << 20
FOLDER = tempfile.TemporaryDirectory(prefix="nfm-hostile-")
Files = dict[str, Any]  # path → bytes; None: no file; int: that many zeros; or Callable[[Path], object]
# What a stream must do. "refuse": raise StoreError. "indifferent": it does not need what was changed, so it may raise
# StoreError, or give exactly the batch of the sound store. `find_faults` must find every change.
Reading = Literal["refuse", "indifferent"]
WIDE: Files = {"shape": [1, 8192, 8192]}
LONG: Files = {"rows": 48 * MIB, "block_rows": MIB}


class Case(NamedTuple):
    name: str
    reading: Reading
    blamed_files: str  # a pattern of the files of which an error names one
    changes: Files
    layout: LayoutName = "zarr"
    side: int = 4  # of the images


class Bomb:
    marker = Path(FOLDER.name, "marker")

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


BOMB = pickle.dumps(Bomb())
BOMB_NPY = npy_header(np.dtype("O"), (1,)) + pickle.dumps(np.array([Bomb()], dtype=object))


@cache
def sound_files(layout: LayoutName, side: int = 4) -> Files:
    """70 rows in blocks of 32, 32 and 6, with 2 draws."""
    noise = {"law": "philox-as241-v1", "seed": 7, "dtype": "float16", "stored": True}
    teacher = {"architecture": {"name": "none"}, "sha256": "a" * 64, "training": {"images": 1, "rate": 0.5}}
    coupling = {"draws": 2, "eta": 0.1, "z_dtype": "float16", "z_scale_sha256": None, "source": "b" * 64}
    coupling |= {"kind": "nfm", "precision": "fp32"}
    document = sample_spec(layout).model_dump() | {"kind": "couplings", "shape": (1, side, side), "names": True}
    spec = Spec.model_validate(document | {"coupling": coupling | {"noise": noise, "teacher": teacher}})
    rng, writer = np.random.default_rng(0), StoreWriter(f"{FOLDER.name}/{layout}{side}", spec)
    writer.initialize()
    for block in range(spec.num_blocks):
        z = rng.standard_normal((2, spec.rows_of(block), *spec.shape), dtype=np.float32)
        noise_of_draws = [standard_normal(7, spec.indices(block), draw, spec.shape) for draw in (0, 1)]
        names = [ImageName(f"image {index}", "c" * 64) for index in spec.indices(block)]
        writer.write_block(block, block_of(spec, block), z, np.stack(noise_of_draws).astype(np.float16), names)
    writer.finalize()
    return {path: data for path, data in tree(writer.root.url).items() if not re.match("commits|sums|cost", path)}


def spec_of(document: Any) -> Spec:
    return parse_json(Spec, json.dumps(document["spec"]).encode(), "spec")


def parquet(content: list[dict[str, Any]] | pa.Table, **options: Any) -> bytes:
    table = pa.Table.from_pylist(content, FILE_SCHEMA) if isinstance(content, list) else content
    pq.write_table(table, buffer := io.BytesIO(), compression="zstd", **options)
    return buffer.getvalue()


def rows_of(files: Files) -> list[dict[str, Any]]:
    return list(pq.read_table(io.BytesIO(files[MANIFEST])).to_pylist())


def sealed(layout: LayoutName, changes: Files, side: int = 4, /, **spec_changes: Any) -> Files:
    """The changes to a sound store, and a manifest (unless they have one) and the documents of its version, whose
    totals, hashes and id agree with them. `spec_changes` are fields of the spec with other values."""
    original = sound_files(layout, side)
    files = original | changes
    original_rows = {row["path"]: row for row in rows_of(original)}
    document = json.loads(files["dataset.json"])
    coupling = document["spec"]["coupling"]
    for name, value in spec_changes.items():
        next(part for part in (document["spec"], coupling, coupling["noise"]) if name in part)[name] = value
    spec = spec_of(document)
    layout_of_spec = LAYOUTS[spec.layout]
    rows = []
    for key in expected_keys(spec, layout_of_spec):
        path = layout_of_spec.file_path(key.column, key.block, key.draw)
        count = spec.rows_of(key.block)
        unknown: dict[str, Any] = {
            "view": "plain",
            "label_counts": [],
            "squared_error": 0.0 if key.column == "z" else None,
        }
        row = original_rows.get(path, unknown)
        if key.column == "x" and spec_changes:
            row |= {"label_counts": [(0, count)]}
        row |= {"column": key.column, "draw": key.draw, "block": key.block, "rows": count, "path": path}
        row |= {"first_index": key.block * spec.block_rows, "bytes": layout_of_spec.file_size(spec, key.column, count)}
        rows.append(row | {"sha256": sha256(files.get(path, b""))})
    changes = {MANIFEST: parquet(rows)} | changes
    data = sealed_document(files | changes | {"dataset.json": json.dumps(document).encode()})
    return changes | {"dataset.json": data, f"{VERSION}.json": data}


def patch(old: bytes, offset: int, data: bytes) -> bytes:
    return old[:offset] + data + old[offset + len(data) :]


def write_case(case: Case, root: Path) -> None:
    """Write the store of a case."""
    for path, content in (sound_files(case.layout, case.side) | case.changes).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (root / path).write_bytes(content)
        elif isinstance(content, int):
            (root / path).touch()
            os.truncate(root / path, content)
        elif content is not None:
            content(root / path)


REPLACEMENTS: Files = {"gone": None, "a folder": Path.mkdir, "a loop": lambda to: to.symlink_to(to.name)}
REPLACEMENTS |= {"empty": b"", "a pickle": BOMB}
