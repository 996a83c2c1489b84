"""Reading a store: its spec, and the columns of any block as arrays that map the files."""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from nfm.storage_specs.format import codecs
from nfm.storage_specs.format.commits import Cost
from nfm.storage_specs.format.dataset import check_kind_is_supported, content_id, is_1_0, layout_of
from nfm.storage_specs.format.image_names import ImageName, hash_rows, list_names, max_names_bytes, parse_names
from nfm.storage_specs.format.layouts import Columns
from nfm.storage_specs.format.manifest import (
    FILE_SCHEMA,
    FILE_SCHEMA_1_0,
    FileKey,
    max_manifest_bytes,
    parse_file_records,
    parse_label_counts,
    parse_manifest,
    z_rms_error,
)
from nfm.storage_specs.format.names import COST_FILE, MAX_METADATA_BYTES, Z_SCALE_FILE
from nfm.storage_specs.format.noise import standard_normal
from nfm.storage_specs.format.schema import (
    Dataset,
    DocumentFile,
    FileRecord,
    ImageView,
    Kind,
    PixelSpec,
    Spec,
    Totals,
)
from nfm.storage_specs.format.sums import NUM_POWERS, ZSums
from nfm.storage_specs.reading.versions import OpenedDocument, open_document
from nfm.storage_specs.storage.cache import Cache
from nfm.storage_specs.storage.documents import parse_json
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import Root, check_file_size, sha256
from nfm.storage_specs.storage.local import LocalFile, map_file
from nfm.storage_specs.storage.npy import npy_header

T = TypeVar("T")

MAX_OPEN_FILES = 64  # files that a Store keeps mapped, for the next call of `columns`
CACHE_ATTEMPTS = 3  # to fetch a file that other processes delete from the cache before it is opened


class Store:
    """A version of a complete store: at a URL, a local path or any URL that fsspec knows, the newest one; at `URL@v3`
    or `URL@tag` another one.

    `kind` is the kind of store that the caller needs; None takes either. `options` are those of the fsspec file system.
    Files of a remote store are read through `cache`.

    Its documents are read and compared before anything else: spec, records, totals, manifest and the hashes of all
    files must give the id. Other files are checked when they are read. Raises StoreError if there is no complete store,
    if it is of another kind, or if its documents do not agree.
    """

    def __init__(
        self, url: str, kind: Kind | None = None, options: dict[str, Any] | None = None, cache: Cache | None = None
    ) -> None:
        opened = open_document(url, options)
        self.opened: OpenedDocument = opened
        self.root: Root = opened.root
        self.options = options
        self.document: bytes = opened.data  # dataset.json, or the document of an older version, as it was read
        self.dataset: Dataset = opened.dataset
        self.spec: Spec = self.dataset.spec
        self.cache = cache or Cache()
        self._document_name = f"{self.url}/{opened.path}"
        if kind is not None and self.spec.kind != kind:
            raise StoreError(f"{url}: got a store of {self.spec.kind}, expected one of {kind}")
        check_kind_is_supported(self.spec, self._document_name)
        self.layout = layout_of(self.dataset)
        if self.dataset.records != self.layout.describe_records(self.spec):
            raise StoreError(
                f"{self._document_name}: its `records` section does not describe the layout in its spec; "
                "the file is damaged or of another version"
            )
        self.manifest: bytes = self._read_manifest()
        name = f"{self.url}/{self.dataset.documents.manifest.path}"
        file_schema = FILE_SCHEMA_1_0 if is_1_0(self.dataset) else FILE_SCHEMA
        table = parse_manifest(self.manifest, self.spec, self.layout, file_schema, name)
        # The files of columns, exactly those of the spec, in the order of the manifest.
        self.files: dict[FileKey, FileRecord] = parse_file_records(table, self.spec, self.layout, name)
        # For each block, how many rows of each label it has.
        self.label_counts: list[dict[int, int]] = parse_label_counts(table, self.spec, name)
        self._check_agreement()
        self._open_files: OrderedDict[FileKey, Columns] = OrderedDict()  # the one used last at the end

    @property
    def url(self) -> str:
        """The URL without a version."""
        return self.root.url

    @property
    def version_url(self) -> str:
        """A URL that stays this version when the store gets a newer one."""
        return self.url if is_1_0(self.dataset) else f"{self.url}@v{self.dataset.version}"

    def _read_manifest(self) -> bytes:
        file = self.dataset.documents.manifest
        data = self.root.read(file.path, max_manifest_bytes(self.spec, self.layout))
        if sha256(data) != file.sha256:
            raise StoreError(
                f"{self.url}/{file.path}: its sha256 is not the one in {self._document_name}; "
                "the file is damaged, repair or copy the store"
            )
        return data

    def _check_agreement(self) -> None:
        """Raise StoreError unless totals and id are those of the spec and the manifest."""
        records = list(self.files.values())
        totals = sum_totals(self.spec, records, self.label_counts)
        if self.dataset.totals != totals:
            raise StoreError(
                f"{self._document_name}: its totals are not those of the manifest; "
                "the file is damaged, repair or copy the store"
            )
        if self.dataset.id != content_id(self.dataset, records, self.label_counts):
            raise StoreError(
                f"{self._document_name}: its id is not that of its spec and files; "
                "the file was changed or damaged, get the store from its source again"
            )

    @cached_property
    def cost(self) -> Cost | None:
        """The seconds that the teacher took to make the couplings; None if there is no cost.json."""
        if not self.root.exists(COST_FILE):
            return None
        return parse_json(Cost, self.root.read(COST_FILE, MAX_METADATA_BYTES), f"{self.url}/{COST_FILE}")

    def read_document(self, path: str, digest: str, max_bytes: int) -> bytes:
        """The content of a file beside those of columns. Raises StoreError if its sha256 is not `digest`."""
        return self.view_document(path, digest, max_bytes).tobytes()

    def view_document(self, path: str, digest: str, max_bytes: int) -> NDArray[np.uint8]:
        """As `read_document`; a local file is mapped, which takes no memory."""
        data = self.root.view(path, max_bytes)
        if sha256(data) != digest:
            raise StoreError(
                f"{self.url}/{path}: its sha256 is not the one in {self._document_name}; the file is damaged"
            )
        return data

    @cached_property
    def sigma_f(self) -> NDArray[np.float32]:
        """σ_f, float32 (C, H, W): root mean square of z in each dimension, over the data set and draws. Raises
        ValueError for a store of samples."""
        file = self.dataset.documents.sigma_f
        if file is None:
            raise ValueError(f"{self.url}: got a store of samples, which has no σ_f; expected one of couplings")
        data = self.read_document(file.path, file.sha256, 4096 + 4 * self.spec.dim)
        return codecs.parse_positive_npy(data, self.spec.shape, f"{self.url}/{file.path}")

    @cached_property
    def z_sums(self) -> ZSums | None:
        """The sums over z (see sums.py); None for a store of samples, and for schema 1.0, which has none."""
        by_dimension, by_class = self.dataset.documents.z_sums, self.dataset.documents.z_class_sums
        if by_dimension is None:
            return None
        sums_of_classes = np.zeros((0, NUM_POWERS))
        if by_class is not None:
            sums_of_classes = self._read_sums(by_class, (self.spec.num_classes, NUM_POWERS))
        return ZSums(self._read_sums(by_dimension, (NUM_POWERS, *self.spec.shape)), sums_of_classes)

    def _read_sums(self, file: DocumentFile, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """The array in a file of sums over z. Raises StoreError if it has another shape, or values that are not
        finite."""
        header, num_bytes = npy_header(np.dtype("<f8"), shape), 8 * math.prod(shape)
        data = self.read_document(file.path, file.sha256, len(header) + num_bytes)
        if not data.startswith(header) or len(data) != len(header) + num_bytes:
            raise StoreError(f"{self.url}/{file.path}: expected float64 of shape {shape}")
        values: NDArray[np.float64] = np.frombuffer(data, "<f8", offset=len(header)).reshape(shape)
        if not np.isfinite(values).all():
            raise StoreError(f"{self.url}/{file.path}: it holds values that are not finite")
        return values

    @cached_property
    def z_scale(self) -> NDArray[np.float32] | None:
        """The step of int8 z in each dimension, float32 (C, H, W); None for other dtypes, and for samples."""
        digest = self.spec.nfm.z_scale_sha256 if self.spec.coupling else None
        if digest is None:
            return None
        data = self.read_document(Z_SCALE_FILE, digest, 4096 + 4 * self.spec.dim)
        return codecs.parse_positive_npy(data, self.spec.shape, f"{self.url}/{Z_SCALE_FILE}")

    @cached_property
    def image_names(self) -> pa.Table | None:
        """Where each image comes from: index, name and sha256 of its source bytes, in the order of rows; None if the
        store does not say."""
        file = self.dataset.documents.names
        if file is None:
            return None
        data = self.view_document(file.path, file.sha256, max_names_bytes(self.spec.rows))
        table = parse_names(data, 0, self.spec.rows, f"{self.url}/{file.path}")
        if hash_rows(table) != file.rows_sha256:
            raise StoreError(f"{self.url}/{file.path}: the sha256 of its rows is not the one in {self._document_name}")
        return table

    def image_names_of(self, block: int) -> list[ImageName] | None:
        """Where the images of a block come from, in the order of rows; None if the store does not say."""
        if self.image_names is None:
            return None
        return list_names(self.image_names.slice(block * self.spec.block_rows, self.spec.rows_of(block)))

    def local_file(self, key: FileKey) -> LocalFile:
        """A file on the local disk: the file itself, or its copy in the cache, which is made if there is none. Another
        process may delete the copy again; see `use_local_file`."""
        record = self.files[key]
        if self.root.local:
            return self.root.local_file(record.path)
        cached = self.cache.fetch(self.root, record.path, record.bytes, record.sha256)
        return LocalFile(str(cached.parent), cached.name)

    def check_local_sizes(self, kinds: tuple[str, ...]) -> None:
        """Raise StoreError unless the files of these kinds have the sizes in the manifest. Does nothing for a remote
        store."""
        if not self.root.local:
            return
        for key, record in self.files.items():
            if key.column not in kinds:
                continue
            name = f"{self.url}/{record.path}"
            size = self.root.size(record.path)
            if size is None:
                raise StoreError(f"{name} is missing; repair or copy the store")
            check_file_size(name, size, record.bytes)

    def use_local_file(self, key: FileKey, use: Callable[[LocalFile], T]) -> T:
        """The result of `use(file)` for a file on the local disk. If another process deletes the file from the cache
        before it is opened, it is fetched again.

        Raises StoreError with the file's name if it is missing or cannot be read.
        """
        name = f"{self.url}/{self.files[key].path}"
        for _ in range(CACHE_ATTEMPTS):
            try:
                return use(self.local_file(key))
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
        if columns[key.column].dtype not in (np.uint8, np.int64) and not codecs.all_finite(columns[key.column]):
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
        """Column "x", "x_mirrored", "label", "index", "z" or "noise" of one block, (rows, …), in the dtype of the
        files. z and noise also need a draw. Noise that the store does not hold is drawn again, which gives the same
        bits. Labels of a store without classes are -1.

        Raises ValueError for a column, block or draw that the store does not have.
        """
        self._check_address(name, block, draw)
        if name == "noise" and not self.spec.nfm.noise.stored:
            noise = standard_normal(self.spec.nfm.noise.seed, self.spec.indices(block), draw, self.spec.shape)
            return noise.astype(self.spec.dtype("noise"))
        if name == "label" and not self.spec.has_labels:
            return np.full(self.spec.rows_of(block), -1, dtype=np.int64)
        in_file_of_x = name in ("label", "index") and name not in self.layout.base_columns(self.spec)
        file_kind = "x" if in_file_of_x else name
        return self.columns(FileKey(file_kind, block, draw))[name]

    def x_of(self, block: int, draw: int) -> NDArray[Any]:
        """The x that a draw was made of, (rows, C, H, W) in the dtype of the files: the mirror image where the view of
        the draw is that. Raises ValueError for a block or draw that the store does not have."""
        self._check_address("z", block, draw)
        return self.x_in(block, self.spec.view_of(draw))

    def x_in(self, block: int, view: ImageView) -> NDArray[Any]:
        """The x of a block in a view, (rows, C, H, W) in the dtype of the files. Raises ValueError for a block or view
        that the store does not have."""
        if view not in self.spec.views:
            raise ValueError(f"{self.url}: got view {view!r}; expected one of {', '.join(self.spec.views)}")
        if view == "plain":
            return self.column("x", block)
        if "x_mirrored" in self.spec.image_columns:
            return self.column("x_mirrored", block)
        return self.column("x", block)[..., ::-1]

    def z(self, block: int, draw: int) -> NDArray[np.float32]:
        """z of one block and draw, float32 (rows, C, H, W), as the teacher gave it but for the rounding of the stored
        dtype. It is not divided by σ_f. Raises ValueError for a block or draw that the store does not have."""
        stored = self.column("z", block, draw)
        return codecs.decode_z(stored, self.spec.nfm.z_dtype, self.z_scale)

    def _check_address(self, name: str, block: int, draw: int) -> None:
        """Raise ValueError unless the store has this column, and the column this block and draw."""
        draw_columns = ("z", "noise") if self.spec.coupling else ()
        columns = (*self.spec.image_columns, "label", "index", *draw_columns)
        if name not in columns:
            raise ValueError(
                f"{self.url}: got column {name!r} of a store of {self.spec.kind}; expected one of {', '.join(columns)}"
            )
        if not 0 <= block < self.spec.num_blocks:
            raise ValueError(f"{self.url}: got block {block}; expected 0 to {self.spec.num_blocks - 1}")
        if name in draw_columns and not 0 <= draw < self.spec.num_draws:
            raise ValueError(f"{self.url}: got draw {draw} of {name}; expected 0 to {self.spec.num_draws - 1}")
        if name not in draw_columns and draw != -1:
            raise ValueError(f"{self.url}: got draw {draw} of {name}, which has no draws; expected none")

    def labels(self) -> NDArray[np.int64]:
        """The labels of all rows, (N,)."""
        return np.concatenate([self.column("label", block) for block in range(self.spec.num_blocks)])

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The pixels of the given rows, uint8 (len(rows), C, H, W). Each block is read once.

        Raises ValueError for rows that the store does not have, and for a store of latents.
        """
        if not isinstance(self.spec.x, PixelSpec):
            raise ValueError(f"{self.url}: got a store of {self.spec.x.dtype} latents; expected one of uint8 pixels")
        return self.x_of_rows(rows, "plain")

    def x_of_rows(self, rows: NDArray[np.int64], view: ImageView) -> NDArray[Any]:
        """x of the given rows in a view, (len(rows), C, H, W) in the dtype of the files. Each block is read once.

        Raises ValueError for rows, or a view, that the store does not have.
        """
        rows = np.asarray(rows, dtype=np.int64)
        outside = rows[(rows < 0) | (rows >= self.spec.rows)]
        if len(outside):
            raise ValueError(f"{self.url}: got row {outside[0]}; expected 0 to {self.spec.rows - 1}")
        images = np.empty((len(rows), *self.spec.shape), dtype=self.spec.dtype("x"))
        blocks, rows_in_block = np.divmod(rows, self.spec.block_rows)
        for block in np.unique(blocks).tolist():
            positions = np.flatnonzero(blocks == block)
            images[positions] = self.x_in(block, view)[rows_in_block[positions]]
        return images


def sum_totals(spec: Spec, files: list[FileRecord], label_counts: list[dict[int, int]]) -> Totals:
    """The totals of a store, from the records of its files and the label counts of its blocks."""
    counts: Counter[int] = Counter()
    for counts_of_block in label_counts:
        counts.update(counts_of_block)
    return Totals(
        files=len(files),
        bytes=sum(file.bytes for file in files),
        label_counts={str(label): counts[label] for label in sorted(counts)},
        z_rms_error=z_rms_error(spec, files),
    )
