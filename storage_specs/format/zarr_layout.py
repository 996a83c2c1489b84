"""Zarr v3 layout: the columns as arrays of one group, with Zarr's sharding codec and no compression. One shard file is
one block of one draw, so no two writers write the same file. Its chunks lie in order, so it is a strided array as well.

The group has a folder of its own, as stock readers warn of everything else that lies among arrays.

A shard file is its chunks and then an index: the offset and the length of each chunk as 64-bit integers, and their
CRC-32C in four bytes.
"""

from typing import Any

import numpy as np
import zarr
from numcodecs.checksum32 import CRC32C
from numpy.typing import NDArray
from zarr.storage import MemoryStore

from nfm.storage_specs.format.schema import Spec
from nfm.storage_specs.storage.errors import StoreError

GROUP_FOLDER = "columns.zarr"
MAX_CHUNK_BYTES = 1 << 18  # a chunk is what stock readers fetch at once
MISSING_CHUNK = np.uint64(2**64 - 1)  # offset and length of a chunk that the file does not hold
INDEX_ENTRY_BYTES = 16
CHECKSUM_BYTES = 4


def has_draws(column: str) -> bool:
    """Whether a column has a value for each draw, so that the draw is the first axis of its array."""
    return column in ("z", "noise")


class ZarrLayout:
    """A file is one shard of the array of its column. See `Layout` for the methods. `folder` is that of the group, in
    the store; "" is the store itself, as in schema 1.0."""

    def __init__(self, folder: str = GROUP_FOLDER) -> None:
        self.prefix = f"{folder}/" if folder else ""

    def base_columns(self, spec: Spec) -> tuple[str, ...]:
        return (*spec.image_columns, *(("label",) if spec.has_labels else ()), "index")

    def file_path(self, column: str, block: int, draw: int) -> str:
        return f"{self.prefix}{column}/c/{self._chunk_name(column, block, draw)}"

    def _chunk_name(self, column: str, block: int, draw: int) -> str:
        """The name of a shard in the folder of its array."""
        if column in ("label", "index"):
            return f"{block}"
        return f"{block}/0/0/0" if draw < 0 else f"{draw}/{block}/0/0/0"

    def row_shape(self, spec: Spec, column: str) -> tuple[int, ...]:
        """The shape of the values of one row: (C, H, W), or () for labels and indices."""
        return () if column in ("label", "index") else spec.shape

    def row_bytes(self, spec: Spec, column: str) -> int:
        """Bytes of the values of one row."""
        return int(np.prod(self.row_shape(spec, column), dtype=np.int64)) * spec.dtype(column).itemsize

    def chunk_rows(self, spec: Spec, column: str) -> int:
        """Rows of a chunk: the largest divisor of the rows of a block that keeps it within MAX_CHUNK_BYTES."""
        max_rows = min(max(1, MAX_CHUNK_BYTES // self.row_bytes(spec, column)), spec.block_rows)
        return next(rows for rows in range(max_rows, 0, -1) if spec.block_rows % rows == 0)

    def _count_chunks(self, spec: Spec, column: str, rows: int) -> tuple[int, int]:
        """How many chunks of a file with so many rows hold rows, and how many entries its index has."""
        chunk_rows = self.chunk_rows(spec, column)
        return -(-rows // chunk_rows), spec.block_rows // chunk_rows

    def file_size(self, spec: Spec, column: str, rows: int) -> int:
        num_chunks, num_entries = self._count_chunks(spec, column, rows)
        chunk_bytes = self.chunk_rows(spec, column) * self.row_bytes(spec, column)
        return num_chunks * chunk_bytes + INDEX_ENTRY_BYTES * num_entries + CHECKSUM_BYTES

    def _create_array(self, store: MemoryStore, spec: Spec, column: str, rows: int, draws: int) -> "zarr.Array[Any]":
        """The empty array of a column with so many rows, and draws if it has any, in a Zarr store in memory."""
        row_shape = self.row_shape(spec, column)
        shape = (rows, *row_shape)
        chunks = (self.chunk_rows(spec, column), *row_shape)
        shards = (spec.block_rows, *row_shape)
        if has_draws(column):
            shape, chunks, shards = (draws, *shape), (1, *chunks), (1, *shards)
        return zarr.create_array(
            store,
            name=column,
            shape=shape,
            chunks=chunks,
            shards=shards,
            dtype=spec.dtype(column),
            compressors=None,
            filters=None,
            fill_value=0,
        )

    def encode_file(self, spec: Spec, column: str, block: int, columns: dict[str, NDArray[Any]]) -> bytes:
        index = spec.indices(block)
        values = index if column == "index" else columns[column]
        assert len(values) == len(index) and values.dtype == spec.dtype(column)
        content: dict[str, Any] = {}
        store = MemoryStore(content)
        with zarr.config.set({"array.write_empty_chunks": True}):  # else chunks of zeros would be left out
            array = self._create_array(store, spec, column, rows=len(index), draws=1)
            array[...] = values[None] if has_draws(column) else values
        shard_name = self._chunk_name(column, block=0, draw=0 if has_draws(column) else -1)
        file: bytes = content[f"{column}/c/{shard_name}"].to_bytes()
        return file

    def row_placement(self, spec: Spec, column: str) -> tuple[int, int]:
        return 0, self.row_bytes(spec, column)

    def view_columns(self, spec: Spec, column: str, block: int, data: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        rows = spec.rows_of(block)
        assert len(data) == self.file_size(spec, column, rows)
        num_chunks, num_entries = self._count_chunks(spec, column, rows)
        chunk_bytes = self.chunk_rows(spec, column) * self.row_bytes(spec, column)
        expected = np.full((num_entries, 2), MISSING_CHUNK)
        expected[:num_chunks, 0] = np.arange(num_chunks, dtype=np.uint64) * np.uint64(chunk_bytes)
        expected[:num_chunks, 1] = chunk_bytes
        expected_index = bytes(CRC32C(location="end").encode(expected.astype("<u8").tobytes()))
        index = data[-INDEX_ENTRY_BYTES * num_entries - CHECKSUM_BYTES :].tobytes()
        if index != expected_index:
            raise StoreError("its shard index, or the checksum of it, is not that of uncompressed chunks in order")
        values = data[: rows * self.row_bytes(spec, column)].view(spec.dtype(column))
        values = values.reshape(rows, *self.row_shape(spec, column))
        if column == "index" and not np.array_equal(values, spec.indices(block)):
            raise StoreError("its indices are not those of this block")
        return {column: values}

    def metadata_files(self, spec: Spec) -> dict[str, bytes]:
        content: dict[str, Any] = {}
        store = MemoryStore(content)
        zarr.create_group(store)
        columns = (*self.base_columns(spec), *spec.draw_columns)
        for column in columns:
            self._create_array(store, spec, column, rows=spec.rows, draws=spec.num_draws)
        names = ("zarr.json", *(f"{column}/zarr.json" for column in columns))
        return {f"{self.prefix}{name}": content[name].to_bytes() for name in names}

    def describe_records(self, spec: Spec) -> dict[str, dict[str, Any]]:
        columns = (*self.base_columns(spec), *spec.draw_columns)
        return {
            column: {
                "row_bytes": self.row_bytes(spec, column),
                "chunk_rows": self.chunk_rows(spec, column),
                "dtype": spec.dtype(column).str,
                "shape": list(self.row_shape(spec, column)),
            }
            for column in columns
        }
