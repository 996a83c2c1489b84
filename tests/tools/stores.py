"""Stores for tests: small ones of known values, their bytes, and ways to damage them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nfm.storage_specs.format.schema import LayoutName, PixelSpec, Spec

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
    """The files without the cost, and without the commit records, which hold times."""
    return {name: data for name, data in files.items() if not re.fullmatch(r"commits/\d+.*|cost\.json", name)}


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


def ignore_progress(_done: int) -> None:
    """A callback for those who want no progress."""
