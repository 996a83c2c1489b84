"""Stores for tests: small ones of known values, their bytes, and ways to damage and to forge them."""

import io
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from nfm.storage_specs.format.image_names import hash_rows
from nfm.storage_specs.format.layouts import LAYOUTS
from nfm.storage_specs.format.schema import (
    FileRecord,
    LayoutName,
    PixelSpec,
    Spec,
    content_id,
)
from nfm.storage_specs.reading.store import sum_totals
from nfm.storage_specs.storage.documents import canonical_json
from nfm.storage_specs.storage.files import sha256

LAYOUT_NAMES: tuple[LayoutName, ...] = ("webdataset", "zarr")


def sample_spec(layout: LayoutName = "webdataset", rows: int = 70) -> Spec:
    """Of a sample store in blocks of 32 rows."""
    return Spec(
        kind="samples",
        layout=layout,
        rows=rows,
        block_rows=32,
        shape=(1, 4, 4),
        x=PixelSpec(dtype="uint8"),
        views=["plain"],
        num_classes=3,
        class_names=["a", "b", "c"],
        names=False,
        preprocessing={"resize": "none"},
    )


def block_of(spec: Spec, block: int) -> dict[str, Any]:
    """x and labels of a block, which follow from the row's index."""
    index = spec.indices(block)
    x = (index[:, None] + np.arange(spec.dim)).astype(np.uint8).reshape(-1, *spec.shape)
    return {"x": x, "label": index % spec.num_classes}


def tree(url: str) -> dict[str, bytes]:
    """All files of a local store by path."""
    root = Path(url)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def content(url: str) -> dict[str, bytes]:
    """The files of a local store that do not depend on how long it took to write."""
    return without_times(tree(url))


def without_times(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files without the cost, and without the commit records, which hold times and say what was converted."""
    return {name: data for name, data in files.items() if not re.fullmatch(r"commits/.*|cost\.json", name)}


def damage(folder: Path, path: str, change: Callable[[bytes], bytes]) -> None:
    """Write a file again with other bytes."""
    (folder / path).write_bytes(change((folder / path).read_bytes()))


def flip(offset: int) -> Callable[[bytes], bytes]:
    """A change of one bit."""

    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[offset] ^= 1
        return bytes(changed)

    return change


def edit(**changes: Any) -> Callable[[bytes], bytes]:
    """A change of values in a JSON document: `spec__rows=3` sets rows in spec."""

    def apply(data: bytes) -> bytes:
        document = json.loads(data)
        for dotted, value in changes.items():
            *path, last = dotted.split("__")
            section = document
            for part in path:
                section = section[part]
            section[last] = value
        return json.dumps(document).encode()

    return apply


def sealed_document(files: Mapping[str, Any]) -> bytes:
    """The dataset.json of a store with these files, by path, whose records, totals, hashes and id agree with them: what
    somebody writes who changed files on purpose.

    What is not bytes among the files, and a manifest whose rows no store can have, keep the hashes, totals and id that
    files["dataset.json"] has.
    """
    document = json.loads(files["dataset.json"])
    spec = Spec.model_validate_json(json.dumps(document["spec"]))
    document["records"] = LAYOUTS[spec.layout].describe_records(spec)
    documents = {name: file for name, file in document["documents"].items() if file is not None}
    for file in documents.values():
        data = files.get(file["path"])
        if isinstance(data, bytes):
            file["sha256"] = sha256(data)
    if "names" in documents:
        with suppress(pa.ArrowException, OSError, UnicodeDecodeError, KeyError, TypeError):  # else no rows to hash
            names = pq.read_table(io.BytesIO(files[documents["names"]["path"]]))
            documents["names"]["rows_sha256"] = hash_rows(names)
    derived = {name: documents[name]["sha256"] for name in ("sigma_f", "z_sums", "z_class_sums") if name in documents}
    derived |= {"names": documents["names"]["rows_sha256"]} if "names" in documents else {}
    try:
        rows = pq.read_table(io.BytesIO(files[documents["manifest"]["path"]])).to_pylist()
        records = [
            FileRecord.model_validate({field: row[field] for field in FileRecord.model_fields}, strict=True)
            for row in rows
        ]
        label_counts = [dict(row["label_counts"]) for row in rows[: spec.num_blocks]]
        document["totals"] = sum_totals(spec, records, label_counts).model_dump(mode="json")
        document["id"] = content_id(spec, records, label_counts, derived)
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValidationError, KeyError, TypeError):
        pass  # not the rows of a manifest, so no id agrees with them
    return canonical_json(document)


def reseal(folder: Path) -> None:
    """Make records, totals, hashes and id of a store with one version agree with its files."""
    data = sealed_document(tree(str(folder)))
    for path in ("dataset.json", "versions/0001.json"):
        (folder / path).write_bytes(data)


def ignore_progress(_done: int) -> None:
    """A callback for those who want no progress."""


def change_document(store: Path, **changes: Any) -> None:
    """Change dataset.json and the same document in versions/, and keep the id."""
    for path in ("dataset.json", "versions/0001.json"):
        damage(store, path, edit(**changes))
