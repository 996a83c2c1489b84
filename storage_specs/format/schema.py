"""The spec of a store, `dataset.json`, and the records that its writers commit. All of them are JSON documents, checked
when they are read."""

import hashlib
import json
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from nfm.storage_specs.format.codecs import STORED_DTYPES, ZDtype
from nfm.storage_specs.storage.documents import StrictModel, canonical_json, parse_json
from nfm.storage_specs.storage.errors import StoreError

SCHEMA_MAJOR = 1
SCHEMA_MINOR = 0
SCHEMA_VERSION = f"{SCHEMA_MAJOR}.{SCHEMA_MINOR}"
MAX_ROW_BYTES = 1 << 28  # of one float32 image; a spec with more is damaged or hostile

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Kind = Literal["samples", "couplings"]
LayoutName = Literal["webdataset", "zarr"]
NoiseDtype = Literal["float32", "float16"]
Precision = Literal["fp32", "tf32", "bf16"]
Positive = Annotated[int, Field(ge=1, le=1 << 48)]


class NoiseSpec(StrictModel):
    """How the noise ε′ was drawn (docs/store.md), in which dtype the teacher saw it, and whether it is stored. If it is
    not, it can be drawn again from law, seed, image index and draw."""

    law: Literal["philox-as241-v1"]
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]
    dtype: NoiseDtype
    stored: bool


class TeacherSpec(StrictModel):
    """The network f that made z: its architecture, the sha256 of its weights, and, as information, how it was
    trained."""

    architecture: dict[str, Any]
    sha256: Sha256
    training: dict[str, Any]


class CouplingSpec(StrictModel):
    """The part of the spec that only a coupling store has: how z was made from x, and how it is stored."""

    draws: Annotated[int, Field(ge=1, le=1 << 16)]  # K, of each image
    eta: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    precision: Precision  # of the teacher's matrix products (docs/encode.md)
    z_dtype: ZDtype
    z_scale_sha256: Sha256 | None  # of z_scale.npy, which only int8 has
    noise: NoiseSpec
    teacher: TeacherSpec
    source: Sha256  # id of the sample store that x comes from

    @model_validator(mode="after")
    def _check_scale(self) -> "CouplingSpec":
        if (self.z_scale_sha256 is not None) != (self.z_dtype == "int8"):
            raise ValueError("z has a scale exactly when it is int8")
        return self


class Spec(StrictModel):
    """Everything that determines the bytes of a store, known before the first file is written."""

    kind: Kind
    layout: LayoutName
    rows: Positive
    block_rows: Annotated[int, Field(ge=1, le=1 << 20)]  # of every block but the last, which may have fewer
    shape: tuple[Positive, Positive, Positive]  # (C, H, W)
    num_classes: Annotated[int, Field(ge=1, le=1_000_000)]
    class_names: list[str]
    preprocessing: dict[str, Any]
    coupling: CouplingSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _shape_to_tuple(cls, data: Any) -> Any:
        """JSON has no tuples, and strict parsing takes no list for one."""
        if isinstance(data, dict) and isinstance(data.get("shape"), list):
            return data | {"shape": tuple(data["shape"])}
        return data

    @model_validator(mode="after")
    def _check_consistency(self) -> "Spec":
        if (self.coupling is not None) != (self.kind == "couplings"):
            raise ValueError("a store has a 'coupling' section exactly when its kind is 'couplings'")
        if self.dim * 4 > MAX_ROW_BYTES:
            raise ValueError(f"shape {self.shape} has more than {MAX_ROW_BYTES} bytes a row")
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes")
        return self

    @property
    def dim(self) -> int:
        """n = C·H·W, the number of values of an image."""
        c, h, w = self.shape
        return c * h * w

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return -(-self.rows // self.block_rows)

    @property
    def draws(self) -> int:
        """K, the number of noise draws of each image; 0 for a sample store."""
        return self.coupling.draws if self.coupling else 0

    def rows_of(self, block: int) -> int:
        """The number of rows of a block."""
        assert 0 <= block < self.blocks
        return min(self.block_rows, self.rows - block * self.block_rows)

    def indices(self, block: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The indices in the data set of the rows of a block, (rows,)."""
        start = block * self.block_rows
        return np.arange(start, start + self.rows_of(block), dtype=np.int64)

    def check_labels(self, labels: NDArray[np.int64], name: str) -> None:
        """Raise StoreError with the file's `name` unless all labels are 0 to num_classes - 1."""
        out_of_range = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(out_of_range):
            raise StoreError(f"{name}: got label {out_of_range[0]}, expected 0 to {self.num_classes - 1}")

    def dtype(self, column: str) -> np.dtype[Any]:
        """The stored dtype of column "x", "label", "index", "z" or "noise"."""
        if column == "x":
            return np.dtype("u1")
        if column in ("label", "index"):
            return np.dtype("<i8")
        assert self.coupling is not None
        if column == "z":
            return np.dtype(STORED_DTYPES[self.coupling.z_dtype])
        return np.dtype(self.coupling.noise.dtype).newbyteorder("<")

    @property
    def planes(self) -> tuple[str, ...]:
        """The stored columns that have a value for each draw: one file for each block and draw."""
        if self.coupling is None:
            return ()
        return ("z", "noise") if self.coupling.noise.stored else ("z",)

    def to_json(self) -> bytes:
        """The canonical JSON of the spec, whose hash is part of the store's id."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def lineage(self) -> str:
        """Identity of everything that determines the bytes of a unit: the sha256 of the spec without the number of
        draws, as more draws may be added later."""
        document = self.model_dump(mode="json")
        if self.coupling:
            del document["coupling"]["draws"]
        return hashlib.sha256(canonical_json(document)).hexdigest()


def content_id(spec: Spec, file_sha256: list[str]) -> str:
    """Identity of a store's content: the sha256 of its spec and of the sha256 of every file, in manifest order."""
    return hashlib.sha256(spec.to_json() + "".join(file_sha256).encode()).hexdigest()


class FileRecord(StrictModel):
    """One file of the store: its column, draw (-1 where the column has none) and block, its path, size and sha256. Only
    files of z have a `squared_error`: Σ (z as stored - z as the teacher gave it)²."""

    column: str
    draw: int
    block: int
    path: str
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256
    squared_error: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class Commit(StrictModel):
    """The commit record of a unit: draws `first` … `stop` - 1 of a block. It is written when all files of the unit are
    durable. Beside the files of columns it lists that of "sum_z2": float64 (draws, C, H, W), Σ z² over the rows of the
    block."""

    lineage: Sha256
    block: int
    first: int
    stop: int
    rows: int
    files: list[FileRecord]
    label_counts: dict[str, int]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # that the worker spent in the teacher
    device: str


class Cost(StrictModel):
    """`cost.json`: the seconds that the teacher took to make the couplings, by device name. No hash covers this file:
    it is information, which nobody can check."""

    seconds: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]

    @property
    def total(self) -> float:
        """Seconds on all devices together."""
        return sum(self.seconds.values())


class Totals(StrictModel):
    """Sums over the files of columns of a complete store."""

    files: int
    bytes: int
    label_counts: dict[str, int]
    z_rms_error: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None  # of z as stored against the teacher's own


class Dataset(StrictModel):
    """`dataset.json`: written last, so its presence means that the store is complete."""

    schema_version: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    id: Sha256  # of the spec and the sha256 of every file: the identity of the content
    spec: Spec
    totals: Totals
    records: dict[str, dict[str, Any]]  # where the values are inside each file, for readers without our code
    manifest_sha256: Sha256
    sigma_f_sha256: Sha256 | None

    @model_validator(mode="after")
    def _check_labels(self) -> "Dataset":
        for label in self.totals.label_counts:
            if not label.isdecimal() or int(label) >= self.spec.num_classes:
                raise ValueError(f"label counts of class {label}, which is not in the spec")
        return self


def parse_dataset(data: bytes, name: str) -> Dataset:
    """The document in a dataset.json. Raises StoreError with the file's `name` if it is damaged, or of a version that
    this nfm cannot read; the message then says which version can."""
    try:
        version = json.loads(data)["schema_version"]
        major, minor = map(int, str(version).split("."))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"{name}: got no readable schema_version; expected the dataset.json of a store") from error
    if major != SCHEMA_MAJOR or minor > SCHEMA_MINOR:
        needed = f"nfm {major}.x" if major != SCHEMA_MAJOR else f"a later nfm {major}.x"
        raise StoreError(f"{name}: got schema version {version}, this nfm reads {SCHEMA_VERSION}; install {needed}")
    return parse_json(Dataset, data, name)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of dataset.json, published in docs/dataset.schema.json."""
    header = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:nfm:dataset:{SCHEMA_VERSION}"}
    return header | Dataset.model_json_schema()


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1))
