"""Reading a store: its spec, and the columns of any block as arrays that map the files."""

import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

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
from nfm.storage_specs.format.names import MAX_METADATA_BYTES
from nfm.storage_specs.format.noise import standard_normal
from nfm.storage_specs.format.schema import Cost, Dataset, FileRecord, Kind, Spec, content_id, parse_dataset
from nfm.storage_specs.storage.cache import Cache
from nfm.storage_specs.storage.documents import parse_json
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import IO_THREADS, Root, map_file, sha256

T = TypeVar("T")

MAX_OPEN_FILES = 64  # whose columns a Store keeps at hand


class Store:
    """A complete store at a URL (local path or any fsspec URL). Raises StoreError if there is none, or a broken one."""

    def __init__(
        self, url: str, kind: Kind | None = None, options: dict[str, Any] | None = None, cache: Cache | None = None
    ) -> None:
        self.root = Root(url, options)
        self.cache = cache or Cache()
        if not self.root.exists("dataset.json"):
            inside = [name for name in ("train", "val") if self.root.exists(f"{name}/dataset.json")]
            if inside:
                raise StoreError(f"{url}: got a folder of stores, expected one of them: {url}/{' or '.join(inside)}")
            raise StoreError(
                f"{url}: no dataset.json; expected a complete store there (if its job was interrupted, run it again)"
            )
        name = f"{self.url}/dataset.json"
        self.dataset: Dataset = parse_dataset(self.root.read("dataset.json", MAX_METADATA_BYTES), name)
        self.spec: Spec = self.dataset.spec
        if kind is not None and self.spec.kind != kind:
            raise StoreError(f"{url}: got a store of {self.spec.kind}, expected one of {kind}")
        self.layout = LAYOUTS[self.spec.layout]
        if self.dataset.records != self.layout.describe_records(self.spec):
            raise StoreError(
                f"{name}: its records are not those of its spec; the file is damaged or of another version"
            )
        self._open: OrderedDict[FileKey, Columns] = OrderedDict()

    @property
    def url(self) -> str:
        return self.root.url

    @cached_property
    def manifest(self) -> pa.Table:
        """manifest.parquet, one row a file."""
        name = f"{self.url}/manifest.parquet"
        data = self.root.read("manifest.parquet", max_manifest_bytes(self.spec))
        if sha256(data) != self.dataset.manifest_sha256:
            raise StoreError(
                f"{name}: its sha256 is not the one in dataset.json; the file is damaged, or draws were added to the "
                "store since it was opened: then open it again"
            )
        return parse_manifest(data, self.spec, name)

    @cached_property
    def files(self) -> dict[FileKey, FileRecord]:
        """The manifest: exactly the files that the spec calls for, in its order."""
        return parse_file_records(self.manifest, self.spec, f"{self.url}/manifest.parquet")

    @cached_property
    def _label_counts(self) -> list[list[tuple[int, int]]]:
        """By block."""
        return list(self.manifest["label_counts"][: self.spec.blocks].to_pylist())  # the files of x come first

    @cached_property
    def cost(self) -> Cost | None:
        """What the couplings took to make, where the store says it."""
        if not self.root.exists("cost.json"):
            return None
        return parse_json(Cost, self.root.read("cost.json", MAX_METADATA_BYTES), f"{self.url}/cost.json")

    def array(self, name: str, digest: str | None) -> NDArray[np.float32]:
        """A float32 (C, H, W) file beside dataset.json, positive and finite everywhere."""
        data = self.root.read(name, 4096 + 4 * self.spec.dim)
        url = f"{self.url}/{name}"
        if sha256(data) != digest:
            raise StoreError(f"{url}: its sha256 is not the one in dataset.json; the file is damaged")
        return codecs.parse_positive_npy(data, self.spec.shape, url)

    @cached_property
    def sigma_f(self) -> NDArray[np.float32]:
        """σ_f, float32 (C, H, W): per-dimension root mean square of f over the data set and draws."""
        return self.array("sigma_f.npy", self.dataset.sigma_f_sha256)

    @cached_property
    def z_scale(self) -> NDArray[np.float32] | None:
        """The step of int8 z in each dimension, float32 (C, H, W); None for other dtypes."""
        assert self.spec.coupling is not None
        digest = self.spec.coupling.z_scale_sha256
        return self.array("z_scale.npy", digest) if digest else None

    def local_path(self, key: FileKey) -> Path:
        """A local path of the file: itself, or its copy in the cache."""
        record = self.files[key]
        if self.root.local:
            return Path(self.root.full_path(record.path))
        return self.cache.fetch(self.root, record.path, record.bytes, record.sha256)

    def check_local_sizes(self, kinds: tuple[str, ...]) -> None:
        """Raise StoreError unless the local files of these columns have the sizes that the manifest gives."""
        for key, record in self.files.items():
            if self.root.local and key.column in kinds:
                name = f"{self.url}/{record.path}"
                try:
                    found = os.stat(self.root.full_path(record.path)).st_size
                except OSError as error:
                    raise StoreError(f"{name}: {error.strerror}; repair or copy the store") from error
                if found != record.bytes:
                    raise StoreError(
                        f"{name}: got {found} bytes, expected {record.bytes}; the file is truncated or overlong, "
                        "repair "
                        "or copy it again"
                    )

    def use_local_file(self, key: FileKey, use: Callable[[Path], T]) -> T:
        """`use` of a local path of the file. Where another process dropped the file from the cache meanwhile, it is
        fetched again. Raises StoreError that names the file."""
        name = f"{self.url}/{self.files[key].path}"
        for _ in range(3):
            try:
                return use(self.local_path(key))
            except FileNotFoundError:
                if self.root.local:
                    raise StoreError(f"{name} is missing; repair or copy the store") from None
            except OSError as error:
                where = "" if self.root.local else f" in the cache {self.cache.directory}"
                raise StoreError(f"{name}: {error.strerror or error}{where}") from error
        raise StoreError(f"{name}: the cache {self.cache.directory} drops files as they come; raise storage.cache_gb")

    def parse_columns(self, key: FileKey, data: NDArray[np.uint8], sha256_checked: bool) -> Columns:
        """The columns in the bytes of a file. Raises StoreError, naming it, unless its size, sha256 (which was looked
        at before, where `sha256_checked`), structure and labels are right and all its numbers finite."""
        record = self.files[key]
        name = f"{self.url}/{record.path}"
        if len(data) != record.bytes:
            raise StoreError(
                f"{name}: got {len(data)} bytes, expected {record.bytes}; the file is truncated or overlong, "
                "repair or copy it again"
            )
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
        """The columns of one file, mapped and checked."""
        if key in self._open:
            self._open.move_to_end(key)
        else:
            self._open[key] = self.parse_columns(
                key, self.use_local_file(key, map_file), sha256_checked=not self.root.local
            )
            while len(self._open) > MAX_OPEN_FILES:
                self._open.popitem(last=False)
        return self._open[key]

    def column(self, name: str, block: int, draw: int = -1) -> NDArray[Any]:
        """Column "x", "label", "index", "z" or "noise" of one block (and draw), (rows, …), as it is stored; noise that
        is not stored is drawn again."""
        coupling = self.spec.coupling
        if name == "noise" and coupling is not None and not coupling.noise.stored:
            drawn = standard_normal(coupling.noise.seed, self.spec.indices(block), draw, self.spec.shape)
            return drawn.astype(self.spec.dtype("noise"))
        holder = name if name not in ("label", "index") or name in self.layout.base_kinds else "x"
        return self.columns(FileKey(holder, block, draw))[name]

    def z(self, block: int, draw: int) -> NDArray[np.float32]:
        """z of one block and draw, float32 (rows, C, H, W): raw, not divided by σ_f."""
        assert self.spec.coupling is not None
        return codecs.decode_z(self.column("z", block, draw), self.spec.coupling.z_dtype, self.z_scale)

    def labels(self) -> NDArray[np.int64]:
        """All labels, (N,)."""
        return np.concatenate([self.column("label", block) for block in range(self.spec.blocks)])

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """x of the given rows, uint8 (len(rows), C, H, W)."""
        out = np.empty((len(rows), *self.spec.shape), dtype=np.uint8)
        gather(out, rows, self.spec.block_rows, lambda block: self.column("x", block))
        return out

    def find_faults(
        self, progress: Callable[[int], None] = lambda _bytes: None
    ) -> Iterator[tuple[FileKey | None, str]]:
        """Everything wrong with the store, found by reading all of it from where it lies (not from the cache): size,
        sha256, structure, labels and their counts, finite values; the key is None where no file of the manifest is at
        fault. `progress` is told how many bytes were read."""
        for fault in self.find_document_faults():
            yield None, fault
        counts: Counter[int] = Counter()
        _, sound = self._label_counts, True
        with ThreadPoolExecutor(IO_THREADS, "nfm-verify") as pool:
            for key, fault, labels in pool.map(self._examine, self.files):
                progress(self.files[key].bytes)
                counts.update(labels)
                if fault:
                    sound = False
                    yield key, fault
        if sound and {str(label): count for label, count in counts.items()} != self.dataset.totals.label_counts:
            yield None, f"{self.url}/dataset.json: its label counts are not those of its files"

    def _examine(self, key: FileKey) -> tuple[FileKey, str, dict[int, int]]:
        """What is wrong with one file, and how many labels of each class it holds."""
        record = self.files[key]
        try:
            if self.root.local:
                data = self.use_local_file(key, map_file)
            else:
                data = np.frombuffer(self.root.read(record.path, record.bytes), np.uint8)
            columns = self.parse_columns(key, data, sha256_checked=False)
        except StoreError as error:
            return key, str(error), {}
        if "label" not in columns:
            return key, "", {}
        labels, counts = np.unique(columns["label"], return_counts=True)
        here = dict(zip(labels.tolist(), counts.tolist(), strict=True))
        if dict(self._label_counts[key.block]) != here:
            return key, f"{self.url}/manifest.parquet: its label counts are not those of {record.path}", here
        return key, "", here

    def find_document_faults(self) -> list[str]:
        """Whether dataset.json, σ_f and the files for stock tools agree with the manifest and the spec."""
        faults: list[str] = []
        records, totals = list(self.files.values()), self.dataset.totals
        if self.dataset.id != content_id(self.spec, [record.sha256 for record in records]):
            faults.append(f"{self.url}/dataset.json: its id is not that of its files")
        if (totals.files, totals.bytes) != (len(records), sum(record.bytes for record in records)):
            faults.append(f"{self.url}/dataset.json: its totals are not those of the manifest")
        try:
            if self.spec.coupling:
                _ = self.sigma_f, self.z_scale
        except StoreError as error:
            faults.append(str(error))
        if totals.z_rms_error != z_rms_error(self.spec, self.files.values()):
            faults.append(f"{self.url}/dataset.json: its z_rms_error is not that of the manifest")
        for path, expected in self.layout.metadata_files(self.spec).items():
            try:
                intact = self.root.read(path, len(expected)) == expected
            except StoreError:
                intact = False
            if not intact:
                faults.append(f"{self.url}/{path}: it is not the metadata of this spec; copy it again")
        return faults


def gather(out: NDArray[Any], rows: NDArray[np.int64], block_rows: int, column: Any) -> None:
    """out[i] = the row `rows[i]` of the store, reading each block once."""
    blocks = rows // block_rows
    for block in np.unique(blocks).tolist():
        here = np.flatnonzero(blocks == block)
        out[here] = column(block)[rows[here] - block * block_rows]
