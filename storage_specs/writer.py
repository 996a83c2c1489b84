"""Writing a store block by block, so that any crash leaves a state from which the same command goes on.

Order of events: spec.json, then for each block its files and then its commit record, at last manifest, σ_f, card and
dataset.json. Nothing is trusted without the record that comes after it.
"""

import io
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage_specs.card import card
from storage_specs.errors import StoreError
from storage_specs.files import Root, sha256
from storage_specs.layouts import LAYOUTS, Columns
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
from storage_specs.store import FILE_SCHEMA, MAX_METADATA_BYTES, Key, check_labels, expected_keys

SPEC_FILE = "commits/spec.json"


def _commit_name(block: int) -> str:
    return f"commits/{block:06d}.json"


class StoreWriter:
    """The one way to write a store. Any number of writers may commit different blocks of it at the same time."""

    def __init__(self, url: str, spec: Spec, options: dict[str, Any] | None = None) -> None:
        self.root = Root(url, options)
        self.spec = spec
        self.layout = LAYOUTS[spec.layout]

    def begin(self) -> None:
        """Claim the URL for this spec. Raises StoreError if it holds a store of another spec, naming what differs."""
        if self.root.exists(SPEC_FILE):
            there = parse(Spec, self.root.read(SPEC_FILE, MAX_METADATA_BYTES), f"{self.root.url}/{SPEC_FILE}")
            if there != self.spec:
                fields = difference(self.spec.model_dump(mode="json"), there.model_dump(mode="json"))
                raise StoreError(
                    f"{self.root.url}: holds another store: {'; '.join(fields)}. Write to another URL, or delete "
                    "it first"
                )
        elif self.root.exists("dataset.json"):
            raise StoreError(f"{self.root.url}: holds a dataset.json that no writer of ours left; write to another URL")
        else:
            self.root.write(SPEC_FILE, self.spec.canonical())

    def complete(self) -> bool:
        return self.root.exists("dataset.json")

    def committed(self) -> set[int]:
        """Blocks that need no more work."""
        stems = [name.removesuffix(".json") for name in self.root.names("commits") if name.endswith(".json")]
        return {int(stem) for stem in stems if stem.isdigit()}

    def write_block(self, block: int, base: Columns, planes: dict[str, NDArray[Any]], seconds: float) -> Commit:
        """Write the files of a block and then its commit record. `base` has x (rows, C, H, W) and label (rows,);
        `planes` has z and noise (K, rows, C, H, W), or is empty for a sample store."""
        spec = self.spec
        check_labels(base["label"], spec.num_classes, f"{self.root.url} block {block}")
        assert set(planes) == ({"z", "noise"} if spec.coupling else set())
        for name, plane in planes.items():
            assert plane.shape == (spec.draws, spec.rows_of(block), *spec.shape)
            if not np.isfinite(plane).all():
                raise FloatingPointError(
                    f"block {block}: {name} holds values that are not finite; nothing of it was written"
                )
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
            sum_z2=self._put_sum_z2(block, planes["z"]) if planes else None,
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
        data = _npy(np.square(z.astype(np.float64)).sum(axis=(0, 1)))
        path = f"commits/{block:06d}.sum_z2.npy"
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
            ),
            records=self.layout.describe(self.spec),
            manifest_sha256=sha256(manifest),
            sigma_f_sha256=sigma_f_sha256,
        )
        self.root.write("README.md", card(dataset).encode())
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
        if not (np.isfinite(sigma_f) & (sigma_f > 0)).all():
            raise FloatingPointError("σ_f is zero or not finite in some dimension: the teacher's z is constant there")
        data = _npy(sigma_f)
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
                "seconds": commit.seconds,
            }
            for file, commit in ordered
        ]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=FILE_SCHEMA), buffer, compression="zstd")
        return buffer.getvalue()


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
