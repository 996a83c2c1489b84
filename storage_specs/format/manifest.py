"""manifest.parquet: one row a file, exactly the files that the spec calls for, in one order."""

import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from nfm.storage_specs.format.layouts import LAYOUTS
from nfm.storage_specs.format.schema import FileRecord, Spec
from nfm.storage_specs.storage.errors import StoreError

FILE_SCHEMA = pa.schema(
    [
        ("column", pa.string()),
        ("draw", pa.int32()),
        ("block", pa.int32()),
        ("first_index", pa.int64()),
        ("rows", pa.int32()),
        ("path", pa.string()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("label_counts", pa.map_(pa.int32(), pa.int64())),
        ("squared_error", pa.float64()),
    ]
)


@dataclass(frozen=True)
class FileKey:
    """Which file: its column, block, and draw (-1 where the column has none)."""

    column: str
    block: int
    draw: int = -1


def max_manifest_bytes(spec: Spec) -> int:
    """What a manifest takes at most, in its file or in memory."""
    return (1 << 16) + count_expected_files(spec) * (1024 + 16 * min(spec.num_classes, spec.block_rows))


def parse_manifest(data: bytes, spec: Spec, name: str) -> pa.Table:
    """The table, with a row for each expected file and sound numbers. Raises StoreError."""
    wanted, most = count_expected_files(spec), max_manifest_bytes(spec)
    try:
        parquet = pq.ParquetFile(io.BytesIO(data))
        if parquet.metadata.num_rows != wanted:
            raise StoreError(f"{name}: got {parquet.metadata.num_rows} files, expected the {wanted} of the spec")
        groups = range(parquet.metadata.num_row_groups)
        if sum(parquet.metadata.row_group(group).total_byte_size for group in groups) > most:
            raise StoreError(f"{name}: got more than {most} bytes of values, too many for {wanted} files")
        if not parquet.schema_arrow.equals(FILE_SCHEMA):
            raise StoreError(f"{name}: its columns are not those of a manifest; the file is of another version")
        table = parquet.read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{name}: not a Parquet file: {error}") from error
    if table.num_rows != wanted or table.nbytes > most:
        raise StoreError(f"{name}: got {table.nbytes} bytes of values in {table.num_rows} rows, expected {wanted} rows")
    if table["label_counts"].null_count:
        raise StoreError(f"{name}: got no label_counts in some row, expected them in each")
    return table


def parse_file_records(table: pa.Table, spec: Spec, name: str) -> dict[FileKey, FileRecord]:
    """The files by key. Raises StoreError unless each is the one expected in its row."""
    layout = LAYOUTS[spec.layout]
    fields = ("column", "draw", "block", "first_index", "rows", "path", "bytes")
    found = zip(*(table[field].to_pylist() for field in fields), strict=True)
    digests, errors = table["sha256"].to_pylist(), table["squared_error"].to_pylist()
    sizes: dict[tuple[str, int], int] = {}
    files: dict[FileKey, FileRecord] = {}
    for number, (key, got, digest, error) in enumerate(zip(expected_keys(spec), found, digests, errors, strict=True)):
        rows = spec.rows_of(key.block)
        if (key.column, rows) not in sizes:
            sizes[key.column, rows] = layout.file_size(spec, key.column, rows)
        path, size = layout.file_path(key.column, key.block, key.draw), sizes[key.column, rows]
        expected = (key.column, key.draw, key.block, key.block * spec.block_rows, rows, path, size)
        if got != expected:
            field = next(field for field, a, b in zip(fields, got, expected, strict=True) if a != b)
            raise StoreError(
                f"{name}: row {number} has {field} {str(got[fields.index(field)])[:100]!r}, expected "
                f"{expected[fields.index(field)]!r} of {path}; its files are not those of the spec, each once"
            )
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise StoreError(f"{name}: the sha256 of {path} is none")
        if (error is None) != (key.column != "z") or not 0 <= (error or 0) < math.inf:
            raise StoreError(f"{name}: got squared_error {error} of {path}, expected a number of each file of z alone")
        files[key] = FileRecord(
            column=key.column,
            draw=key.draw,
            block=key.block,
            path=path,
            bytes=size,
            sha256=digest,
            squared_error=error,
        )
    return files


def count_expected_files(spec: Spec) -> int:
    """How many files a complete store has; known before anything of that size is made."""
    return spec.blocks * (len(LAYOUTS[spec.layout].base_kinds) + len(spec.planes) * spec.draws)


def expected_keys(spec: Spec) -> list[FileKey]:
    """The files of a complete store, in manifest order."""
    base = LAYOUTS[spec.layout].base_kinds
    keys = [FileKey(kind, block) for kind in base for block in range(spec.blocks)]
    for kind in spec.planes:
        keys += [FileKey(kind, block, draw) for draw in range(spec.draws) for block in range(spec.blocks)]
    return keys


def z_rms_error(spec: Spec, files: Iterable[FileRecord]) -> float | None:
    """Root mean square of z as stored less z as the teacher gave it."""
    if spec.coupling is None:
        return None
    total = math.fsum(file.squared_error or 0.0 for file in files)
    return math.sqrt(total / (spec.rows * spec.draws * spec.dim))
