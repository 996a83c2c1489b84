"""Writing a store block by block, so that any crash leaves a state from which the same command goes on.

Order of events: spec.json, then for each block its files and then its commit record, at last manifest, σ_f, card and
dataset.json. Nothing is trusted without the record that comes after it.
"""

import io
from collections import Counter
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage_specs import codecs
from storage_specs.card import card, croissant
from storage_specs.errors import StoreError
from storage_specs.files import Root, sha256
from storage_specs.layouts import LAYOUTS, Columns
from storage_specs.manifest import FILE_SCHEMA, Key, expected_keys
from storage_specs.schema import (
    SCHEMA_VERSION,
    Commit,
    Dataset,
    FileRecord,
    Spec,
    Totals,
    canonical_json,
    content_id,
    difference,
    parse,
)
from storage_specs.store import LEAST, MAX_METADATA_BYTES, MOST, check_labels, parse_array, z_rms_error

SPEC_FILE = "commits/spec.json"
SCALE_FILE = "z_scale.npy"


def _commit_name(block: int) -> str:
    return f"commits/{block:06d}.json"


def block_files(block: int) -> tuple[str, str]:
    """What the writer keeps of a block beside its files: the commit record, and Σ z²."""
    return _commit_name(block), f"commits/{block:06d}.sum_z2.npy"


def begun(url: str, options: dict[str, Any] | None = None) -> Spec | None:
    """The spec of the store that was begun at a URL, if one was."""
    root = Root(url, options)
    if not root.exists(SPEC_FILE):
        return None
    return parse(Spec, root.read(SPEC_FILE, MAX_METADATA_BYTES), f"{root.url}/{SPEC_FILE}")


class StoreWriter:
    """The one way to write a store. Any number of writers may commit different blocks of it at the same time."""

    def __init__(self, url: str, spec: Spec, options: dict[str, Any] | None = None) -> None:
        self.root, self.options = Root(url, options), options
        self.spec = spec
        self.layout = LAYOUTS[spec.layout]

    def begin(self, z_scale: NDArray[np.float32] | None = None) -> None:
        """Claim the URL for this spec. Raises StoreError if it holds a store of another spec, naming what differs.

        `z_scale`, float32 (C, H, W), is the scale whose sha256 the spec of an int8 store gives.
        """
        there = begun(self.root.url, self.options)
        if there is not None:
            if there != self.spec:
                fields = difference(self.spec.model_dump(mode="json"), there.model_dump(mode="json"))
                raise StoreError(
                    f"{self.root.url}: holds another store: {'; '.join(fields)}. Write to another URL, or delete "
                    "it first"
                )
        elif self.root.exists("dataset.json"):
            raise StoreError(f"{self.root.url}: holds a dataset.json that no writer of ours left; write to another URL")
        else:
            if z_scale is not None:
                self.root.write(SCALE_FILE, npy(z_scale))
            self.root.write(SPEC_FILE, self.spec.canonical())

    @cached_property
    def z_scale(self) -> NDArray[np.float32] | None:
        digest = self.spec.coupling.z_scale_sha256 if self.spec.coupling else None
        if digest is None:
            return None
        data, name = self.root.read(SCALE_FILE, MAX_METADATA_BYTES), f"{self.root.url}/{SCALE_FILE}"
        if sha256(data) != digest:
            raise StoreError(f"{name}: its sha256 is not the one in the spec; delete {self.root.url} and encode again")
        return parse_array(data, self.spec, name)

    def complete(self) -> bool:
        return self.root.exists("dataset.json")

    def committed(self) -> set[int]:
        """Blocks that need no more work."""
        stems = [name.removesuffix(".json") for name in self.root.names("commits") if name.endswith(".json")]
        return {int(stem) for stem in stems if stem.isdigit()}

    def write_block(
        self,
        block: int,
        base: Columns,
        z: NDArray[np.float32] | None,
        noise: NDArray[Any] | None,
        seconds: float,
    ) -> Commit:
        """Write the files of a block and then its commit record. `base` has x (rows, C, H, W) and label (rows,);
        z (K, rows, C, H, W) is the teacher's, float32, and noise, of the same shape, what it saw, in the dtype of the
        spec. A sample store has neither, and a store that derives its noise takes none."""
        stored, error = None, None
        if z is not None:
            coupling = self.spec.coupling
            assert coupling is not None and z.dtype == np.float32
            stored = codecs.encode(z, coupling.z_dtype, self.z_scale)
            if not (np.isfinite(z).all() and codecs.all_finite(stored)):
                bad = np.argwhere(~np.isfinite(codecs.decode(stored, coupling.z_dtype, self.z_scale) + z))[0]
                raise FloatingPointError(
                    f"block {block}: z of image {self.spec.indices(block)[bad[1]]}, draw {bad[0]}, is not finite as "
                    f"{coupling.z_dtype}; nothing of the block was written"
                )
            decoded = codecs.decode(stored, coupling.z_dtype, self.z_scale)
            error = float(np.square(decoded.astype(np.float64) - z).sum())
        return self.write_stored(block, base, stored, noise, error, seconds)

    def write_stored(
        self,
        block: int,
        base: Columns,
        z: NDArray[Any] | None,
        noise: NDArray[Any] | None,
        squared_error: float | None,
        seconds: float,
    ) -> Commit:
        """`write_block` for z as it is stored, of which `squared_error` is known."""
        spec = self.spec
        check_labels(base["label"], spec.num_classes, f"{self.root.url} block {block}")
        planes = {name: plane for name, plane in (("z", z), ("noise", noise)) if plane is not None}
        assert tuple(planes) == spec.planes
        for name, plane in planes.items():
            assert plane.shape == (spec.draws, spec.rows_of(block), *spec.shape)
            assert plane.dtype == spec.dtype(name) and codecs.all_finite(plane)
        files = [self._put(Key(kind, block), base) for kind in self.layout.base_kinds]
        for name, plane in planes.items():
            files += [self._put(Key(name, block, draw), {name: values}) for draw, values in enumerate(plane)]
        counts = Counter(base["label"].tolist())
        commit = Commit(
            spec=spec.id,
            block=block,
            rows=spec.rows_of(block),
            files=files,
            label_counts={str(label): counts[label] for label in sorted(counts)},
            sum_z2=None if z is None else self._put_sum_z2(block, z),
            squared_error=squared_error,
            seconds=seconds,
        )
        self.root.write(_commit_name(block), canonical_json(commit.model_dump(mode="json")))
        return commit

    def _put(self, key: Key, columns: Columns) -> FileRecord:
        data = self.layout.encode(self.spec, key.column, key.block, columns)
        path = self.layout.path(key.column, key.block, key.draw)
        assert len(data) == self.layout.size(self.spec, key.column, self.spec.rows_of(key.block))
        self.root.write(path, data)
        return FileRecord(
            column=key.column, draw=key.draw, block=key.block, path=path, bytes=len(data), sha256=sha256(data)
        )

    def _put_sum_z2(self, block: int, z: NDArray[Any]) -> FileRecord:
        """Σ z² of the *stored* values in float64, so that σ_f needs no second pass and anyone can check it."""
        assert self.spec.coupling is not None
        decoded = codecs.decode(z, self.spec.coupling.z_dtype, self.z_scale)
        data = npy(np.square(decoded.astype(np.float64)).sum(axis=(0, 1)))
        path = block_files(block)[1]
        self.root.write(path, data)
        return FileRecord(column="sum_z2", draw=-1, block=block, path=path, bytes=len(data), sha256=sha256(data))

    def read_commit(self, block: int) -> Commit:
        name = _commit_name(block)
        commit = parse(Commit, self.root.read(name, MAX_METADATA_BYTES), f"{self.root.url}/{name}")
        if commit.spec != self.spec.id or commit.block != block:
            raise StoreError(
                f"{self.root.url}/{name}: it was written for another store; delete {self.root.url} and encode again"
            )
        return commit

    def finalize(self) -> Dataset:
        """Add up the commits in block order and write what makes the store complete; dataset.json comes last."""
        missing = set(range(self.spec.blocks)) - self.committed()
        assert not missing, f"finalize before blocks {sorted(missing)} were committed"
        commits = [self.read_commit(block) for block in range(self.spec.blocks)]
        records = {
            Key(file.column, file.block, file.draw): (file, commit) for commit in commits for file in commit.files
        }
        ordered = [records[key] for key in expected_keys(self.spec)]
        for path, data in self.layout.metadata(self.spec).items():
            self.root.write(path, data)
        sigma_f_sha256 = self._write_sigma_f(commits) if self.spec.coupling else None
        manifest = self._manifest(ordered)
        self.root.write("manifest.parquet", manifest)
        counts: Counter[int] = Counter()
        for commit in commits:
            counts.update({int(label): count for label, count in commit.label_counts.items()})
        dataset = Dataset(
            schema_version=SCHEMA_VERSION,
            id=content_id(self.spec, [file.sha256 for file, _ in ordered]),
            spec=self.spec,
            totals=Totals(
                files=len(ordered),
                bytes=sum(file.bytes for file, _ in ordered),
                label_counts={str(label): counts[label] for label in sorted(counts)},
                z_rms_error=z_rms_error(self.spec, [commit.squared_error for commit in commits]),
            ),
            records=self.layout.describe(self.spec),
            manifest_sha256=sha256(manifest),
            sigma_f_sha256=sigma_f_sha256,
        )
        self.root.write("README.md", card(dataset).encode())
        self.root.write("croissant.json", canonical_json(croissant(dataset)))
        self.root.write("dataset.json", canonical_json(dataset.model_dump(mode="json")))
        return dataset

    def _write_sigma_f(self, commits: list[Commit]) -> str:
        total = np.zeros(self.spec.shape, dtype=np.float64)
        for commit in commits:
            record = commit.sum_z2
            assert record is not None
            data = self.root.read(record.path, record.bytes)
            if sha256(data) != record.sha256:
                raise StoreError(
                    f"{self.root.url}/{record.path}: its sha256 is not the committed one; delete its commit and "
                    "encode again"
                )
            total += np.load(io.BytesIO(data), allow_pickle=False)
        sigma_f = np.sqrt(total / (self.spec.rows * self.spec.draws)).astype(np.float32)
        if not ((sigma_f > LEAST) & (sigma_f < MOST)).all():
            raise FloatingPointError(
                f"σ_f is not between {LEAST} and {MOST} in some dimension: the teacher's z is constant or wild there"
            )
        data = npy(sigma_f)
        self.root.write("sigma_f.npy", data)
        return sha256(data)

    def _manifest(self, ordered: list[tuple[FileRecord, Commit]]) -> bytes:
        rows = [
            {
                "column": file.column,
                "draw": file.draw,
                "block": file.block,
                "first_index": file.block * self.spec.block_rows,
                "rows": commit.rows,
                "path": file.path,
                "bytes": file.bytes,
                "sha256": file.sha256,
                "label_counts": [(int(label), count) for label, count in commit.label_counts.items()],
                "squared_error": commit.squared_error,
                "seconds": commit.seconds,
            }
            for file, commit in ordered
        ]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=FILE_SCHEMA), buffer, compression="zstd")
        return buffer.getvalue()


def npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
