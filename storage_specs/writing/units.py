"""Units: what one commit record makes durable. A unit is a block with some of its draws; that of the first draws also
holds x and the labels. Adding draws to a store adds units, and touches no file that is there."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nfm.storage_specs.format import codecs
from nfm.storage_specs.format.layouts import LAYOUTS, Columns
from nfm.storage_specs.format.manifest import FileKey
from nfm.storage_specs.format.schema import Commit, FileRecord, Spec
from nfm.storage_specs.storage.documents import parse_sealed_json, sealed_json
from nfm.storage_specs.storage.errors import StorageError, StoreError
from nfm.storage_specs.storage.files import Root, sha256
from nfm.storage_specs.storage.npy import npy_bytes, npy_header

MAX_COMMIT_BYTES = 1 << 26
_NAME = re.compile(r"(\d{6,})\.k(\d{3,})-(\d{3,})\.json")


@dataclass(frozen=True, order=True)
class Unit:
    """Draws `first` … `stop` - 1 of a block; none, of a sample store."""

    block: int
    first: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.block:06d}.k{self.first:03d}-{self.stop:03d}"

    @property
    def commit_file(self) -> str:
        return f"commits/{self.name}.json"

    @property
    def sum_z2_file(self) -> str:
        return f"sum_z2/{self.name}.npy"

    @property
    def draws(self) -> range:
        return range(self.first, self.stop)

    def contains(self, key: FileKey) -> bool:
        """Whether a file of the store is one of this unit."""
        return key.block == self.block and (key.draw in self.draws or (key.draw < 0 and self.first == 0))


def list_committed_units(root: Root) -> set[Unit]:
    """The units that have a commit record: one listing, whatever their number."""
    matches = (_NAME.fullmatch(name) for name in root.list_names("commits"))
    return {Unit(int(match[1]), int(match[2]), int(match[3])) for match in matches if match}


def list_missing_units(spec: Spec, done: Iterable[Unit]) -> list[Unit]:
    """The units that complete a store, in order: each run of draws that no commit covers."""
    covered: dict[int, set[int]] = {}
    for unit in done:
        covered.setdefault(unit.block, set()).update(unit.draws if spec.draws else (0,))
    units: list[Unit] = []
    for block in range(spec.blocks):
        there = covered.get(block, set())
        if not spec.draws and not there:
            units.append(Unit(block, 0, 0))
        draw = 0
        while len(there) < spec.draws and draw < spec.draws:
            stop = draw
            while stop < spec.draws and stop not in there:
                stop += 1
            if stop > draw:
                units.append(Unit(block, draw, stop))
            draw = stop + 1
    return units


class NonFiniteError(FloatingPointError):
    """z of some images is not finite, or too large for its dtype. `images` are their indices."""

    def __init__(self, images: list[int], draw: int, dtype: str) -> None:
        super().__init__(f"z of image {images[0]}, draw {draw}, is not finite as {dtype}; nothing of it was written")
        self.images = images


class UnitWriter:
    """Writes the files of one unit, in any order and from any thread, and at last its commit record."""

    def __init__(self, root: Root, spec: Spec, unit: Unit, z_scale: NDArray[np.float32] | None) -> None:
        self.root, self.spec, self.unit, self.z_scale = root, spec, unit, z_scale
        self.layout = LAYOUTS[spec.layout]
        self.files: dict[FileKey, FileRecord] = {}
        self.sum_z2: dict[int, NDArray[np.float64]] = {}
        self.labels: NDArray[np.int64] | None = None

    def write_base(self, columns: Columns) -> None:
        """x (rows, C, H, W) uint8 and label (rows,) int64. They are written with draw 0, and counted with any."""
        self.labels = columns["label"]
        self.spec.check_labels(self.labels, f"{self.root.url} block {self.unit.block}")
        if self.unit.first == 0:
            for kind in self.layout.base_kinds:
                self._put(FileKey(kind, self.unit.block), columns)

    def write_draw(self, draw: int, z: NDArray[np.float32], noise: NDArray[Any] | None) -> None:
        """z (rows, C, H, W) float32 as the teacher gave it, and the noise that it saw, in the dtype of the spec (None
        where noise is derived). Raises NonFiniteError, and then has written nothing of the draw."""
        coupling = self.spec.coupling
        assert coupling is not None and z.dtype == np.float32
        stored = codecs.encode_z(z, coupling.z_dtype, self.z_scale)
        if not (np.isfinite(z).all() and codecs.all_finite(stored)):
            decoded = codecs.decode_z(stored, coupling.z_dtype, self.z_scale)
            most = np.maximum(np.abs(z), np.abs(decoded)).reshape(len(z), -1).max(axis=1)  # NaN stays NaN
            bad = np.flatnonzero(~(most < codecs.MAX_MAGNITUDE))
            raise NonFiniteError(self.spec.indices(self.unit.block)[bad].tolist(), draw, coupling.z_dtype)
        decoded = codecs.decode_z(stored, coupling.z_dtype, self.z_scale)
        error = float(np.square(decoded.astype(np.float64) - z).sum())
        self.write_stored_draw(draw, stored, noise, error)

    def write_stored_draw(self, draw: int, z: NDArray[Any], noise: NDArray[Any] | None, squared_error: float) -> None:
        """`draw` for z as it is stored, of which `squared_error` is known."""
        spec, block = self.spec, self.unit.block
        assert spec.coupling is not None and draw in self.unit.draws
        planes = {name: plane for name, plane in (("z", z), ("noise", noise)) if plane is not None}
        assert tuple(planes) == spec.planes
        for name, plane in planes.items():
            assert plane.shape == (spec.rows_of(block), *spec.shape)
            assert plane.dtype == spec.dtype(name) and codecs.all_finite(plane)
            self._put(FileKey(name, block, draw), {name: plane}, squared_error if name == "z" else None)
        # Of the *stored* values, in float64 and draw by draw: σ_f needs no second pass, anyone can check it, and it has
        # the same bits however the draws were spread over units.
        decoded = codecs.decode_z(z, spec.coupling.z_dtype, self.z_scale)
        self.sum_z2[draw] = np.square(decoded.astype(np.float64)).sum(axis=0)

    def _put(self, key: FileKey, columns: Columns, squared_error: float | None = None) -> None:
        data = self.layout.encode_file(self.spec, key.column, key.block, columns)
        assert len(data) == self.layout.file_size(self.spec, key.column, self.spec.rows_of(key.block))
        self._write(key, self.layout.file_path(key.column, key.block, key.draw), data, squared_error)

    def _write(self, key: FileKey, path: str, data: bytes, squared_error: float | None = None) -> None:
        self.root.write(path, data)
        self.files[key] = FileRecord(
            column=key.column,
            draw=key.draw,
            block=key.block,
            path=path,
            bytes=len(data),
            sha256=sha256(data),
            squared_error=squared_error,
        )

    def commit(self, seconds: float = 0.0, device: str = "") -> Commit:
        """Write the record, after which the unit needs no more work."""
        unit, sums = self.unit, FileKey("sum_z2", self.unit.block)
        assert self.labels is not None and set(self.sum_z2) == set(unit.draws)
        if unit.draws:
            self._write(sums, unit.sum_z2_file, npy_bytes(np.stack([self.sum_z2[draw] for draw in unit.draws])))
        counts = Counter(self.labels.tolist())
        commit = Commit(
            lineage=self.spec.lineage,
            block=unit.block,
            first=unit.first,
            stop=unit.stop,
            rows=self.spec.rows_of(unit.block),
            files=[self.files[key] for key in sorted(self.files, key=lambda key: (key.column, key.draw))],
            label_counts={str(label): counts[label] for label in sorted(counts)},
            seconds=seconds,
            device=device,
        )
        self.root.write(unit.commit_file, sealed_json(commit.model_dump(mode="json")))
        return commit


def read_commit(root: Root, spec: Spec, unit: Unit) -> Commit:
    """Raises StoreError unless it is there, whole, and of this store."""
    name = f"{root.url}/{unit.commit_file}"
    if unit.block >= spec.blocks or unit.stop > spec.draws:
        raise StoreError(f"{name}: it was written for another store; delete {root.url} and encode again")
    commit = parse_sealed_json(Commit, root.read(unit.commit_file, MAX_COMMIT_BYTES), name)
    if commit.lineage != spec.lineage or Unit(commit.block, commit.first, commit.stop) != unit:
        raise StoreError(f"{name}: it was written for another store; delete {root.url} and encode again")
    found = {FileKey(file.column, file.block, file.draw): (file.path, file.bytes) for file in commit.files}
    if found != _expected_files(spec, unit) or len(commit.files) != len(found):
        raise StoreError(f"{name}: its files are not those of its unit; the record is damaged")
    labels = [int(label) if label.isdecimal() else -1 for label in commit.label_counts]
    if commit.rows != spec.rows_of(unit.block) or not all(0 <= label < spec.num_classes for label in labels):
        raise StoreError(f"{name}: its rows or labels are not those of its unit; the record is damaged")
    return commit


def _expected_files(spec: Spec, unit: Unit) -> dict[FileKey, tuple[str, int]]:
    """Path and size of every file of a unit."""
    layout, rows = LAYOUTS[spec.layout], spec.rows_of(unit.block)
    keys = [FileKey(kind, unit.block) for kind in layout.base_kinds if unit.first == 0]
    keys += [FileKey(kind, unit.block, draw) for kind in spec.planes for draw in unit.draws]
    files = {
        key: (layout.file_path(key.column, key.block, key.draw), layout.file_size(spec, key.column, rows))
        for key in keys
    }
    if unit.draws:
        header = len(npy_header(np.dtype("<f8"), (len(unit.draws), *spec.shape)))
        files[FileKey("sum_z2", unit.block)] = (unit.sum_z2_file, header + 8 * len(unit.draws) * spec.dim)
    return files


def read_sum_z2(root: Root, spec: Spec, commit: Commit) -> dict[int, NDArray[np.float64]]:
    """Σ z² by draw, float64 (C, H, W) each. Raises StoreError where the file is not the committed one."""
    record = next(file for file in commit.files if file.column == "sum_z2")
    data = root.read(record.path, record.bytes)
    values = np.frombuffer(data[-8 * spec.dim * (commit.stop - commit.first) :], "<f8")
    if sha256(data) != record.sha256 or values.size != spec.dim * (commit.stop - commit.first):
        raise StoreError(f"{root.url}/{record.path}: its sha256 is not the committed one; run the same command again")
    return dict(zip(range(commit.first, commit.stop), values.reshape(-1, *spec.shape), strict=True))


def find_faults(root: Root, spec: Spec, unit: Unit) -> list[str]:
    """What is wrong with a committed unit, found by reading back all of its files. Raises StorageError where they
    cannot be read: that is nothing about them."""
    try:
        commit = read_commit(root, spec, unit)
    except StorageError:
        raise
    except StoreError as error:
        return [str(error)]
    found: list[str] = []
    for record in commit.files:
        try:
            if sha256(root.read(record.path, record.bytes)) != record.sha256:
                found.append(f"{root.url}/{record.path}: its bytes are not the committed ones")
        except StorageError:
            raise
        except StoreError as error:
            found.append(str(error))
    return found
