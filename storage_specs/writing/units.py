"""Units: what one worker encodes and one commit record makes durable.

A unit is a block with a range of its draws. The unit with the first draws of a block also holds x and the labels.
Adding draws to a store adds units and leaves existing files as they are.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nfm.storage_specs.format import codecs
from nfm.storage_specs.format.commits import Commit
from nfm.storage_specs.format.image_names import ImageName, encode_names, make_table, max_names_bytes, parse_names
from nfm.storage_specs.format.layouts import LAYOUTS, Columns
from nfm.storage_specs.format.manifest import FileKey
from nfm.storage_specs.format.names import COMMITS_FOLDER, SUMS_FOLDER
from nfm.storage_specs.format.schema import MAX_DRAWS, FileRecord, Spec
from nfm.storage_specs.format.sums import NUM_POWERS, ZSums, sum_z
from nfm.storage_specs.storage.documents import parse_sealed_json, sealed_json
from nfm.storage_specs.storage.errors import StorageError, StoreError
from nfm.storage_specs.storage.files import Root, sha256
from nfm.storage_specs.storage.npy import npy_bytes, npy_header

MAX_COMMIT_BYTES = 1 << 26
_COMMIT_NAME = re.compile(r"([0-9]{6,13})\.k([0-9]{3,5})-([0-9]{3,5})\.json")
Z_SUMS, Z_CLASS_SUMS, NAMES = "z_sums", "z_class_sums", "names"  # in commit records, beside columns


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
    def z_sums_file(self) -> str:
        """Path in the store of the sums over z of the unit's draws, float64 (draws, 4, C, H, W)."""
        return f"{SUMS_FOLDER}/{self.name}.npy"

    @property
    def z_class_sums_file(self) -> str:
        """Path in the store of the sums over z by class of the unit's draws, float64 (draws, classes, 4)."""
        return f"{SUMS_FOLDER}/{self.name}.class.npy"

    @property
    def names_file(self) -> str:
        """Path in the store of the names of the unit's images."""
        return f"{SUMS_FOLDER}/{self.name}.names.parquet"

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


def list_committed_units(root: Root, spec: Spec) -> list[Unit]:
    """The units of a store with `spec` that have a commit record, in the order of blocks and draws. Others may be of a
    driver that adds more draws. It takes one listing of a folder, however many there are."""
    matches = (_COMMIT_NAME.fullmatch(name) for name in root.list_names(COMMITS_FOLDER))
    units = (_parse_commit_name(match) for match in matches if match)
    return sorted(
        unit
        for unit in units
        if unit is not None
        and unit.block < spec.num_blocks
        and unit.stop <= spec.num_draws
        and bool(unit.draws) == bool(spec.num_draws)
    )


def _parse_commit_name(match: re.Match[str]) -> Unit | None:
    """The unit with a commit record of this name; None if no unit that may exist has it, spelled so."""
    unit = Unit(int(match[1]), int(match[2]), int(match[3]))
    has_draws = unit.first < unit.stop <= MAX_DRAWS
    is_unit = has_draws or unit.first == unit.stop == 0
    return unit if is_unit and unit.commit_file == f"{COMMITS_FOLDER}/{match.string}" else None


def list_missing_units(spec: Spec, committed: Iterable[Unit]) -> list[Unit]:
    """The units that a store still needs beside the committed ones, in order of blocks and draws: one for each run of
    consecutive draws of a block that no committed unit has."""
    committed_by_block: dict[int, list[Unit]] = {}
    for unit in sorted(committed):
        committed_by_block.setdefault(unit.block, []).append(unit)
    if spec.num_draws == 0:
        return [Unit(block, 0, 0) for block in range(spec.num_blocks) if block not in committed_by_block]
    missing: list[Unit] = []
    for block in range(spec.num_blocks):
        draw = 0  # those before it are committed or already among the missing ones
        for unit in [*committed_by_block.get(block, []), Unit(block, spec.num_draws, spec.num_draws)]:
            if draw < min(unit.first, spec.num_draws):
                missing.append(Unit(block, draw, min(unit.first, spec.num_draws)))
            draw = max(draw, unit.stop)
    return missing


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

    `labels` (rows,) int64 are those of the block; a store without classes has none, and they are ignored. `z_scale`,
    float32 (C, H, W), is the step of int8 z; None for other dtypes. Raises StoreError if a label is out of range.
    """

    def __init__(
        self, root: Root, spec: Spec, unit: Unit, labels: NDArray[np.int64], z_scale: NDArray[np.float32] | None
    ) -> None:
        self.root, self.spec, self.unit, self.labels, self.z_scale = root, spec, unit, labels, z_scale
        self.layout = LAYOUTS[spec.layout]
        self._files: dict[FileKey, FileRecord] = {}
        self._sums: dict[int, ZSums] = {}  # by draw
        if spec.has_labels:
            spec.check_labels(labels, f"{root.url} block {unit.block}")

    def write_base(self, columns: Columns, names: Sequence[ImageName] | None = None) -> None:
        """Write x (rows, C, H, W) in the dtype of the spec, and where the spec has it x_mirrored, with the labels, if
        they belong to this unit. `names` say where the images come from, exactly if the spec asks for names."""
        if not self.unit.has_base:
            return
        assert (names is not None) == self.spec.names
        if self.spec.has_labels:
            columns = columns | {"label": self.labels}
        for column in self.layout.base_columns(self.spec):
            if column in self.spec.image_columns:
                assert columns[column].shape == (self.spec.rows_of(self.unit.block), *self.spec.shape)
            self._write_column_file(FileKey(column, self.unit.block), columns)
        if names is not None:
            start = self.unit.block * self.spec.block_rows
            self._write_file(
                FileKey(NAMES, self.unit.block), self.unit.names_file, encode_names(make_table(start, names))
            )

    def write_draw(self, draw: int, z: NDArray[np.float32], noise: NDArray[Any] | None) -> None:
        """Encode and write one draw.

        `z` is float32 (rows, C, H, W) from the teacher; `noise`, of the same shape, is what the teacher saw, in the
        dtype of the spec, or None if the store does not hold the noise. Raises NonFiniteError, before anything of this
        draw is written, if some z is not finite or too large for its dtype.
        """
        dtype = self.spec.nfm.z_dtype
        assert z.dtype == np.float32
        stored = codecs.encode_z(z, dtype, self.z_scale)
        decoded = codecs.decode_z(stored, dtype, self.z_scale)
        if not (np.isfinite(z).all() and codecs.all_finite(stored)):
            magnitude = np.maximum(np.abs(z), np.abs(decoded)).reshape(len(z), -1).max(axis=1)  # NaN stays NaN
            bad_rows = np.flatnonzero(~(magnitude < codecs.MAX_MAGNITUDE))
            bad_images = self.spec.indices(self.unit.block)[bad_rows].tolist()
            raise NonFiniteError(bad_images, draw, dtype)
        squared_error = float(np.square(decoded.astype(np.float64) - z).sum())
        self.write_stored_draw(draw, stored, noise, squared_error)

    def write_stored_draw(self, draw: int, z: NDArray[Any], noise: NDArray[Any] | None, squared_error: float) -> None:
        """Like `write_draw`, for z that is in its stored form already, such as z of another store. `squared_error` is
        Σ (z as stored - z as the teacher gave it)²."""
        spec, block = self.spec, self.unit.block
        assert draw in self.unit.draws
        columns: Columns = {"z": z}
        if noise is not None:
            columns["noise"] = noise
        assert tuple(columns) == spec.draw_columns
        for name, values in columns.items():
            assert values.shape == (spec.rows_of(block), *spec.shape)
            assert values.dtype == spec.dtype(name) and codecs.all_finite(values)
            self._write_column_file(FileKey(name, block, draw), {name: values}, squared_error if name == "z" else None)
        # Sums over the *stored* values, draw by draw. So σ_f needs no second pass over the data, anybody can check it
        # from the files, and it has the same bits however the draws were spread over units.
        decoded = codecs.decode_z(z, spec.nfm.z_dtype, self.z_scale)
        self._sums[draw] = sum_z(spec, decoded, self.labels)

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
        """Write the sums over z and then the commit record: the unit is complete. `seconds` is the time that the
        teacher took on `device`."""
        unit, spec = self.unit, self.spec
        assert set(self._sums) == set(unit.draws)
        if unit.draws:
            by_dimension = np.stack([self._sums[draw].by_dimension for draw in unit.draws])
            self._write_file(FileKey(Z_SUMS, unit.block), unit.z_sums_file, npy_bytes(by_dimension))
            if spec.has_labels:
                by_class = np.stack([self._sums[draw].by_class for draw in unit.draws])
                self._write_file(FileKey(Z_CLASS_SUMS, unit.block), unit.z_class_sums_file, npy_bytes(by_class))
        counts = Counter(self.labels.tolist()) if spec.has_labels else Counter[int]()
        commit = Commit(
            lineage=spec.lineage,
            block=unit.block,
            first=unit.first,
            stop=unit.stop,
            rows=spec.rows_of(unit.block),
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
    if unit.block >= spec.num_blocks or unit.stop > spec.num_draws:
        raise StoreError(f"{name}: it was written for another store; delete {root.url} and encode again")
    commit = parse_sealed_json(Commit, root.read(unit.commit_file, MAX_COMMIT_BYTES), name)
    if commit.lineage != spec.lineage or Unit(commit.block, commit.first, commit.stop) != unit:
        raise StoreError(f"{name}: it was written for another store; delete {root.url} and encode again")
    files = {FileKey(file.column, file.block, file.draw): file for file in commit.files}
    expected_sizes = _expected_files(spec, unit)
    is_expected = len(commit.files) == len(files) and files.keys() == expected_sizes.keys()
    for key, file in files.items() if is_expected else ():
        path, size = expected_sizes[key]
        is_expected &= file.path == path and (file.bytes == size or (file.column == NAMES and file.bytes < size))
        is_expected &= (file.squared_error is not None) == (file.column == "z")
    if not is_expected:
        raise StoreError(f"{name}: its files are not those of its unit; the record is damaged")
    rows, counts = spec.rows_of(unit.block), commit.label_counts
    is_counted = all(spec.is_class(label) and count > 0 for label, count in counts.items())
    if commit.rows != rows or not is_counted or sum(counts.values()) != (rows if spec.has_labels else 0):
        raise StoreError(f"{name}: its rows or labels are not those of its unit; the record is damaged")
    return commit


def _expected_files(spec: Spec, unit: Unit) -> dict[FileKey, tuple[str, int]]:
    """Path and size in bytes of every file of a unit. The size of a file of names is an upper bound."""
    layout, rows = LAYOUTS[spec.layout], spec.rows_of(unit.block)
    keys = [FileKey(column, unit.block) for column in layout.base_columns(spec)] if unit.has_base else []
    keys += [FileKey(column, unit.block, draw) for column in spec.draw_columns for draw in unit.draws]
    files: dict[FileKey, tuple[str, int]] = {}
    for key in keys:
        path = layout.file_path(key.column, key.block, key.draw)
        files[key] = (path, layout.file_size(spec, key.column, rows))
    for column, path, shape in _sums_files(spec, unit):
        files[FileKey(column, unit.block)] = (path, len(npy_header(np.dtype("<f8"), shape)) + 8 * math.prod(shape))
    if unit.has_base and spec.names:
        files[FileKey(NAMES, unit.block)] = (unit.names_file, max_names_bytes(rows))
    return files


def _sums_files(spec: Spec, unit: Unit) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, path and shape of the float64 files with the sums over z of a unit."""
    num_draws = len(unit.draws)
    if num_draws == 0:
        return []
    files: list[tuple[str, str, tuple[int, ...]]] = [
        (Z_SUMS, unit.z_sums_file, (num_draws, NUM_POWERS, *spec.shape)),
    ]
    if spec.has_labels:
        files.append((Z_CLASS_SUMS, unit.z_class_sums_file, (num_draws, spec.num_classes, NUM_POWERS)))
    return files


def _read_committed(root: Root, commit: Commit, column: str) -> bytes:
    """The content of a file of a unit. Raises StoreError if the file is not the one that was committed."""
    record = next(file for file in commit.files if file.column == column)
    data = root.read(record.path, record.bytes)
    if len(data) != record.bytes or sha256(data) != record.sha256:
        raise StoreError(f"{root.url}/{record.path}: its sha256 is not the committed one; run the same command again")
    return data


def read_z_sums(root: Root, spec: Spec, commit: Commit) -> dict[int, ZSums]:
    """The sums over z of a unit, by draw. Raises StoreError if a file is not the one that was committed, or holds
    anything else."""
    unit = Unit(commit.block, commit.first, commit.stop)
    arrays: list[NDArray[np.float64]] = []
    for column, path, shape in _sums_files(spec, unit):
        data, header = _read_committed(root, commit, column), npy_header(np.dtype("<f8"), shape)
        if not data.startswith(header):  # `read_commit` checked the size
            raise StoreError(f"{root.url}/{path}: expected float64 of shape {shape}; the file is damaged")
        arrays.append(np.frombuffer(data, "<f8", offset=len(header)).reshape(shape))
    by_dimension = arrays[0]
    by_class = arrays[1] if spec.has_labels else np.zeros((len(unit.draws), 0, NUM_POWERS))
    return {draw: ZSums(by_dimension[i], by_class[i]) for i, draw in enumerate(unit.draws)}


def read_image_names(root: Root, spec: Spec, commit: Commit) -> pa.Table:
    """The names of the images of a unit that holds them. Raises StoreError if the file is not the one that was
    committed."""
    first_index, rows = commit.block * spec.block_rows, spec.rows_of(commit.block)
    data = _read_committed(root, commit, NAMES)
    return parse_names(
        data, first_index, rows, f"{root.url}/{Unit(commit.block, commit.first, commit.stop).names_file}"
    )


def find_faults(root: Root, spec: Spec, unit: Unit, checked: Mapping[FileKey, str] | None = None) -> list[str]:
    """What is wrong with a committed unit, one sentence for each damaged file; all of them are read, but for those that
    were compared before with the sha256 in `checked`.

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
        if checked and checked.get(FileKey(record.column, record.block, record.draw)) == record.sha256:
            continue
        try:
            if sha256(root.read(record.path, record.bytes)) != record.sha256:
                faults.append(f"{root.url}/{record.path}: its bytes are not the committed ones")
        except StorageError:
            raise
        except StoreError as error:
            faults.append(str(error))
    return faults
