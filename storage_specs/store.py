"""Reading a store: its spec, and the columns of any block as arrays that map the files."""

import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage_specs.errors import StoreError
from storage_specs.files import Root, local_file, mapped, sha256
from storage_specs.layouts import LAYOUTS, Columns
from storage_specs.schema import Dataset, FileRecord, Kind, Spec, canonical_json, content_id, parse, parse_dataset
from storage_specs.webdataset import npy_header

MAX_METADATA_BYTES = 1 << 30

FILE_SCHEMA = pa.schema(
    [
        ("column", pa.string()),
        ("draw", pa.int32()),
        ("block", pa.int32()),
        ("first_index", pa.int64()),
        ("rows", pa.int32()),
        ("path", pa.string()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("label_counts", pa.map_(pa.int32(), pa.int64())),
        ("seconds", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Key:
    """Which file: its column, block, and draw (-1 where the column has none)."""

    column: str
    block: int
    draw: int = -1


class Store:
    """A complete store at a URL (local path or any fsspec URL). Raises StoreError if there is none, or a broken one."""

    def __init__(self, url: str, kind: Kind | None = None, options: dict[str, Any] | None = None) -> None:
        self.root = Root(url, options)
        if not self.root.exists("dataset.json"):
            inside = [name for name in ("train", "val") if self.root.exists(f"{name}/dataset.json")]
            if inside:
                raise StoreError(f"{url}: got a folder of stores, expected one of them: {url}/{' or '.join(inside)}")
            raise StoreError(
                f"{url}: no dataset.json; expected a complete store there (if its job was interrupted, run it again)"
            )
        self.dataset: Dataset = parse_dataset(self.root.read("dataset.json", MAX_METADATA_BYTES), f"{url}/dataset.json")
        self.spec: Spec = self.dataset.spec
        if kind is not None and self.spec.kind != kind:
            raise StoreError(f"{url}: got a store of {self.spec.kind}, expected one of {kind}")
        self.layout = LAYOUTS[self.spec.layout]
        self._columns: dict[Key, Columns] = {}

    @property
    def url(self) -> str:
        return self.root.url

    @cached_property
    def _manifest(self) -> pa.Table:
        name = f"{self.url}/manifest.parquet"
        data = self.root.read("manifest.parquet", MAX_METADATA_BYTES)
        if sha256(data) != self.dataset.manifest_sha256:
            raise StoreError(f"{name}: its sha256 is not the one in dataset.json; the file is damaged")
        wanted = expected_files(self.spec)
        try:
            parquet = pq.ParquetFile(io.BytesIO(data))
            if parquet.metadata.num_rows != wanted:
                raise StoreError(f"{name}: got {parquet.metadata.num_rows} files, expected the {wanted} of the spec")
            table = parquet.read()
        except pa.ArrowException as error:
            raise StoreError(f"{name}: not a Parquet file: {error}") from error
        if table.schema.names != FILE_SCHEMA.names or not table.schema.equals(FILE_SCHEMA):
            raise StoreError(f"{name}: its columns are not those of a manifest; the file is of another version")
        return table

    @cached_property
    def files(self) -> dict[Key, FileRecord]:
        """The manifest: exactly the files that the spec calls for."""
        name, table = f"{self.url}/manifest.parquet", self._manifest
        files: dict[Key, FileRecord] = {}
        for row in table.to_pylist():
            record = parse(FileRecord, canonical_json({field: row[field] for field in FileRecord.model_fields}), name)
            files[Key(record.column, record.block, record.draw)] = record
        if files.keys() != set(expected_keys(self.spec)):
            raise StoreError(f"{name}: its files are not those of the spec, each once")
        for key, record in files.items():
            size = self.layout.size(self.spec, key.column, self.spec.rows_of(key.block))
            path = self.layout.path(key.column, key.block, key.draw)
            if record.path != path or record.bytes != size:
                raise StoreError(
                    f"{name}: got {record.path!r} of {record.bytes} bytes, expected {path!r} of {size} bytes"
                )
        return files

    @property
    def worker_seconds(self) -> float:
        """What the blocks took to make, added up over the workers."""
        return float(sum({row["block"]: row["seconds"] for row in self._manifest.to_pylist()}.values()))

    @cached_property
    def sigma_f(self) -> NDArray[np.float32]:
        """σ_f, float32 (C, H, W): per-dimension root mean square of f over the data set and draws."""
        data = self.root.read("sigma_f.npy", MAX_METADATA_BYTES)
        name = f"{self.url}/sigma_f.npy"
        if sha256(data) != self.dataset.sigma_f_sha256:
            raise StoreError(f"{name}: its sha256 is not the one in dataset.json; the file is damaged")
        header = npy_header(np.dtype("<f4"), self.spec.shape)
        if not data.startswith(header) or len(data) != len(header) + 4 * self.spec.dim:
            raise StoreError(f"{name}: expected an npy file of float32 with shape {self.spec.shape}")
        sigma = np.frombuffer(data, "<f4", offset=len(header)).reshape(self.spec.shape)
        if not (np.isfinite(sigma) & (sigma > 0)).all():
            raise StoreError(f"{name}: expected positive finite values")
        return sigma

    def columns(self, key: Key) -> Columns:
        """The columns of one file, mapped, after its size, structure and labels were checked."""
        if key not in self._columns:
            record = self.files[key]
            name = f"{self.url}/{record.path}"
            data = mapped(local_file(self.root, record.path, record.bytes, record.sha256))
            if len(data) != record.bytes:
                raise StoreError(
                    f"{name}: got {len(data)} bytes, expected {record.bytes}; the file is truncated or overlong, "
                    "repair or copy it again"
                )
            try:
                columns = self.layout.view(self.spec, key.column, key.block, data)
            except StoreError as error:
                raise StoreError(f"{name}: {error}; the file is damaged, repair or copy it again") from None
            if "label" in columns:
                check_labels(columns["label"], self.spec.num_classes, name)
            self._columns[key] = columns
        return self._columns[key]

    def column(self, name: str, block: int, draw: int = -1) -> NDArray[Any]:
        """Column "x", "label", "index", "z" or "noise" of one block (and draw), (rows, …)."""
        holder = name if name not in ("label", "index") or name in self.layout.base_kinds else "x"
        return self.columns(Key(holder, block, draw))[name]

    def labels(self) -> NDArray[np.int64]:
        """All labels, (N,)."""
        return np.concatenate([self.column("label", block) for block in range(self.spec.blocks)])

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """x of the given rows, uint8 (len(rows), C, H, W)."""
        out = np.empty((len(rows), *self.spec.shape), dtype=np.uint8)
        gather(out, rows, self.spec.block_rows, lambda block: self.column("x", block))
        return out

    def verify(self) -> list[str]:
        """Every fault found in reading all files: size, sha256, structure, labels and finite values. Empty if sound."""
        faults = self._document_faults()
        for key, record in self.files.items():
            try:
                data = mapped(local_file(self.root, record.path, record.bytes, record.sha256))
                columns = self.columns(key)
                if sha256(data) != record.sha256:
                    raise StoreError(
                        f"{self.url}/{record.path}: its sha256 is not the one in the manifest; repair or copy it again"
                    )
                if key.column in ("z", "noise") and not np.isfinite(columns[key.column]).all():
                    raise StoreError(f"{self.url}/{record.path}: it holds values that are not finite")
            except StoreError as error:
                faults.append(str(error))
        return faults

    def _document_faults(self) -> list[str]:
        """Whether dataset.json, σ_f and the files for stock tools agree with the manifest and the spec."""
        faults: list[str] = []
        records, totals = list(self.files.values()), self.dataset.totals
        if self.dataset.id != content_id(self.spec, [record.sha256 for record in records]):
            faults.append(f"{self.url}/dataset.json: its id is not that of its files")
        if (totals.files, totals.bytes) != (len(records), sum(record.bytes for record in records)):
            faults.append(f"{self.url}/dataset.json: its totals are not those of the manifest")
        try:
            if self.spec.coupling:
                _ = self.sigma_f
        except StoreError as error:
            faults.append(str(error))
        for path, expected in self.layout.metadata(self.spec).items():
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


def check_labels(labels: NDArray[np.int64], num_classes: int, name: str) -> None:
    bad = labels[(labels < 0) | (labels >= num_classes)]
    if len(bad):
        raise StoreError(f"{name}: got label {bad[0]}, expected 0 to {num_classes - 1}")


def expected_files(spec: Spec) -> int:
    """How many files a complete store has; known before anything of that size is made."""
    return spec.blocks * (len(LAYOUTS[spec.layout].base_kinds) + 2 * spec.draws)


def expected_keys(spec: Spec) -> list[Key]:
    """The files of a complete store, in manifest order."""
    base = LAYOUTS[spec.layout].base_kinds
    keys = [Key(kind, block) for kind in base for block in range(spec.blocks)]
    for kind in ("z", "noise") if spec.coupling else ():
        keys += [Key(kind, block, draw) for draw in range(spec.draws) for block in range(spec.blocks)]
    return keys
