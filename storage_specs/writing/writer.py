"""Writing a store unit by unit, so that after any crash the same command continues.

Order of writes: spec.json; for each unit its files and then its commit record; at last manifest, σ_f, cards and
dataset.json. No file is trusted before the record that follows it was written.
"""

import io
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nfm.storage_specs.format import codecs
from nfm.storage_specs.format.card import croissant, readme
from nfm.storage_specs.format.layouts import LAYOUTS, Columns
from nfm.storage_specs.format.manifest import FILE_SCHEMA, FileKey, expected_keys, z_rms_error
from nfm.storage_specs.format.names import (
    COST_FILE,
    CROISSANT_FILE,
    DATASET_FILE,
    LEASE_FILE,
    MANIFEST_FILE,
    MAX_METADATA_BYTES,
    README_FILE,
    SIGMA_F_FILE,
    SPEC_FILE,
    Z_SCALE_FILE,
)
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
    """The spec of the store at a URL, complete or not; None if no writer has started one there."""
    root = Root(url, options)
    if not root.exists(SPEC_FILE):
        return None
    return parse_json(Spec, root.read(SPEC_FILE, MAX_METADATA_BYTES), f"{root.url}/{SPEC_FILE}")


class StoreWriter:
    """Writes the store with `spec` at a URL; there is no other way to write one. Several writers, also on several
    machines, may write different units of one store at the same time."""

    def __init__(self, url: str, spec: Spec, options: dict[str, Any] | None = None) -> None:
        self.root, self.options = Root(url, options), options
        self.spec = spec
        self.layout = LAYOUTS[spec.layout]

    def initialize(self, z_scale: NDArray[np.float32] | None = None) -> None:
        """Start the store at the URL, or continue the one that was started there, or add draws to it.

        `z_scale`, float32 (C, H, W), is the scale whose sha256 is in the spec of an int8 store. Raises StoreError, with
        the fields that differ, if the URL holds a store with another spec.
        """
        existing = read_started_spec(self.root.url, self.options)
        if existing is not None:
            same_lineage = existing.lineage == self.spec.lineage
            adds_draws = same_lineage and existing.draws < self.spec.draws
            if existing != self.spec and not adds_draws:
                self._raise_spec_differs(existing, same_lineage)
            if adds_draws:
                self.root.write(SPEC_FILE, self.spec.to_json())
        elif self.root.exists(DATASET_FILE):
            raise StoreError(f"{self.root.url}: holds a dataset.json without a {SPEC_FILE}; write to another URL")
        else:
            if z_scale is not None:
                self.root.write(Z_SCALE_FILE, npy_bytes(z_scale))
            self.root.write(SPEC_FILE, self.spec.to_json())

    def _raise_spec_differs(self, existing: Spec, same_lineage: bool) -> NoReturn:
        fields = list_differences(self.spec.model_dump(mode="json"), existing.model_dump(mode="json"))
        hint = " (draws can be added, not taken away)" if same_lineage else ""
        raise StoreError(
            f"{self.root.url}: holds another store: {'; '.join(fields)}{hint}. Write to another URL, or delete it first"
        )

    @cached_property
    def z_scale(self) -> NDArray[np.float32] | None:
        """The step of int8 z in each dimension, float32 (C, H, W), as `initialize` wrote it; None for other dtypes.
        Raises StoreError if the file is not the one of the spec."""
        digest = self.spec.coupling.z_scale_sha256 if self.spec.coupling else None
        if digest is None:
            return None
        data, name = self.root.read(Z_SCALE_FILE, MAX_METADATA_BYTES), f"{self.root.url}/{Z_SCALE_FILE}"
        if sha256(data) != digest:
            raise StoreError(f"{name}: its sha256 is not the one in the spec; delete {self.root.url} and encode again")
        return codecs.parse_positive_npy(data, self.spec.shape, name)

    def is_complete(self) -> bool:
        """Whether there is a dataset.json with this spec. One with fewer draws does not count."""
        return self._read_published_spec() == self.spec

    def _read_published_spec(self) -> Spec | None:
        """The spec in dataset.json; None if there is no such file."""
        if not self.root.exists(DATASET_FILE):
            return None
        data = self.root.read(DATASET_FILE, MAX_METADATA_BYTES)
        return parse_dataset(data, f"{self.root.url}/{DATASET_FILE}").spec

    def list_missing_units(self) -> list[Unit]:
        """The units that still have to be written. Takes one listing of the commit records."""
        return units.list_missing_units(self.spec, units.list_committed_units(self.root))

    def _list_own_committed_units(self) -> list[Unit]:
        """The committed units with draws of this spec, in order; others may be of a driver that adds more draws."""
        return [unit for unit in sorted(units.list_committed_units(self.root)) if unit.stop <= self.spec.draws]

    def list_unpublished_units(self) -> list[Unit]:
        """The committed units whose draws dataset.json, if there is one, does not have yet."""
        published = self._read_published_spec()
        committed = self._list_own_committed_units()
        if published is None:
            return committed
        return [unit for unit in committed if unit.stop > published.draws]

    def unit_writer(self, unit: Unit) -> UnitWriter:
        """The object that writes the files and the commit record of one unit."""
        return UnitWriter(self.root, self.spec, unit, self.z_scale)

    def write_block(
        self, block: int, base: Columns, z: NDArray[np.float32] | None, noise: NDArray[Any] | None
    ) -> Commit:
        """Write and commit one block with all its draws.

        `base` has x (rows, C, H, W) and label (rows,); `z` and `noise` are (K, rows, C, H, W). In a sample store both
        are None; `noise` is also None in a store that does not hold the noise.
        """
        unit_writer = self.unit_writer(Unit(block, 0, self.spec.draws))
        unit_writer.write_base(base)
        if z is not None:
            for draw, z_of_draw in enumerate(z):
                unit_writer.write_draw(draw, z_of_draw, None if noise is None else noise[draw])
        return unit_writer.commit()

    def find_faults(self, unit: Unit) -> list[str]:
        """What is wrong with a committed unit, one sentence for each damaged file; all of them are read."""
        return units.find_faults(self.root, self.spec, unit)

    def delete_commit(self, unit: Unit) -> None:
        """Delete the commit record of a unit, if there is one: the unit is missing again."""
        with suppress(FileNotFoundError):
            self.root.delete(unit.commit_file)

    def finalize(self, cost: Cost | None = None) -> Dataset:
        """Make the store complete, once every unit is committed: add up the commit records in the order of blocks and
        draws, and write σ_f, the manifest, the cards and, last, dataset.json.

        `cost` is that of the source, for a store that was converted; else the seconds of the units are added up. Raises
        StoreError if a commit record is damaged, FloatingPointError if σ_f is out of range.
        """
        committed = self._list_own_committed_units()
        assert not units.list_missing_units(self.spec, committed), "finalize before every unit was committed"
        with ThreadPoolExecutor(IO_THREADS, "nfm-finalize") as pool:
            commits = list(pool.map(lambda unit: units.read_commit(self.root, self.spec, unit), committed))
            sigma_f = self._compute_sigma_f(commits, pool) if self.spec.coupling else None
        if self._read_published_spec() not in (None, self.spec):
            self.root.delete(DATASET_FILE)  # it has fewer draws, and the files beside it change now
        records = {FileKey(file.column, file.block, file.draw): file for commit in commits for file in commit.files}
        files = [records[key] for key in expected_keys(self.spec)]
        block_label_counts = {commit.block: commit.label_counts for commit in commits}
        self.root.delete_temporary_files(keep=LEASE_FILE)
        for path, data in self.layout.metadata_files(self.spec).items():
            self.root.write(path, data)
        sigma_f_data = None
        if sigma_f is not None:
            sigma_f_data = npy_bytes(sigma_f)
            self.root.write(SIGMA_F_FILE, sigma_f_data)
            cost = cost or _sum_cost(commits)
            self.root.write(COST_FILE, canonical_json(cost.model_dump(mode="json")))
        manifest = self._manifest(files, block_label_counts)
        self.root.write(MANIFEST_FILE, manifest)
        dataset = Dataset(
            schema_version=SCHEMA_VERSION,
            id=content_id(self.spec, [file.sha256 for file in files]),
            spec=self.spec,
            totals=Totals(
                files=len(files),
                bytes=sum(file.bytes for file in files),
                label_counts=_sum_label_counts(block_label_counts.values()),
                z_rms_error=z_rms_error(self.spec, files),
            ),
            records=self.layout.describe_records(self.spec),
            manifest_sha256=sha256(manifest),
            sigma_f_sha256=None if sigma_f_data is None else sha256(sigma_f_data),
        )
        self.root.write(README_FILE, readme(dataset).encode())
        self.root.write(CROISSANT_FILE, canonical_json(croissant(dataset)))
        self.root.write(DATASET_FILE, canonical_json(dataset.model_dump(mode="json")))
        return dataset

    def _compute_sigma_f(self, commits: list[Commit], pool: ThreadPoolExecutor) -> NDArray[np.float32]:
        """σ_f = √(mean of z²), float32 (C, H, W), over the data set and draws.

        The sums are added block by block and draw by draw, so that the bits do not depend on the units they came in.
        `commits` are in the order of blocks and draws. Units may overlap, after two drivers ran at the same time; their
        sums of one draw are equal, and one of them is taken.
        """
        total = np.zeros(self.spec.shape, dtype=np.float64)
        sums = pool.map(lambda commit: units.read_sum_z2(self.root, self.spec, commit), commits)
        block = -1
        num_added_draws = 0  # of this block
        for commit, sum_z2 in zip(commits, sums, strict=True):
            if commit.block != block:
                block = commit.block
                num_added_draws = 0
            for draw in range(max(num_added_draws, commit.first), commit.stop):
                total += sum_z2[draw]
                num_added_draws = draw + 1
        sigma_f: NDArray[np.float32] = np.sqrt(total / (self.spec.rows * self.spec.draws)).astype(np.float32)
        if not ((sigma_f > codecs.MIN_SCALE) & (sigma_f < codecs.MAX_SCALE)).all():
            raise FloatingPointError(
                f"σ_f is not between {codecs.MIN_SCALE} and {codecs.MAX_SCALE} in some dimension: "
                "the teacher's z is (almost) zero, or far too large there"
            )
        return sigma_f

    def _manifest(self, files: list[FileRecord], block_label_counts: dict[int, dict[str, int]]) -> bytes:
        """The content of manifest.parquet."""
        rows = []
        for file in files:
            # Label counts stand only in the rows of x: in every row, they would be most of the manifest.
            label_counts = block_label_counts[file.block] if file.column == "x" else {}
            rows.append(
                {
                    "column": file.column,
                    "draw": file.draw,
                    "block": file.block,
                    "first_index": file.block * self.spec.block_rows,
                    "rows": self.spec.rows_of(file.block),
                    "path": file.path,
                    "bytes": file.bytes,
                    "sha256": file.sha256,
                    "label_counts": [(int(label), count) for label, count in label_counts.items()],
                    "squared_error": file.squared_error,
                }
            )
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=FILE_SCHEMA), buffer, compression="zstd")
        return buffer.getvalue()


def _sum_cost(commits: list[Commit]) -> Cost:
    """The seconds in the commit records, added up for each device."""
    seconds: dict[str, float] = {}
    for commit in commits:
        seconds[commit.device] = seconds.get(commit.device, 0.0) + commit.seconds
    return Cost(seconds=seconds)


def _sum_label_counts(counts_of_blocks: Iterable[dict[str, int]]) -> dict[str, int]:
    """The number of images of each class, in the order of the classes."""
    totals: Counter[int] = Counter()
    for counts in counts_of_blocks:
        totals.update({int(label): count for label, count in counts.items()})
    return {str(label): totals[label] for label in sorted(totals)}
