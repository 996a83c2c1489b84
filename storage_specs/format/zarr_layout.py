"""Zarr v3 layout: the columns as arrays of one group, with Zarr's sharding codec and no compression. One shard file is
one block of one draw, so no two writers write the same file. Its chunks lie in order, so it is a strided array as well.

A shard file is its chunks and then an index: the offset and the length of each chunk as 64-bit integers, and a checksum
of four bytes.
"""

from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import MemoryStore

from nfm.storage_specs.format.schema import Spec
from nfm.storage_specs.storage.errors import StoreError

MAX_CHUNK_BYTES = 1 << 18  # a chunk is what stock readers fetch at once
MISSING_CHUNK = np.uint64(2**64 - 1)  # offset and length of a chunk that the file does not hold
INDEX_ENTRY_BYTES = 16
CHECKSUM_BYTES = 4


def has_draws(kind: str) -> bool:
    """Whether a column has a value for each draw, so that the draw is the first axis of its array."""
    return kind in ("z", "noise")


class ZarrLayout:
    """A file is one shard of the array of its column. See `Layout` for the methods."""

    base_kinds: tuple[str, ...] = ("x", "label", "index")

    def file_path(self, kind: str, block: int, draw: int) -> str:
        if kind in ("label", "index"):
            return f"{kind}/c/{block}"
        return f"{kind}/c/{block}/0/0/0" if draw < 0 else f"{kind}/c/{draw}/{block}/0/0/0"

    def row_shape(self, spec: Spec, kind: str) -> tuple[int, ...]:
        """The shape of the values of one row: (C, H, W), or () for labels and indices."""
        return () if kind in ("label", "index") else spec.shape

    def row_bytes(self, spec: Spec, kind: str) -> int:
        """Bytes of the values of one row."""
        return int(np.prod(self.row_shape(spec, kind), dtype=np.int64)) * spec.dtype(kind).itemsize

    def chunk_rows(self, spec: Spec, kind: str) -> int:
        """Rows of a chunk: the largest divisor of the rows of a block that keeps it within MAX_CHUNK_BYTES."""
        max_rows = min(max(1, MAX_CHUNK_BYTES // self.row_bytes(spec, kind)), spec.block_rows)
        return next(rows for rows in range(max_rows, 0, -1) if spec.block_rows % rows == 0)

    def _count_chunks(self, spec: Spec, kind: str, rows: int) -> tuple[int, int]:
        """How many chunks of a file with so many rows hold rows, and how many entries its index has."""
        chunk_rows = self.chunk_rows(spec, kind)
        return -(-rows // chunk_rows), spec.block_rows // chunk_rows

    def file_size(self, spec: Spec, kind: str, rows: int) -> int:
        num_chunks, num_entries = self._count_chunks(spec, kind, rows)
        chunk_bytes = self.chunk_rows(spec, kind) * self.row_bytes(spec, kind)
        return num_chunks * chunk_bytes + INDEX_ENTRY_BYTES * num_entries + CHECKSUM_BYTES

    def _create_array(self, store: MemoryStore, spec: Spec, kind: str, rows: int, draws: int) -> "zarr.Array[Any]":
        """The empty array of a column with so many rows, and draws if it has any, in a Zarr store in memory."""
        row_shape = self.row_shape(spec, kind)
        shape = (rows, *row_shape)
        chunks = (self.chunk_rows(spec, kind), *row_shape)
        shards = (spec.block_rows, *row_shape)
        if has_draws(kind):
            shape, chunks, shards = (draws, *shape), (1, *chunks), (1, *shards)
        return zarr.create_array(
            store,
            name=kind,
            shape=shape,
            chunks=chunks,
            shards=shards,
            dtype=spec.dtype(kind),
            compressors=None,
            filters=None,
            fill_value=0,
        )

    def encode_file(self, spec: Spec, kind: str, block: int, columns: dict[str, NDArray[Any]]) -> bytes:
        index = spec.indices(block)
        values = index if kind == "index" else columns[kind]
        assert len(values) == len(index) and values.dtype == spec.dtype(kind)
        content: dict[str, Any] = {}
        store = MemoryStore(content)
        with zarr.config.set({"array.write_empty_chunks": True}):  # else chunks of zeros would be left out
            array = self._create_array(store, spec, kind, rows=len(index), draws=1)
            array[...] = values[None] if has_draws(kind) else values
        file: bytes = content[self.file_path(kind, block=0, draw=0 if has_draws(kind) else -1)].to_bytes()
        return file

    def row_placement(self, spec: Spec, kind: str) -> tuple[int, int]:
        return 0, self.row_bytes(spec, kind)

    def view_columns(self, spec: Spec, kind: str, block: int, data: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        rows = spec.rows_of(block)
        assert len(data) == self.file_size(spec, kind, rows)
        num_chunks, num_entries = self._count_chunks(spec, kind, rows)
        chunk_bytes = self.chunk_rows(spec, kind) * self.row_bytes(spec, kind)
        index_bytes = data[-INDEX_ENTRY_BYTES * num_entries - CHECKSUM_BYTES : -CHECKSUM_BYTES].tobytes()
        shard_index = np.frombuffer(index_bytes, dtype="<u8").reshape(num_entries, 2)
        expected = np.full((num_entries, 2), MISSING_CHUNK)
        expected[:num_chunks, 0] = np.arange(num_chunks, dtype=np.uint64) * np.uint64(chunk_bytes)
        expected[:num_chunks, 1] = chunk_bytes
        if not np.array_equal(shard_index, expected):
            raise StoreError("its shard index is not that of uncompressed chunks in order")
        values = data[: rows * self.row_bytes(spec, kind)].view(spec.dtype(kind))
        values = values.reshape(rows, *self.row_shape(spec, kind))
        if kind == "index" and not np.array_equal(values, spec.indices(block)):
            raise StoreError("its indices are not those of this block")
        return {kind: values}

    def metadata_files(self, spec: Spec) -> dict[str, bytes]:
        content: dict[str, Any] = {}
        store = MemoryStore(content)
        zarr.create_group(store)
        kinds = (*self.base_kinds, *spec.planes)
        for kind in kinds:
            self._create_array(store, spec, kind, rows=spec.rows, draws=spec.draws)
        return {name: content[name].to_bytes() for name in ("zarr.json", *(f"{kind}/zarr.json" for kind in kinds))}

    def describe_records(self, spec: Spec) -> dict[str, dict[str, Any]]:
        kinds = (*self.base_kinds, *spec.planes)
        return {
            kind: {
                "row_bytes": self.row_bytes(spec, kind),
                "chunk_rows": self.chunk_rows(spec, kind),
                "dtype": spec.dtype(kind).str,
                "shape": list(self.row_shape(spec, kind)),
            }
            for kind in kinds
        }
