"""Reading a store: its spec, and the columns of any block as arrays that map the files."""

import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nfm.storage_specs.format import codecs
from nfm.storage_specs.format.layouts import LAYOUTS, Columns
from nfm.storage_specs.format.manifest import (
    FileKey,
    max_manifest_bytes,
    parse_file_records,
    parse_manifest,
    z_rms_error,
)
from nfm.storage_specs.format.names import (
    COST_FILE,
    DATASET_FILE,
    MANIFEST_FILE,
    MAX_METADATA_BYTES,
    SIGMA_F_FILE,
    Z_SCALE_FILE,
)
from nfm.storage_specs.format.noise import standard_normal
from nfm.storage_specs.format.schema import Cost, Dataset, FileRecord, Kind, Spec, content_id, parse_dataset
from nfm.storage_specs.storage.cache import Cache
from nfm.storage_specs.storage.documents import parse_json
from nfm.storage_specs.storage.errors import StorageError, StoreError
from nfm.storage_specs.storage.files import IO_THREADS, Root, check_file_size, map_file, sha256

T = TypeVar("T")

MAX_OPEN_FILES = 64  # files that a Store keeps mapped, for the next call of `columns`
CACHE_ATTEMPTS = 3  # to fetch a file that other processes delete from the cache before it is opened


class Fault(NamedTuple):
    """Something that is wrong with a store."""

    file: FileKey | str  # the file of a column that is damaged or missing, or the name of another file of the store
    message: str  # one sentence, with the URL of the file


class Store:
    """A complete store at a URL: a local path or any URL that fsspec knows.

    `kind` is the kind of store that the caller needs; None takes either. `options` are those of the fsspec file system.
    Files of a remote store are read through `cache`. Raises StoreError if there is no complete store, if it is of
    another kind, or if its dataset.json is damaged. Other files are checked when they are read.
    """

    def __init__(
        self, url: str, kind: Kind | None = None, options: dict[str, Any] | None = None, cache: Cache | None = None
    ) -> None:
        self.root = Root(url, options)
        self.cache = cache or Cache()
        if not self.root.exists(DATASET_FILE):
            raise self._no_store_error()
        self.dataset: Dataset = parse_dataset(
            self.root.read(DATASET_FILE, MAX_METADATA_BYTES), f"{self.url}/{DATASET_FILE}"
        )
        self.spec: Spec = self.dataset.spec
        if kind is not None and self.spec.kind != kind:
            raise StoreError(f"{url}: got a store of {self.spec.kind}, expected one of {kind}")
        self.layout = LAYOUTS[self.spec.layout]
        if self.dataset.records != self.layout.describe_records(self.spec):
            raise StoreError(
                f"{self.url}/{DATASET_FILE}: its `records` section does not describe the layout in its spec; "
                "the file is damaged or of another version"
            )
        self._open_files: OrderedDict[FileKey, Columns] = OrderedDict()  # the one used last at the end

    def _no_store_error(self) -> StoreError:
        """The error for a URL without dataset.json. It names the stores in the subfolders "train" and "val"."""
        splits = [name for name in ("train", "val") if self.root.exists(f"{name}/{DATASET_FILE}")]
        if splits:
            urls = " or ".join(f"{self.url}/{name}" for name in splits)
            return StoreError(f"{self.url}: got a folder of stores, expected one of them: {urls}")
        return StoreError(
            f"{self.url}: no dataset.json; expected a complete store there (if its job was interrupted, run it again)"
        )

    @property
    def url(self) -> str:
        return self.root.url

    @cached_property
    def manifest(self) -> pa.Table:
        """The table in manifest.parquet. Raises StoreError if the file is not the one of dataset.json."""
        name = f"{self.url}/{MANIFEST_FILE}"
        data = self.root.read(MANIFEST_FILE, max_manifest_bytes(self.spec))
        if sha256(data) != self.dataset.manifest_sha256:
            raise StoreError(
                f"{name}: its sha256 is not the one in dataset.json; the file is damaged (repair or copy the store), "
                "or draws were added since the store was opened (open it again)"
            )
        return parse_manifest(data, self.spec, name)

    @cached_property
    def files(self) -> dict[FileKey, FileRecord]:
        """The files of columns, exactly those of the spec, in the order of the manifest. Raises StoreError if the
        manifest lists others."""
        return parse_file_records(self.manifest, self.spec, f"{self.url}/{MANIFEST_FILE}")

    @cached_property
    def _label_counts(self) -> list[list[tuple[int, int]]]:
        """For each block, how many rows of each label it has according to the manifest."""
        counts_of_x_files = self.manifest["label_counts"][: self.spec.blocks]  # the files of x come first
        return list(counts_of_x_files.to_pylist())

    @cached_property
    def cost(self) -> Cost | None:
        """The seconds that the teacher took to make the couplings; None if there is no cost.json."""
        if not self.root.exists(COST_FILE):
            return None
        return parse_json(Cost, self.root.read(COST_FILE, MAX_METADATA_BYTES), f"{self.url}/{COST_FILE}")

    def _read_scale(self, name: str, digest: str | None) -> NDArray[np.float32]:
        """A float32 (C, H, W) file beside dataset.json, whose values are positive and finite. Raises StoreError if its
        sha256 is not `digest`."""
        data = self.root.read(name, 4096 + 4 * self.spec.dim)
        url = f"{self.url}/{name}"
        if sha256(data) != digest:
            raise StoreError(f"{url}: its sha256 is not the one in dataset.json; the file is damaged")
        return codecs.parse_positive_npy(data, self.spec.shape, url)

    @cached_property
    def sigma_f(self) -> NDArray[np.float32]:
        """σ_f, float32 (C, H, W): root mean square of z in each dimension, over the data set and draws. Raises
        ValueError for a store of samples."""
        if self.spec.coupling is None:
            raise ValueError(f"{self.url}: got a store of samples, which has no σ_f; expected one of couplings")
        return self._read_scale(SIGMA_F_FILE, self.dataset.sigma_f_sha256)

    @cached_property
    def z_scale(self) -> NDArray[np.float32] | None:
        """The step of int8 z in each dimension, float32 (C, H, W); None for other dtypes, and for samples."""
        digest = self.spec.coupling.z_scale_sha256 if self.spec.coupling else None
        return self._read_scale(Z_SCALE_FILE, digest) if digest else None

    def local_path(self, key: FileKey) -> Path:
        """A local path of a file: the file itself, or its copy in the cache, which is made if there is none. Another
        process may delete the copy again; see `use_local_file`."""
        record = self.files[key]
        if self.root.local:
            return Path(self.root.full_path(record.path))
        return self.cache.fetch(self.root, record.path, record.bytes, record.sha256)

    def check_local_sizes(self, kinds: tuple[str, ...]) -> None:
        """Raise StoreError unless the files of these kinds have the sizes in the manifest. Does nothing for a remote
        store."""
        if not self.root.local:
            return
        for key, record in self.files.items():
            if key.column not in kinds:
                continue
            name = f"{self.url}/{record.path}"
            try:
                size = os.stat(self.root.full_path(record.path)).st_size
            except OSError as error:
                raise StoreError(f"{name}: {error.strerror}; repair or copy the store") from error
            check_file_size(name, size, record.bytes)

    def use_local_file(self, key: FileKey, use: Callable[[Path], T]) -> T:
        """The result of `use(path)` for the local path of a file. If another process deletes the file from the cache
        before it is opened, it is fetched again.

        Raises StoreError with the file's name if it is missing or cannot be read.
        """
        name = f"{self.url}/{self.files[key].path}"
        for _ in range(CACHE_ATTEMPTS):
            try:
                return use(self.local_path(key))
            except FileNotFoundError:
                if self.root.local:
                    raise StoreError(f"{name} is missing; repair or copy the store") from None
            except OSError as error:
                place = "" if self.root.local else f" in the cache {self.cache.directory}"
                raise StoreError(f"{name}: {error.strerror or error}{place}") from error
        raise StoreError(
            f"{name}: the cache {self.cache.directory} evicts files before they can be opened; raise storage.cache_gb"
        )

    def parse_columns(self, key: FileKey, data: NDArray[np.uint8], sha256_checked: bool) -> Columns:
        """The columns in `data`, the bytes of a file, as views.

        Raises StoreError with the file's name unless its size, sha256, structure and labels are right and all its
        numbers are finite. `sha256_checked` says that the sha256 was compared before, such as by the cache.
        """
        record = self.files[key]
        name = f"{self.url}/{record.path}"
        check_file_size(name, len(data), record.bytes)
        if not sha256_checked and sha256(data) != record.sha256:
            raise StoreError(f"{name}: its sha256 is not the one in the manifest; repair or copy it again")
        try:
            columns = self.layout.view_columns(self.spec, key.column, key.block, data)
        except StoreError as error:
            raise StoreError(f"{name}: {error}; the file is damaged, repair or copy it again") from None
        if "label" in columns:
            self.spec.check_labels(columns["label"], name)
        if key.column in self.spec.planes and not codecs.all_finite(columns[key.column]):
            raise StoreError(f"{name}: it holds values that are not finite; repair or copy it again")
        return columns

    def columns(self, key: FileKey) -> Columns:
        """The columns in one file, by name, as views of a memory map. The file is checked when it is opened; the
        MAX_OPEN_FILES that were used last stay open."""
        if key in self._open_files:
            self._open_files.move_to_end(key)
        else:
            data = self.use_local_file(key, map_file)
            self._open_files[key] = self.parse_columns(key, data, sha256_checked=not self.root.local)
            while len(self._open_files) > MAX_OPEN_FILES:
                self._open_files.popitem(last=False)
        return self._open_files[key]

    def column(self, name: str, block: int, draw: int = -1) -> NDArray[Any]:
        """Column "x", "label", "index", "z" or "noise" of one block, (rows, …), in the dtype of the files. z and noise
        also need a draw. Noise that the store does not hold is drawn again, which gives the same bits.

        Raises ValueError for a column, block or draw that the store does not have.
        """
        coupling = self.spec.coupling
        self._check_address(name, block, draw)
        if name == "noise" and coupling is not None and not coupling.noise.stored:
            noise = standard_normal(coupling.noise.seed, self.spec.indices(block), draw, self.spec.shape)
            return noise.astype(self.spec.dtype("noise"))
        in_file_of_x = name in ("label", "index") and name not in self.layout.base_kinds
        file_kind = "x" if in_file_of_x else name
        return self.columns(FileKey(file_kind, block, draw))[name]

    def z(self, block: int, draw: int) -> NDArray[np.float32]:
        """z of one block and draw, float32 (rows, C, H, W), as the teacher gave it but for the rounding of the stored
        dtype. It is not divided by σ_f. Raises ValueError for a block or draw that the store does not have."""
        stored = self.column("z", block, draw)
        assert self.spec.coupling is not None
        return codecs.decode_z(stored, self.spec.coupling.z_dtype, self.z_scale)

    def _check_address(self, name: str, block: int, draw: int) -> None:
        """Raise ValueError unless the store has this column, and the column this block and draw."""
        draw_columns = ("z", "noise") if self.spec.coupling else ()
        columns = ("x", "label", "index", *draw_columns)
        if name not in columns:
            raise ValueError(
                f"{self.url}: got column {name!r} of a store of {self.spec.kind}; expected one of {', '.join(columns)}"
            )
        if not 0 <= block < self.spec.blocks:
            raise ValueError(f"{self.url}: got block {block}; expected 0 to {self.spec.blocks - 1}")
        if name in draw_columns and not 0 <= draw < self.spec.draws:
            raise ValueError(f"{self.url}: got draw {draw} of {name}; expected 0 to {self.spec.draws - 1}")
        if name not in draw_columns and draw != -1:
            raise ValueError(f"{self.url}: got draw {draw} of {name}, which has no draws; expected none")

    def labels(self) -> NDArray[np.int64]:
        """The labels of all rows, (N,)."""
        return np.concatenate([self.column("label", block) for block in range(self.spec.blocks)])

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """x of the given rows, uint8 (len(rows), C, H, W). Each block is read once.

        Raises ValueError for rows that the store does not have.
        """
        rows = np.asarray(rows, dtype=np.int64)
        outside = rows[(rows < 0) | (rows >= self.spec.rows)]
        if len(outside):
            raise ValueError(f"{self.url}: got row {outside[0]}; expected 0 to {self.spec.rows - 1}")
        images = np.empty((len(rows), *self.spec.shape), dtype=np.uint8)
        blocks, rows_in_block = np.divmod(rows, self.spec.block_rows)
        for block in np.unique(blocks).tolist():
            positions = np.flatnonzero(blocks == block)
            images[positions] = self.column("x", block)[rows_in_block[positions]]
        return images

    def find_faults(self, progress: Callable[[int], None] = lambda _bytes: None) -> Iterator[Fault]:
        """Everything that is wrong with the store.

        Reads all files from where they are (not from the cache) and checks size, sha256, structure, labels and their
        counts, and that all numbers are finite. `progress` gets the number of bytes of each file that was read. Raises
        StoreError if the manifest is damaged, StorageError if storage cannot be read.
        """
        yield from self.find_document_faults()
        total_counts: Counter[int] = Counter()
        _ = self._label_counts  # read once, before threads use it
        every_file_is_sound = True
        with ThreadPoolExecutor(IO_THREADS, "nfm-verify") as pool:
            for key, message, label_counts in pool.map(self._examine_file, self.files):
                progress(self.files[key].bytes)
                total_counts.update(label_counts)
                if message:
                    every_file_is_sound = False
                    yield Fault(key, message)
        totals = {str(label): count for label, count in total_counts.items()}
        if every_file_is_sound and totals != self.dataset.totals.label_counts:
            yield Fault(DATASET_FILE, f"{self.url}/{DATASET_FILE}: its label counts are not those of its files")

    def _examine_file(self, key: FileKey) -> tuple[FileKey, str, dict[int, int]]:
        """The key; a sentence on what is wrong with the file, or ""; and the number of rows of each label in it."""
        record = self.files[key]
        try:
            if self.root.local:
                data = self.use_local_file(key, map_file)
            else:
                data = np.frombuffer(self.root.read(record.path, record.bytes), np.uint8)
            columns = self.parse_columns(key, data, sha256_checked=False)
        except StorageError:
            raise
        except StoreError as error:
            return key, str(error), {}
        if "label" not in columns:
            return key, "", {}
        labels, counts = np.unique(columns["label"], return_counts=True)
        label_counts = dict(zip(labels.tolist(), counts.tolist(), strict=True))
        message = ""
        if dict(self._label_counts[key.block]) != label_counts:
            message = f"{self.url}/{MANIFEST_FILE}: its label counts are not those of {record.path}"
        return key, message, label_counts

    def find_document_faults(self) -> list[Fault]:
        """What is wrong with dataset.json, σ_f, the int8 scale and the metadata of Zarr: a fault for each that does not
        agree with the manifest and the spec. Raises StoreError if the manifest is damaged, StorageError if storage
        cannot be read."""
        faults: list[Fault] = []
        records, totals = list(self.files.values()), self.dataset.totals
        dataset_name = f"{self.url}/{DATASET_FILE}"
        if self.dataset.id != content_id(self.spec, [record.sha256 for record in records]):
            faults.append(Fault(DATASET_FILE, f"{dataset_name}: its id is not that of its files"))
        if totals.files != len(records) or totals.bytes != sum(record.bytes for record in records):
            faults.append(Fault(DATASET_FILE, f"{dataset_name}: its totals are not those of the manifest"))
        if self.spec.coupling:
            for name in (SIGMA_F_FILE, Z_SCALE_FILE):
                try:
                    _ = self.sigma_f if name == SIGMA_F_FILE else self.z_scale
                except StorageError:
                    raise
                except StoreError as error:
                    faults.append(Fault(name, str(error)))
        if totals.z_rms_error != z_rms_error(self.spec, records):
            faults.append(Fault(DATASET_FILE, f"{dataset_name}: its z_rms_error is not that of the manifest"))
        for path, expected in self.layout.metadata_files(self.spec).items():
            try:
                intact = self.root.read(path, len(expected)) == expected
            except StorageError:
                raise
            except StoreError:
                intact = False
            if not intact:
                message = f"{self.url}/{path}: it is not the metadata of this spec; repair or copy the store"
                faults.append(Fault(path, message))
        return faults
