"""Units: what one worker encodes and one commit record makes durable.

A unit is a block with a range of its draws. The unit with the first draws of a block also holds x and the labels.
Adding draws to a store adds units and leaves existing files as they are.
"""

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
from nfm.storage_specs.format.names import COMMITS_FOLDER, SUM_Z2_FOLDER
from nfm.storage_specs.format.schema import Commit, FileRecord, Spec
from nfm.storage_specs.storage.documents import parse_sealed_json, sealed_json
from nfm.storage_specs.storage.errors import StorageError, StoreError
from nfm.storage_specs.storage.files import Root, sha256
from nfm.storage_specs.storage.npy import npy_bytes, npy_header

MAX_COMMIT_BYTES = 1 << 26
_COMMIT_NAME = re.compile(r"(\d{6,})\.k(\d{3,})-(\d{3,})\.json")


@dataclass(frozen=True, order=True)
class Unit:
    """Draws `first` … `stop` - 1 of a block. In a sample store, which has no draws, both are 0."""

    block: int
    first: int
    stop: int

    @property
    def name(self) -> str:
        """Such as "000012.k000-008" for draws 0 to 7 of block 12."""
        return f"{self.block:06d}.k{self.first:03d}-{self.stop:03d}"

    @property
    def commit_file(self) -> str:
        """Path of the commit record in the store."""
        return f"{COMMITS_FOLDER}/{self.name}.json"

    @property
    def sum_z2_file(self) -> str:
        """Path in the store of Σ z² of the unit's draws."""
        return f"{SUM_Z2_FOLDER}/{self.name}.npy"

    @property
    def draws(self) -> range:
        """The numbers of the unit's draws."""
        return range(self.first, self.stop)

    @property
    def has_base(self) -> bool:
        """Whether the files of x and labels belong to this unit."""
        return self.first == 0

    def contains(self, key: FileKey) -> bool:
        """Whether a file of a column belongs to this unit."""
        if key.block != self.block:
            return False
        if key.draw < 0:
            return self.has_base
        return key.draw in self.draws


def list_committed_units(root: Root) -> set[Unit]:
    """The units that have a commit record. It takes one listing of a folder, however many there are."""
    matches = (_COMMIT_NAME.fullmatch(name) for name in root.list_names(COMMITS_FOLDER))
    return {Unit(int(match[1]), int(match[2]), int(match[3])) for match in matches if match}


def list_missing_units(spec: Spec, committed: Iterable[Unit]) -> list[Unit]:
    """The units that a store still needs beside the committed ones, in order of blocks and draws: one for each run of
    consecutive draws of a block that no committed unit has."""
    committed_blocks: set[int] = set()
    committed_draws: dict[int, set[int]] = {}  # by block
    for unit in committed:
        committed_blocks.add(unit.block)
        committed_draws.setdefault(unit.block, set()).update(unit.draws)
    if spec.draws == 0:
        return [Unit(block, 0, 0) for block in range(spec.blocks) if block not in committed_blocks]
    units: list[Unit] = []
    for block in range(spec.blocks):
        units += _list_missing_runs(block, spec.draws, committed_draws.get(block, set()))
    return units


def _list_missing_runs(block: int, num_draws: int, committed_draws: set[int]) -> list[Unit]:
    """The runs of consecutive draws of a block, among the first `num_draws`, that are not committed."""
    units: list[Unit] = []
    draw = 0
    while draw < num_draws:
        if draw in committed_draws:
            draw += 1
            continue
        stop = draw + 1
        while stop < num_draws and stop not in committed_draws:
            stop += 1
        units.append(Unit(block, draw, stop))
        draw = stop
    return units


class NonFiniteError(FloatingPointError):
    """z of some images is not finite, or too large for its dtype. `images` holds their indices in the data set."""

    def __init__(self, images: list[int], draw: int, dtype: str) -> None:
        super().__init__(
            f"z of image {images[0]}, draw {draw}, is not finite as {dtype}, or |z| is at least 2¹⁰⁰; "
            "this draw was not written"
        )
        self.images = images


class UnitWriter:
    """Writes one unit: its files, in any order and from any thread, and then, with `commit`, its commit record.

    `z_scale`, float32 (C, H, W), is the step of int8 z; None for other dtypes.
    """

    def __init__(self, root: Root, spec: Spec, unit: Unit, z_scale: NDArray[np.float32] | None) -> None:
        self.root, self.spec, self.unit, self.z_scale = root, spec, unit, z_scale
        self.layout = LAYOUTS[spec.layout]
        self._files: dict[FileKey, FileRecord] = {}
        self._sum_z2: dict[int, NDArray[np.float64]] = {}  # by draw
        self._labels: NDArray[np.int64] | None = None

    def write_base(self, columns: Columns) -> None:
        """Write x (rows, C, H, W) uint8 and label (rows,) int64, if they belong to this unit.

        It has to be called for every unit, as the commit record counts the labels. Raises StoreError if a label is out
        of range.
        """
        self._labels = columns["label"]
        self.spec.check_labels(self._labels, f"{self.root.url} block {self.unit.block}")
        if self.unit.has_base:
            for kind in self.layout.base_kinds:
                self._write_column_file(FileKey(kind, self.unit.block), columns)

    def write_draw(self, draw: int, z: NDArray[np.float32], noise: NDArray[Any] | None) -> None:
        """Encode and write one draw.

        `z` is float32 (rows, C, H, W) from the teacher; `noise`, of the same shape, is what the teacher saw, in the
        dtype of the spec, or None if the store does not hold the noise. Raises NonFiniteError, before anything of this
        draw is written, if some z is not finite or too large for its dtype.
        """
        coupling = self.spec.coupling
        assert coupling is not None and z.dtype == np.float32
        stored = codecs.encode_z(z, coupling.z_dtype, self.z_scale)
        decoded = codecs.decode_z(stored, coupling.z_dtype, self.z_scale)
        if not (np.isfinite(z).all() and codecs.all_finite(stored)):
            magnitude = np.maximum(np.abs(z), np.abs(decoded)).reshape(len(z), -1).max(axis=1)  # NaN stays NaN
            bad_rows = np.flatnonzero(~(magnitude < codecs.MAX_MAGNITUDE))
            bad_images = self.spec.indices(self.unit.block)[bad_rows].tolist()
            raise NonFiniteError(bad_images, draw, coupling.z_dtype)
        squared_error = float(np.square(decoded.astype(np.float64) - z).sum())
        self.write_stored_draw(draw, stored, noise, squared_error)

    def write_stored_draw(self, draw: int, z: NDArray[Any], noise: NDArray[Any] | None, squared_error: float) -> None:
        """Like `write_draw`, for z that is in its stored form already, such as z of another store. `squared_error` is
        Σ (z as stored - z as the teacher gave it)²."""
        spec, block = self.spec, self.unit.block
        assert spec.coupling is not None and draw in self.unit.draws
        planes: Columns = {"z": z}
        if noise is not None:
            planes["noise"] = noise
        assert tuple(planes) == spec.planes
        for name, plane in planes.items():
            assert plane.shape == (spec.rows_of(block), *spec.shape)
            assert plane.dtype == spec.dtype(name) and codecs.all_finite(plane)
            self._write_column_file(FileKey(name, block, draw), {name: plane}, squared_error if name == "z" else None)
        # Σ z² of the *stored* values, in float64 and draw by draw. So σ_f needs no second pass over the data, anybody
        # can check it from the files, and it has the same bits however the draws were spread over units.
        decoded = codecs.decode_z(z, spec.coupling.z_dtype, self.z_scale)
        self._sum_z2[draw] = np.square(decoded.astype(np.float64)).sum(axis=0)

    def _write_column_file(self, key: FileKey, columns: Columns, squared_error: float | None = None) -> None:
        """Encode and write one file of a column."""
        data = self.layout.encode_file(self.spec, key.column, key.block, columns)
        assert len(data) == self.layout.file_size(self.spec, key.column, self.spec.rows_of(key.block))
        self._write_file(key, self.layout.file_path(key.column, key.block, key.draw), data, squared_error)

    def _write_file(self, key: FileKey, path: str, data: bytes, squared_error: float | None = None) -> None:
        """Write a file and remember it for the commit record."""
        self.root.write(path, data)
        self._files[key] = FileRecord(
            column=key.column,
            draw=key.draw,
            block=key.block,
            path=path,
            bytes=len(data),
            sha256=sha256(data),
            squared_error=squared_error,
        )

    def commit(self, seconds: float = 0.0, device: str = "") -> Commit:
        """Write Σ z² and then the commit record: the unit is complete. `seconds` is the time that the teacher took on
        `device`."""
        unit = self.unit
        assert self._labels is not None and set(self._sum_z2) == set(unit.draws)
        if unit.draws:
            sum_z2 = np.stack([self._sum_z2[draw] for draw in unit.draws])
            self._write_file(FileKey("sum_z2", unit.block), unit.sum_z2_file, npy_bytes(sum_z2))
        counts = Counter(self._labels.tolist())
        commit = Commit(
            lineage=self.spec.lineage,
            block=unit.block,
            first=unit.first,
            stop=unit.stop,
            rows=self.spec.rows_of(unit.block),
            files=[self._files[key] for key in sorted(self._files, key=lambda key: (key.column, key.draw))],
            label_counts={str(label): counts[label] for label in sorted(counts)},
            seconds=seconds,
            device=device,
        )
        self.root.write(unit.commit_file, sealed_json(commit.model_dump(mode="json")))
        return commit


def read_commit(root: Root, spec: Spec, unit: Unit) -> Commit:
    """The commit record of a unit. Raises StoreError if it is missing, damaged, or of another store than `spec`."""
    name = f"{root.url}/{unit.commit_file}"
    if unit.block >= spec.blocks or unit.stop > spec.draws:
        raise StoreError(f"{name}: it was written for another store; delete {root.url} and encode again")
    commit = parse_sealed_json(Commit, root.read(unit.commit_file, MAX_COMMIT_BYTES), name)
    if commit.lineage != spec.lineage or Unit(commit.block, commit.first, commit.stop) != unit:
        raise StoreError(f"{name}: it was written for another store; delete {root.url} and encode again")
    files = {FileKey(file.column, file.block, file.draw): (file.path, file.bytes) for file in commit.files}
    if files != _expected_files(spec, unit) or len(commit.files) != len(files):
        raise StoreError(f"{name}: its files are not those of its unit; the record is damaged")
    labels = [int(label) if label.isdecimal() else -1 for label in commit.label_counts]
    if commit.rows != spec.rows_of(unit.block) or not all(0 <= label < spec.num_classes for label in labels):
        raise StoreError(f"{name}: its rows or labels are not those of its unit; the record is damaged")
    return commit


def _expected_files(spec: Spec, unit: Unit) -> dict[FileKey, tuple[str, int]]:
    """Path and size in bytes of every file of a unit."""
    layout, rows = LAYOUTS[spec.layout], spec.rows_of(unit.block)
    keys = [FileKey(kind, unit.block) for kind in layout.base_kinds] if unit.has_base else []
    keys += [FileKey(kind, unit.block, draw) for kind in spec.planes for draw in unit.draws]
    files: dict[FileKey, tuple[str, int]] = {}
    for key in keys:
        path = layout.file_path(key.column, key.block, key.draw)
        files[key] = (path, layout.file_size(spec, key.column, rows))
    if unit.draws:
        header = npy_header(np.dtype("<f8"), (len(unit.draws), *spec.shape))
        files[FileKey("sum_z2", unit.block)] = (unit.sum_z2_file, len(header) + 8 * len(unit.draws) * spec.dim)
    return files


def read_sum_z2(root: Root, spec: Spec, commit: Commit) -> dict[int, NDArray[np.float64]]:
    """Σ z² over the rows of a block, by draw, float64 (C, H, W) each. Raises StoreError if the file is not the one that
    was committed."""
    record = next(file for file in commit.files if file.column == "sum_z2")
    data = root.read(record.path, record.bytes)
    if len(data) != record.bytes or sha256(data) != record.sha256:
        raise StoreError(f"{root.url}/{record.path}: its sha256 is not the committed one; run the same command again")
    num_values = spec.dim * (commit.stop - commit.first)
    values = np.frombuffer(data[-8 * num_values :], "<f8")  # without the header, whose size `read_commit` checked
    return dict(zip(range(commit.first, commit.stop), values.reshape(-1, *spec.shape), strict=True))


def find_faults(root: Root, spec: Spec, unit: Unit) -> list[str]:
    """What is wrong with a committed unit, one sentence for each damaged file; all of them are read.

    Raises StorageError if the storage cannot be read, which says nothing about the files.
    """
    try:
        commit = read_commit(root, spec, unit)
    except StorageError:
        raise
    except StoreError as error:
        return [str(error)]
    faults: list[str] = []
    for record in commit.files:
        try:
            if sha256(root.read(record.path, record.bytes)) != record.sha256:
                faults.append(f"{root.url}/{record.path}: its bytes are not the committed ones")
        except StorageError:
            raise
        except StoreError as error:
            faults.append(str(error))
    return faults
