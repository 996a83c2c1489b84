"""names.parquet: where each image of a store comes from, one row for each: its index, a name such as its path in the
source, and the sha256 of the bytes that it was decoded from."""

import hashlib
import io
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.parquet import Limits, read_table

MAX_NAME_BYTES = 1024  # of a name as UTF-8
_ROWS_AT_ONCE = 1 << 16  # as Python objects
NAMES_SCHEMA = pa.schema([("index", pa.int64()), ("name", pa.string()), ("sha256", pa.string())])


class ImageName(NamedTuple):
    """Where an image comes from."""

    name: str
    sha256: str  # of its source bytes


def max_names_bytes(rows: int) -> int:
    """Upper bound of the size of a file of names, and of its values in memory."""
    return (1 << 16) + rows * (MAX_NAME_BYTES + 128)


def make_table(first_index: int, names: Sequence[ImageName]) -> pa.Table:
    """The table of images with consecutive indices from `first_index`."""
    indices = range(first_index, first_index + len(names))
    columns = {"index": indices, "name": [name.name for name in names], "sha256": [name.sha256 for name in names]}
    return pa.table({name: list(values) for name, values in columns.items()}, schema=NAMES_SCHEMA)


def encode_names(table: pa.Table) -> bytes:
    """A file of names. The same rows give the same bytes, also if the table was put together from parts."""
    buffer = io.BytesIO()
    pq.write_table(table.combine_chunks(), buffer, compression="zstd")
    return buffer.getvalue()


def parse_names(data: bytes | NDArray[np.uint8], first_index: int, rows: int, name: str) -> pa.Table:
    """The table in a file of the names of so many images, with consecutive indices from `first_index`.

    Raises StoreError with the file's `name` if it holds another table, or if its values would take more memory than
    names can.
    """
    expected = f"expected the names of {rows} images from index {first_index}; the file is damaged"
    table = read_table(data, NAMES_SCHEMA, Limits(rows, max_names_bytes(rows), MAX_NAME_BYTES), name)
    if table["index"].null_count or not np.array_equal(table["index"].to_numpy(), np.arange(rows) + first_index):
        raise StoreError(f"{name}: got other indices, {expected}")
    name_bytes = pc.binary_length(table["name"])
    is_valid = pc.and_(
        pc.and_(pc.greater(name_bytes, 0), pc.less_equal(name_bytes, MAX_NAME_BYTES)),
        pc.match_substring_regex(table["sha256"], "^[0-9a-f]{64}$"),
    )
    if not pc.all(pc.fill_null(is_valid, False)).as_py():
        raise StoreError(f"{name}: got a name or a sha256 that is none, {expected}")
    return table


def hash_rows(table: pa.Table) -> str:
    """The sha256 of the rows of a table of names: of a line for each row, with its sha256, a space, and its name as a
    JSON string in ASCII."""
    digest = hashlib.sha256()
    for start in range(0, table.num_rows, _ROWS_AT_ONCE):
        lines = [f"{name.sha256} {json.dumps(name.name)}\n" for name in list_names(table.slice(start, _ROWS_AT_ONCE))]
        digest.update("".join(lines).encode())
    return digest.hexdigest()


def list_names(table: pa.Table) -> list[ImageName]:
    """The rows of a table of names."""
    return [ImageName(*row) for row in zip(table["name"].to_pylist(), table["sha256"].to_pylist(), strict=True)]
