"""Writing a store unit by unit, so that any crash leaves a state from which the same command goes on.

Order of events: spec.json, then for each unit its files and then its commit record, at last manifest, σ_f, card and
dataset.json. Nothing is trusted without the record that comes after it.
"""

import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nfm.storage_specs.format import codecs
from nfm.storage_specs.format.card import croissant, readme
from nfm.storage_specs.format.layouts import LAYOUTS, Columns
from nfm.storage_specs.format.manifest import FILE_SCHEMA, FileKey, expected_keys, z_rms_error
from nfm.storage_specs.format.names import LEASE_FILE, MAX_METADATA_BYTES, SPEC_FILE, Z_SCALE_FILE
from nfm.storage_specs.format.schema import (
    SCHEMA_VERSION,
    Commit,
    Cost,
    Dataset,
    FileRecord,
    Spec,
    Totals,
    content_id,
    parse_dataset,
)
from nfm.storage_specs.storage.documents import canonical_json, list_differences, parse_json
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import IO_THREADS, Root, sha256
from nfm.storage_specs.storage.npy import npy_bytes
from nfm.storage_specs.writing import units
from nfm.storage_specs.writing.units import Unit, UnitWriter


def read_started_spec(url: str, options: dict[str, Any] | None = None) -> Spec | None:
    """The spec of the store that was begun at a URL, if one was."""
    root = Root(url, options)
    if not root.exists(SPEC_FILE):
        return None
    return parse_json(Spec, root.read(SPEC_FILE, MAX_METADATA_BYTES), f"{root.url}/{SPEC_FILE}")


class StoreWriter:
    """The one way to write a store. Any number of writers may commit different units of it at the same time."""

    def __init__(self, url: str, spec: Spec, options: dict[str, Any] | None = None) -> None:
        self.root, self.options = Root(url, options), options
        self.spec = spec
        self.layout = LAYOUTS[spec.layout]

    def initialize(self, z_scale: NDArray[np.float32] | None = None) -> None:
        """Claim the URL for this spec, or continue there, or add draws to what is there. Raises StoreError if it holds
        a store of another spec, naming what differs.

        `z_scale`, float32 (C, H, W), is the scale whose sha256 the spec of an int8 store gives.
        """
        there = read_started_spec(self.root.url, self.options)
        if there is not None:
            grows = there.lineage == self.spec.lineage and there.draws < self.spec.draws
            if there != self.spec and not grows:
                fields = list_differences(self.spec.model_dump(mode="json"), there.model_dump(mode="json"))
                added = " (draws can be added, not taken away)" if there.lineage == self.spec.lineage else ""
                raise StoreError(
                    f"{self.root.url}: holds another store: {'; '.join(fields)}{added}. Write to another URL, or "
                    "delete it first"
                )
            if grows:
                self.root.write(SPEC_FILE, self.spec.canonical())
        elif self.root.exists("dataset.json"):
            raise StoreError(f"{self.root.url}: holds a dataset.json that no writer of ours left; write to another URL")
        else:
            if z_scale is not None:
                self.root.write(Z_SCALE_FILE, npy_bytes(z_scale))
            self.root.write(SPEC_FILE, self.spec.canonical())

    @cached_property
    def z_scale(self) -> NDArray[np.float32] | None:
        digest = self.spec.coupling.z_scale_sha256 if self.spec.coupling else None
        if digest is None:
            return None
        data, name = self.root.read(Z_SCALE_FILE, MAX_METADATA_BYTES), f"{self.root.url}/{Z_SCALE_FILE}"
        if sha256(data) != digest:
            raise StoreError(f"{name}: its sha256 is not the one in the spec; delete {self.root.url} and encode again")
        return codecs.parse_positive_npy(data, self.spec.shape, name)

    def is_complete(self) -> bool:
        """Whether dataset.json is there and of this spec, and not of one with fewer draws."""
        return self._published() == self.spec

    def _published(self) -> Spec | None:
        if not self.root.exists("dataset.json"):
            return None
        data = self.root.read("dataset.json", MAX_METADATA_BYTES)
        return parse_dataset(data, f"{self.root.url}/dataset.json").spec

    def list_missing_units(self) -> list[Unit]:
        """The units that need work yet. What it costs grows with them, but for one listing of the commit records."""
        return units.list_missing_units(self.spec, units.list_committed_units(self.root))

    def unit_writer(self, unit: Unit) -> UnitWriter:
        return UnitWriter(self.root, self.spec, unit, self.z_scale)

    def write_block(
        self, block: int, base: Columns, z: NDArray[np.float32] | None, noise: NDArray[Any] | None
    ) -> Commit:
        """One block with all its draws from values at hand: x (rows, C, H, W) and label (rows,) in `base`, z and noise
        (K, rows, C, H, W). A sample store has neither z nor noise, and a store that derives its noise takes none."""
        writing = self.unit_writer(Unit(block, 0, self.spec.draws))
        writing.write_base(base)
        if z is not None:
            for draw, values in enumerate(z):
                writing.write_draw(draw, values, None if noise is None else noise[draw])
        return writing.commit()

    def find_faults(self, unit: Unit) -> list[str]:
        """What is wrong with a committed unit, found by reading back all of its files."""
        return units.find_faults(self.root, self.spec, unit)

    def delete_commit(self, unit: Unit) -> None:
        """Take back the commit record of a unit: it is missing again."""
        with suppress(FileNotFoundError):
            self.root.delete(unit.commit_file)

    def list_unpublished_units(self) -> list[Unit]:
        """Committed units that no complete store vouches for yet."""
        there = self._published()
        done = [unit for unit in sorted(units.list_committed_units(self.root)) if unit.stop <= self.spec.draws]
        return [unit for unit in done if there is None or unit.stop > there.draws]

    def finalize(self, cost: Cost | None = None) -> Dataset:
        """Add up the commits in the order of blocks and draws and write what makes the store complete; dataset.json
        comes last. `cost` is that of the store that this one is a copy of, and else the sum of its units'."""
        found = [unit for unit in sorted(units.list_committed_units(self.root)) if unit.stop <= self.spec.draws]
        assert not units.list_missing_units(self.spec, found), "finalize before every unit was committed"
        with ThreadPoolExecutor(IO_THREADS, "nfm-finalize") as pool:
            commits = list(pool.map(lambda unit: units.read_commit(self.root, self.spec, unit), found))
            sigma_f = self._sigma_f(commits, pool) if self.spec.coupling else None
        if self._published() not in (None, self.spec):
            self.root.delete("dataset.json")  # of fewer draws: the files beside it change now
        counts: dict[int, dict[str, int]] = {commit.block: commit.label_counts for commit in commits}
        records = {FileKey(file.column, file.block, file.draw): file for commit in commits for file in commit.files}
        ordered = [records[key] for key in expected_keys(self.spec)]
        self.root.delete_temporary_files(keep=LEASE_FILE)
        for path, data in self.layout.metadata_files(self.spec).items():
            self.root.write(path, data)
        if sigma_f is not None:
            self.root.write("sigma_f.npy", sigma_f)
            self._write_cost(cost, commits)
        manifest = self._manifest(ordered, counts)
        self.root.write("manifest.parquet", manifest)
        totals: Counter[int] = Counter()
        for labels in counts.values():
            totals.update({int(label): count for label, count in labels.items()})
        dataset = Dataset(
            schema_version=SCHEMA_VERSION,
            id=content_id(self.spec, [file.sha256 for file in ordered]),
            spec=self.spec,
            totals=Totals(
                files=len(ordered),
                bytes=sum(file.bytes for file in ordered),
                label_counts={str(label): totals[label] for label in sorted(totals)},
                z_rms_error=z_rms_error(self.spec, ordered),
            ),
            records=self.layout.describe_records(self.spec),
            manifest_sha256=sha256(manifest),
            sigma_f_sha256=None if sigma_f is None else sha256(sigma_f),
        )
        self.root.write("README.md", readme(dataset).encode())
        self.root.write("croissant.json", canonical_json(croissant(dataset)))
        self.root.write("dataset.json", canonical_json(dataset.model_dump(mode="json")))
        return dataset

    def _sigma_f(self, commits: list[Commit], pool: ThreadPoolExecutor) -> bytes:
        """sigma_f.npy. The sums are added block by block and draw by draw, whatever units they came in."""
        total = np.zeros(self.spec.shape, dtype=np.float64)
        sums = pool.map(lambda commit: units.read_sum_z2(self.root, self.spec, commit), commits)
        block, added = -1, 0  # of which that many draws are in; units that overlap say the same twice
        for commit, here in zip(commits, sums, strict=True):
            block, added = (block, added) if commit.block == block else (commit.block, 0)
            for draw in range(max(added, commit.first), commit.stop):
                total += here[draw]
                added = draw + 1
        sigma_f = np.sqrt(total / (self.spec.rows * self.spec.draws)).astype(np.float32)
        if not ((sigma_f > codecs.MIN_SCALE) & (sigma_f < codecs.MAX_SCALE)).all():
            raise FloatingPointError(
                f"σ_f is not between {codecs.MIN_SCALE} and {codecs.MAX_SCALE} in some dimension: the "
                "teacher's z is constant or wild there"
            )
        return npy_bytes(sigma_f)

    def _write_cost(self, cost: Cost | None, commits: list[Commit]) -> None:
        seconds: dict[str, float] = {}
        for commit in commits:
            seconds[commit.device] = seconds.get(commit.device, 0.0) + commit.seconds
        told = cost or Cost(seconds=seconds)
        self.root.write("cost.json", canonical_json(told.model_dump(mode="json")))

    def _manifest(self, ordered: list[FileRecord], counts: dict[int, dict[str, int]]) -> bytes:
        rows = [
            {
                "column": file.column,
                "draw": file.draw,
                "block": file.block,
                "first_index": file.block * self.spec.block_rows,
                "rows": self.spec.rows_of(file.block),
                "path": file.path,
                "bytes": file.bytes,
                "sha256": file.sha256,
                "label_counts": [(int(label), count) for label, count in counts[file.block].items()]
                if file.column == "x"  # repeated a thousandfold, they would be most of the manifest
                else [],
                "squared_error": file.squared_error,
            }
            for file in ordered
        ]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=FILE_SCHEMA), buffer, compression="zstd")
        return buffer.getvalue()
