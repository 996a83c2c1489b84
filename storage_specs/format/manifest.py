"""manifest.parquet: one row for each file of the columns. Which files there are, and in which order, follows from the
spec."""

import io
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nfm.storage_specs.format.layouts import Layout
from nfm.storage_specs.format.schema import MAX_SQUARED_ERROR, FileRecord, Spec
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.parquet import Limits, read_table

MAX_MANIFEST_BYTES = 1 << 29
MAX_TEXT_BYTES = 256  # of a path, the longest text of a row
_ROWS_AT_ONCE = 1 << 14  # as Python objects

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
        ("view", pa.string()),
    ]
)
FILE_SCHEMA_1_0 = FILE_SCHEMA.remove(FILE_SCHEMA.get_field_index("view"))


@dataclass(frozen=True)
class FileKey:
    """Names one file of a column: the column, the block, and the draw (-1 where the column has none)."""

    column: str
    block: int
    draw: int = -1


def count_expected_files(spec: Spec, layout: Layout) -> int:
    """How many files of columns a complete store has."""
    return spec.num_blocks * (len(layout.base_columns(spec)) + len(spec.draw_columns) * spec.num_draws)


def expected_keys(spec: Spec, layout: Layout) -> list[FileKey]:
    """The files of columns of a complete store, in the order of the manifest."""
    blocks = range(spec.num_blocks)
    keys = [FileKey(column, block) for column in layout.base_columns(spec) for block in blocks]
    for column in spec.draw_columns:
        keys += [FileKey(column, block, draw) for draw in range(spec.num_draws) for block in blocks]
    return keys


def view_of(spec: Spec, key: FileKey) -> str:
    """The view of the images that a file holds, or was made of."""
    if key.column == "x_mirrored":
        return "mirrored"
    return "plain" if key.draw < 0 else spec.view_of(key.draw)


def max_manifest_bytes(spec: Spec, layout: Layout) -> int:
    """Upper bound of the size of a manifest, both of its file and of its values in memory."""
    bytes_per_file = 1024 + 16 * min(spec.num_classes, spec.block_rows)
    return min((1 << 16) + count_expected_files(spec, layout) * bytes_per_file, MAX_MANIFEST_BYTES)


def encode_manifest(spec: Spec, files: list[FileRecord], label_counts: list[dict[int, int]]) -> bytes:
    """The content of manifest.parquet. `files` are in the order of `expected_keys`; `label_counts` has the number of
    rows of each label, block by block."""
    rows = []
    for file in files:
        # Label counts stand only in the rows of x: in every row, they would be most of the manifest.
        counts = label_counts[file.block] if file.column == "x" else {}
        rows.append(
            {
                "column": file.column,
                "draw": file.draw,
                "block": file.block,
                "first_index": file.block * spec.block_rows,
                "rows": spec.rows_of(file.block),
                "path": file.path,
                "bytes": file.bytes,
                "sha256": file.sha256,
                "label_counts": sorted(counts.items()),
                "squared_error": file.squared_error,
                "view": view_of(spec, FileKey(file.column, file.block, file.draw)),
            }
        )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=FILE_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def parse_manifest(data: bytes, spec: Spec, layout: Layout, schema: pa.Schema, name: str) -> pa.Table:
    """The table in manifest.parquet, with `schema` and as many rows as the spec has files.

    Raises StoreError with the file's `name` if it is another table, or if its values would take more memory than a
    manifest can.
    """
    limits = Limits(count_expected_files(spec, layout), max_manifest_bytes(spec, layout), MAX_TEXT_BYTES)
    table = read_table(data, schema, limits, name)
    if table["label_counts"].null_count:
        raise StoreError(f"{name}: got no label_counts in some row, expected them in each")
    return table


def _iterate_values(table: pa.Table, field: str) -> Iterator[Any]:
    """The values of one column of a table, as Python objects, of which only some exist at a time."""
    for start in range(0, table.num_rows, _ROWS_AT_ONCE):
        yield from table[field].slice(start, _ROWS_AT_ONCE).to_pylist()


def parse_label_counts(table: pa.Table, spec: Spec, name: str) -> list[dict[int, int]]:
    """The number of rows of each label, block by block. Raises StoreError with the manifest's `name` if they do not add
    up to the rows of each block, or name a class that the spec does not have."""
    counts_by_block: list[dict[int, int]] = []
    for block, pairs in enumerate(_iterate_values(table.slice(0, spec.num_blocks), "label_counts")):  # those of x
        counts = dict(pairs)
        is_valid = len(counts) == len(pairs) and all(
            0 <= label < spec.num_classes and count is not None and count > 0 for label, count in pairs
        )
        if not is_valid or sum(counts.values()) != (spec.rows_of(block) if spec.has_labels else 0):
            raise StoreError(
                f"{name}: the label counts of block {block} are not those of its {spec.rows_of(block)} rows"
            )
        counts_by_block.append(counts)
    if any(_iterate_values(table.slice(spec.num_blocks), "label_counts")):
        raise StoreError(f"{name}: got label_counts of files that hold no labels, expected them of x alone")
    return counts_by_block


def parse_file_records(table: pa.Table, spec: Spec, layout: Layout, name: str) -> dict[FileKey, FileRecord]:
    """The rows of a manifest by file, in the order of `expected_keys`.

    Raises StoreError with the manifest's `name` unless every row has the column, block, path, size, … that the spec
    gives for its place, a well-formed sha256, and a squared_error exactly if it is a file of z.
    """
    fields = ["column", "draw", "block", "first_index", "rows", "path", "bytes"]
    has_views = "view" in table.column_names  # not in schema 1.0
    if has_views:
        fields.append("view")
    rows = zip(*(_iterate_values(table, field) for field in fields), strict=True)
    digests, squared_errors = _iterate_values(table, "sha256"), _iterate_values(table, "squared_error")
    file_sizes: dict[tuple[str, int], int] = {}  # by column and rows; there are few
    files: dict[FileKey, FileRecord] = {}
    row_values = zip(expected_keys(spec, layout), rows, digests, squared_errors, strict=True)
    for number, (key, row, digest, squared_error) in enumerate(row_values):
        num_rows = spec.rows_of(key.block)
        if (key.column, num_rows) not in file_sizes:
            file_sizes[key.column, num_rows] = layout.file_size(spec, key.column, num_rows)
        size = file_sizes[key.column, num_rows]
        path = layout.file_path(key.column, key.block, key.draw)
        expected_row = [key.column, key.draw, key.block, key.block * spec.block_rows, num_rows, path, size]
        if has_views:
            expected_row.append(view_of(spec, key))
        for field, value, expected in zip(fields, row, expected_row, strict=True):
            if value != expected:
                raise StoreError(
                    f"{name}: row {number} has {field} {str(value)[:100]!r}, expected {expected!r} of {path}; "
                    "the manifest must list each file of the spec exactly once"
                )
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise StoreError(f"{name}: the sha256 of {path} is not 64 hexadecimal digits")
        has_squared_error = squared_error is not None
        is_valid = not has_squared_error or 0 <= squared_error <= MAX_SQUARED_ERROR
        if has_squared_error != (key.column == "z") or not is_valid:
            raise StoreError(
                f"{name}: got squared_error {squared_error} of {path}, "
                f"expected 0 to {MAX_SQUARED_ERROR} for files of z and none for others"
            )
        files[key] = FileRecord(
            column=key.column,
            draw=key.draw,
            block=key.block,
            path=path,
            bytes=size,
            sha256=digest,
            squared_error=squared_error,
        )
    return files


def z_rms_error(spec: Spec, files: Iterable[FileRecord]) -> float | None:
    """Root mean square of the difference between z as stored and z as the teacher gave it; None for a sample store."""
    if spec.coupling is None:
        return None
    total = math.fsum(file.squared_error or 0.0 for file in files)
    return math.sqrt(total / (spec.rows * spec.num_draws * spec.dim))
