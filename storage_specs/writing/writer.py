"""Writing a store unit by unit, so that after any crash the same command continues.

Order of writes: spec.json; for each unit its files and then its commit record; at last the files of the version, its
document, and the copies of the newest version's documents, of which dataset.json is the last. No file is trusted before
the record that follows it was written.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nfm.storage_specs.format import codecs
from nfm.storage_specs.format.attribution import UNKNOWN, Attribution
from nfm.storage_specs.format.commits import Commit, Cost, StartedStore
from nfm.storage_specs.format.dataset import check_kind_is_supported
from nfm.storage_specs.format.image_names import ImageName, hash_rows
from nfm.storage_specs.format.layouts import LAYOUTS, Columns
from nfm.storage_specs.format.manifest import FileKey, encode_manifest, expected_keys
from nfm.storage_specs.format.names import (
    COST_FILE,
    DATASET_FILE,
    LEASE_FILE,
    MAX_METADATA_BYTES,
    SIGMA_F_NAME,
    SPEC_FILE,
    Z_CLASS_SUMS_NAME,
    Z_SCALE_FILE,
    Z_SUMS_NAME,
    version_file,
)
from nfm.storage_specs.format.schema import SCHEMA_VERSION, Dataset, Spec, read_schema_version
from nfm.storage_specs.format.sums import ZSums, sigma_f
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.verify import find_faults
from nfm.storage_specs.reading.versions import check_no_version
from nfm.storage_specs.storage.documents import canonical_json, list_differences, load_json, make_document, parse_json
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import IO_THREADS, Root, sha256
from nfm.storage_specs.storage.messages import list_fields
from nfm.storage_specs.storage.npy import npy_bytes
from nfm.storage_specs.writing import units
from nfm.storage_specs.writing.claims import check_unclaimed
from nfm.storage_specs.writing.publish import Content, publish, read_newest_version, restore_newest_version
from nfm.storage_specs.writing.units import Unit, UnitWriter


def read_started_spec(url: str, options: dict[str, Any] | None = None) -> Spec | None:
    """The spec of the store at a URL, complete or not; None if no writer has started one there. Raises StoreError for a
    store that this nfm does not write: of schema 1.0, or with another kind of coupling."""
    started = read_started(Root(url, options))
    return started.spec if started else None


def read_started(root: Root) -> StartedStore | None:
    """`commits/spec.json` of a folder; None if there is none. Raises StoreError as `read_started_spec` does."""
    if not root.exists(SPEC_FILE):
        return None
    name, data = f"{root.url}/{SPEC_FILE}", root.read(SPEC_FILE, MAX_METADATA_BYTES)
    if _is_spec_of_1_0(data, name):
        if not root.exists(DATASET_FILE):
            raise StoreError(
                f"{root.url}: holds an unfinished store of schema 1.0, which this nfm cannot continue; "
                "write to another URL"
            )
        raise StoreError(
            f"{root.url}: holds a store of schema 1.0, which nfm reads and does not write; write it as schema 1.1 with "
            f"nfm store convert {root.url} NEW --layout …, and run the same command with --out NEW"
        )
    read_schema_version(data, name)
    started = parse_json(StartedStore, data, name)
    check_kind_is_supported(started.spec, name)
    return started


def _is_spec_of_1_0(data: bytes, name: str) -> bool:
    """Whether a spec.json is of schema 1.0: a spec itself, which does not say its schema."""
    document = load_json(data, name)
    return isinstance(document, dict) and "block_rows" in document and "schema_version" not in document


class StoreWriter:
    """Writes the store with `spec` at a URL; there is no other way to write one. Several writers, also on several
    machines, may write different units of one store at the same time.

    Raises StoreError if the URL names a version, or if stores of this kind of coupling cannot be written yet.
    """

    def __init__(self, url: str, spec: Spec, options: dict[str, Any] | None = None) -> None:
        check_no_version(url, options)
        check_kind_is_supported(spec, url)
        self.root, self.options = Root(url, options), options
        # Checked again: a copy with other values was not.
        self.spec = make_document(Spec, {name: getattr(spec, name) for name in Spec.model_fields}, url)
        self.layout = LAYOUTS[spec.layout]

    def initialize(self, z_scale: NDArray[np.float32] | None = None, converted_from: str | None = None) -> None:
        """Start the store at the URL, or continue the one that was started there, or add draws to it.

        `z_scale`, float32 (C, H, W), is the scale whose sha256 is in the spec of an int8 store. `converted_from` is the
        id of the store whose values will be written, where the spec alone does not determine them. Raises StoreError,
        with the fields that differ, if the URL holds a store with another spec, or a conversion of another store, or
        something else.
        """
        existing = read_started(self.root)
        started = StartedStore(schema_version=SCHEMA_VERSION, spec=self.spec, converted_from=converted_from)
        if existing is None:
            check_unclaimed(self.root)
            if z_scale is not None:
                self.root.write(Z_SCALE_FILE, npy_bytes(z_scale))
        else:
            same_lineage = existing.spec.lineage == self.spec.lineage
            adds_draws = same_lineage and existing.spec.num_draws < self.spec.num_draws
            if existing.spec != self.spec and not adds_draws:
                self._raise_spec_differs(existing.spec, same_lineage)
            if converted_from not in (None, existing.converted_from):
                raise StoreError(
                    f"{self.root.url}: holds another store with the same spec, not one that was converted from "
                    f"{converted_from[:12]}. Write to another URL, or delete it first"
                )
            started = started.model_copy(update={"converted_from": existing.converted_from})
        if existing != started:
            self.root.write(SPEC_FILE, canonical_json(started.model_dump(mode="json")))

    def _raise_spec_differs(self, existing: Spec, same_lineage: bool) -> NoReturn:
        fields = list_differences(self.spec.model_dump(mode="json"), existing.model_dump(mode="json"))
        hint = " (draws can be added, not taken away)" if same_lineage else ""
        raise StoreError(
            f"{self.root.url}: holds another store: {list_fields(fields)}{hint}. "
            "Write to another URL, or delete it first"
        )

    @cached_property
    def z_scale(self) -> NDArray[np.float32] | None:
        """The step of int8 z in each dimension, float32 (C, H, W), as `initialize` wrote it; None for other dtypes.
        Raises StoreError if the file is not the one of the spec."""
        digest = self.spec.nfm.z_scale_sha256 if self.spec.coupling else None
        if digest is None:
            return None
        data, name = self.root.read(Z_SCALE_FILE, MAX_METADATA_BYTES), f"{self.root.url}/{Z_SCALE_FILE}"
        if sha256(data) != digest:
            raise StoreError(f"{name}: its sha256 is not the one in the spec; delete {self.root.url} and encode again")
        return codecs.parse_positive_npy(data, self.spec.shape, name)

    def is_complete(self) -> bool:
        """Whether the newest version has this spec, and no unit waits to be written again after a repair. A version
        with fewer draws does not count."""
        newest = self.read_newest()
        if newest is None or newest.spec != self.spec:
            return False
        return not self.root.exists(SPEC_FILE) or not self.list_missing_units()

    def read_newest(self) -> Dataset | None:
        """The newest version; None if there is no dataset.json. Raises StoreError if its documents do not agree."""
        return Store(self.root.url, options=self.options).dataset if self.root.exists(DATASET_FILE) else None

    def list_missing_units(self) -> list[Unit]:
        """The units that still have to be written. Takes one listing of the commit records."""
        return units.list_missing_units(self.spec, units.list_committed_units(self.root, self.spec))

    def read_back(self, progress: Callable[[int], None] = lambda _rows: None) -> list[Unit]:
        """Read all committed units, and delete the commit records of the damaged ones. Returns the units that still
        have to be written. `progress` gets the rows of each unit that was read."""
        with ThreadPoolExecutor(IO_THREADS, "nfm-check") as pool:
            written = units.list_committed_units(self.root, self.spec)
            for unit, faults in zip(written, pool.map(self.find_faults, written), strict=True):
                progress(self.spec.rows_of(unit.block))
                if faults:
                    self.delete_commit(unit)
        return self.list_missing_units()

    def list_unpublished_units(self) -> list[Unit]:
        """The committed units whose draws the newest version, if there is one, does not have yet."""
        newest = self.read_newest()
        committed = units.list_committed_units(self.root, self.spec)
        if newest is None:
            return committed
        return [unit for unit in committed if unit.stop > newest.spec.num_draws]

    def unit_writer(self, unit: Unit, labels: NDArray[np.int64]) -> UnitWriter:
        """The object that writes the files and the commit record of one unit, whose block has these labels (rows,)."""
        return UnitWriter(self.root, self.spec, unit, labels, self.z_scale)

    def write_block(
        self,
        block: int,
        base: Columns,
        z: NDArray[np.float32] | None,
        noise: NDArray[Any] | None,
        names: list[ImageName] | None = None,
    ) -> Commit:
        """Write and commit one block with all its draws.

        `base` has label (rows,), and x (rows, C, H, W) in its stored dtype, with x_mirrored where the spec has it; `z`
        and `noise` are (K, rows, C, H, W). In a sample store both are None; `noise` is also None in a store that does
        not hold the noise.
        """
        unit_writer = self.unit_writer(Unit(block, 0, self.spec.num_draws), base["label"])
        unit_writer.write_base(base, names)
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

    def finalize(
        self,
        cost: Cost | None = None,
        attribution: Attribution = UNKNOWN,
        inherited: Attribution = UNKNOWN,
        is_repair: bool = False,
    ) -> Dataset:
        """Make the store complete, once every unit is committed: add up the commit records in the order of blocks and
        draws, and publish a version with σ_f, the sums over z, the names of the images, manifest and cards. If the
        newest version is the same, as after a repair that gave the same bytes, that one is published again.

        `cost` is that of the source, for a store that was converted; else the seconds of the units are added up.
        The attribution is that of the version before, or for the first version `inherited`, with every field that
        `attribution` gives. Unless it `is_repair`, the commit records must be those of which the newest version was
        made. Raises StoreError if they are not or if one is damaged, FloatingPointError if σ_f is out of range.
        """
        with ThreadPoolExecutor(IO_THREADS, "nfm-finalize") as pool:
            commits = self._read_commits(pool)
            must_verify = not is_repair and self._compare_with_published(commits, pool)
            self.root.delete_temporary_files(keep=LEASE_FILE)
            if self.spec.coupling:
                cost = cost or _sum_cost(commits)
                self.root.write(COST_FILE, canonical_json(cost.model_dump(mode="json")))
            dataset = publish(
                self.root, self.spec, lambda spec: self._content(spec, commits, pool), attribution, inherited
            )
        if must_verify and (faults := list(find_faults(Store(self.root.url, options=self.options)))):
            self.root.delete(DATASET_FILE)
            self.root.delete(version_file(dataset.version))
            raise StoreError(
                f"{faults[0].message}. Its commit records say the same, so nothing tells which block is wrong: "
                "write the store again to another URL"
            )
        return dataset

    def _content(self, spec: Spec, commits: list[Commit], pool: ThreadPoolExecutor) -> Content:
        """The content of a version with `spec`, which has the draws of this writer or fewer. `commits` are in the order
        of blocks and draws."""
        derived = self._derived_files(spec, commits, pool) if spec.coupling else {}
        records = {FileKey(file.column, file.block, file.draw): file for commit in commits for file in commit.files}
        files = [records[key] for key in expected_keys(spec, self.layout)]
        counts_of_block = {commit.block: commit.label_counts for commit in reversed(commits)}  # of its first draws
        label_counts = [
            {int(label): count for label, count in counts_of_block[block].items()} for block in range(spec.num_blocks)
        ]
        return Content(
            spec=spec,
            files=files,
            label_counts=label_counts,
            manifest=encode_manifest(spec, files, label_counts),
            names=self._collect_names(commits, pool) if spec.names else None,
            sigma_f=derived.get(SIGMA_F_NAME),
            z_sums=derived.get(Z_SUMS_NAME),
            z_class_sums=derived.get(Z_CLASS_SUMS_NAME),
        )

    def _compare_with_published(self, commits: list[Commit], pool: ThreadPoolExecutor) -> bool:
        """Raise StoreError if the commit records are not those that the newest version was made of, as far as it has
        draws: they are outside the id, and what follows from them would be published. The document of the newest
        version is written again from dataset.json if it is damaged.

        Returns whether all files must be read once more: after a repair, records may differ because files do.
        """
        if self.root.exists(DATASET_FILE):
            self._compare_with(Store(self.root.url, options=self.options), commits, pool)
            restore_newest_version(Store(self.root.url, options=self.options))
            return False
        newest = read_newest_version(self.root)
        if newest is None or newest.spec.lineage != self.spec.lineage or newest.spec.num_draws > self.spec.num_draws:
            return False
        content = self._content(newest.spec, commits, pool)
        names = newest.documents.names
        if names is not None and content.names is not None and hash_rows(content.names) != names.rows_sha256:
            raise self._foreign_records_error(newest)
        return content.id() != newest.id

    def _compare_with(self, published: Store, commits: list[Commit], pool: ThreadPoolExecutor) -> None:
        """Raise StoreError unless a version is what follows from the commit records."""
        if self._content(published.spec, commits, pool).id() != published.dataset.id:
            raise self._foreign_records_error(published.dataset)

    def _foreign_records_error(self, published: Dataset) -> StoreError:
        return StoreError(
            f"{self.root.url}: its commit records are not those that version {published.version} was made of: somebody "
            "changed them, or the documents. Copy the store from its source, or write it again to another URL"
        )

    def check_commits(self, published: Store) -> None:
        """Raise StoreError unless a version is what follows from the commit records."""
        with ThreadPoolExecutor(IO_THREADS, "nfm-check") as pool:
            self._compare_with(published, self._read_commits(pool), pool)

    def _read_commits(self, pool: ThreadPoolExecutor) -> list[Commit]:
        """The commit records, in the order of blocks and draws. Raises StoreError if one is damaged."""
        committed = units.list_committed_units(self.root, self.spec)
        assert not units.list_missing_units(self.spec, committed), "finalize before every unit was committed"
        return list(pool.map(lambda unit: units.read_commit(self.root, self.spec, unit), committed))

    def _derived_files(self, spec: Spec, commits: list[Commit], pool: ThreadPoolExecutor) -> dict[str, bytes]:
        """The files that are computed from z of the draws of `spec`, by name."""
        sums = self._add_sums(commits, pool, spec.num_draws)
        scale = sigma_f(spec, sums)
        if not ((scale > codecs.MIN_SCALE) & (scale < codecs.MAX_SCALE)).all():
            raise FloatingPointError(
                f"σ_f is not between {codecs.MIN_SCALE} and {codecs.MAX_SCALE} in some dimension: "
                "the teacher's z is (almost) zero, or far too large there"
            )
        derived = {SIGMA_F_NAME: npy_bytes(scale), Z_SUMS_NAME: npy_bytes(sums.by_dimension)}
        if self.spec.has_labels:
            derived[Z_CLASS_SUMS_NAME] = npy_bytes(sums.by_class)
        return derived

    def _collect_names(self, commits: list[Commit], pool: ThreadPoolExecutor) -> pa.Table:
        """The names of all images."""
        with_names = {commit.block: commit for commit in commits if commit.first == 0}
        in_order = [with_names[block] for block in range(self.spec.num_blocks)]
        return pa.concat_tables(pool.map(lambda commit: units.read_image_names(self.root, self.spec, commit), in_order))

    def _add_sums(self, commits: list[Commit], pool: ThreadPoolExecutor, num_draws: int) -> ZSums:
        """The sums over z of the data set and its first draws.

        They are added block by block and draw by draw, so that the bits do not depend on the units they came in.
        Units may overlap, after two drivers ran at the same time; their sums of one draw are equal, and one of them is
        taken.
        """
        total = ZSums.zero(self.spec)
        sums_of_units = pool.map(lambda commit: units.read_z_sums(self.root, self.spec, commit), commits)
        block = -1
        num_added_draws = 0  # of this block
        for commit, sums_by_draw in zip(commits, sums_of_units, strict=True):
            if commit.block != block:
                block = commit.block
                num_added_draws = 0
            for draw in range(max(num_added_draws, commit.first), min(commit.stop, num_draws)):
                total.add(sums_by_draw[draw])
                num_added_draws = draw + 1
        return total


def _sum_cost(commits: Iterable[Commit]) -> Cost:
    """The seconds in the commit records, added up for each device."""
    seconds: dict[str, float] = {}
    for commit in commits:
        seconds[commit.device] = seconds.get(commit.device, 0.0) + commit.seconds
    return Cost(seconds=seconds)
