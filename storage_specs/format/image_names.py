"""names.parquet: where each image of a store comes from, one row for each: its index, a name such as its path in the
source, and the sha256 of the bytes that it was decoded from."""

import io
import re
from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nfm.storage_specs.storage.errors import StoreError

MAX_NAME_BYTES = 1024  # of a name as UTF-8
NAMES_SCHEMA = pa.schema([("index", pa.int64()), ("name", pa.string()), ("sha256", pa.string())])


class ImageName(NamedTuple):
    """Where an image comes from."""

    name: str
    sha256: str  # of its source bytes


def max_names_bytes(rows: int) -> int:
    """Upper bound of the size of a file of names, and of its values in memory."""
    return (1 << 16) + rows * (MAX_NAME_BYTES + 128)


def encode_names(first_index: int, names: Iterable[ImageName]) -> bytes:
    """A file of names, of images with consecutive indices from `first_index`."""
    rows = [{"index": index, "name": name, "sha256": sha256} for index, (name, sha256) in enumerate(names, first_index)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=NAMES_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def parse_names(data: bytes, first_index: int, rows: int, name: str) -> list[ImageName]:
    """The names in a file of so many images with consecutive indices from `first_index`.

    Raises StoreError with the file's `name` if it holds another table, or if its values would take more memory than
    names can.
    """
    expected = f"expected the names of {rows} images from index {first_index}; the file is damaged"
    try:
        parquet = pq.ParquetFile(io.BytesIO(data))
        groups = range(parquet.metadata.num_row_groups)
        stated_bytes = sum(parquet.metadata.row_group(group).total_byte_size for group in groups)
        is_expected = parquet.metadata.num_rows == rows and parquet.schema_arrow.equals(NAMES_SCHEMA)
        if not is_expected or stated_bytes > max_names_bytes(rows):
            raise StoreError(f"{name}: got {parquet.metadata.num_rows} rows of {stated_bytes} bytes, {expected}")
        table = parquet.read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{name}: not a Parquet file: {error}") from error
    if table.num_rows != rows or table.nbytes > max_names_bytes(rows):  # whatever the metadata said
        raise StoreError(f"{name}: got {table.num_rows} rows of {table.nbytes} bytes, {expected}")
    if table["index"].to_pylist() != list(range(first_index, first_index + rows)):
        raise StoreError(f"{name}: got other indices, {expected}")
    names: list[ImageName] = []
    for text, digest in zip(table["name"].to_pylist(), table["sha256"].to_pylist(), strict=True):
        if not text or len(text.encode()) > MAX_NAME_BYTES or not re.fullmatch("[0-9a-f]{64}", digest or ""):
            raise StoreError(f"{name}: got name {str(text)[:60]!r} with sha256 {str(digest)[:70]!r}, {expected}")
        names.append(ImageName(text, digest))
    return names
