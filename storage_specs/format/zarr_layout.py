"""Zarr v3 layout: the columns as arrays of one group, with the sharding codec and no compression. One shard file is one
block of one draw, so no two writers touch one object; its chunks lie in order, so it is a strided array as well."""

from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import MemoryStore

from nfm.storage_specs.format.schema import Spec
from nfm.storage_specs.storage.errors import StoreError

CHUNK_BYTES = 1 << 18  # a chunk is what stock readers fetch at once
MISSING = np.uint64(2**64 - 1)


class ZarrLayout:
    base_kinds: tuple[str, ...] = ("x", "label", "index")

    def file_path(self, kind: str, block: int, draw: int) -> str:
        if kind in ("label", "index"):
            return f"{kind}/c/{block}"
        return f"{kind}/c/{block}/0/0/0" if draw < 0 else f"{kind}/c/{draw}/{block}/0/0/0"

    def row_shape(self, spec: Spec, kind: str) -> tuple[int, ...]:
        return () if kind in ("label", "index") else spec.shape

    def row_bytes(self, spec: Spec, kind: str) -> int:
        return int(np.prod(self.row_shape(spec, kind), dtype=np.int64)) * spec.dtype(kind).itemsize

    def chunk_rows(self, spec: Spec, kind: str) -> int:
        """The largest divisor of the block that keeps a chunk within CHUNK_BYTES."""
        most = max(1, CHUNK_BYTES // self.row_bytes(spec, kind))
        return next(rows for rows in range(min(most, spec.block_rows), 0, -1) if spec.block_rows % rows == 0)

    def _chunks(self, spec: Spec, kind: str, rows: int) -> tuple[int, int]:
        """Chunks that hold rows, and all entries of the shard's index."""
        per_chunk = self.chunk_rows(spec, kind)
        return -(-rows // per_chunk), spec.block_rows // per_chunk

    def file_size(self, spec: Spec, kind: str, rows: int) -> int:
        used, entries = self._chunks(spec, kind, rows)
        return used * self.chunk_rows(spec, kind) * self.row_bytes(spec, kind) + 16 * entries + 4

    def _create(self, store: MemoryStore, spec: Spec, kind: str, rows: int, draws: int) -> "zarr.Array[Any]":
        plane = (draws,) if kind in ("z", "noise") else ()
        one = (1,) * len(plane)
        shape = self.row_shape(spec, kind)
        return zarr.create_array(
            store,
            name=kind,
            shape=(*plane, rows, *shape),
            chunks=(*one, self.chunk_rows(spec, kind), *shape),
            shards=(*one, spec.block_rows, *shape),
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
        with zarr.config.set({"array.write_empty_chunks": True}):  # a chunk of zeros still has its place
            array = self._create(store, spec, kind, rows=len(index), draws=1)
            array[...] = values[None] if kind in ("z", "noise") else values
        file: bytes = content[self.file_path(kind, 0, 0 if kind in ("z", "noise") else -1)].to_bytes()
        return file

    def row_placement(self, spec: Spec, kind: str) -> tuple[int, int]:
        return 0, self.row_bytes(spec, kind)

    def view_columns(self, spec: Spec, kind: str, block: int, data: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        rows = spec.rows_of(block)
        assert len(data) == self.file_size(spec, kind, rows)
        used, entries = self._chunks(spec, kind, rows)
        chunk_bytes = self.chunk_rows(spec, kind) * self.row_bytes(spec, kind)
        table = np.frombuffer(data[-16 * entries - 4 : -4].tobytes(), dtype="<u8").reshape(entries, 2)
        expected = np.full((entries, 2), MISSING)
        expected[:used, 0] = np.arange(used, dtype=np.uint64) * np.uint64(chunk_bytes)
        expected[:used, 1] = chunk_bytes
        if not np.array_equal(table, expected):
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
            self._create(store, spec, kind, rows=spec.rows, draws=spec.draws)
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
