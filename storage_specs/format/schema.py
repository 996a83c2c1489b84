"""The spec of a store, `dataset.json`, and the records its writers commit. All of it is plain JSON, checked on
reading.
"""

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
MAX_ROW_BYTES = 1 << 28  # a row beyond this is a damaged or hostile spec, not an image

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Kind = Literal["samples", "couplings"]
LayoutName = Literal["webdataset", "zarr"]
NoiseDtype = Literal["float32", "float16"]
Precision = Literal["fp32", "tf32", "bf16"]
Positive = Annotated[int, Field(ge=1, le=1 << 48)]


class NoiseSpec(StrictModel):
    """How ε′ was drawn (docs/store.md), in which dtype the teacher saw it, and whether files hold it or the law gives
    it back."""

    law: Literal["philox-as241-v1"]
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]
    dtype: NoiseDtype
    stored: bool


class TeacherSpec(StrictModel):
    """The network f that made z: its architecture, the sha256 of its weights, and how it was trained, for the
    reader.
    """

    architecture: dict[str, Any]
    sha256: Sha256
    training: dict[str, Any]


class CouplingSpec(StrictModel):
    """What only a coupling store has."""

    draws: Annotated[int, Field(ge=1, le=1 << 16)]
    eta: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    precision: Precision  # of the teacher's matrix products (docs/encode.md)
    z_dtype: ZDtype
    z_scale_sha256: Sha256 | None  # of z_scale.npy, which int8 has
    noise: NoiseSpec
    teacher: TeacherSpec
    source: Sha256  # id of the sample store that x comes from

    @model_validator(mode="after")
    def _scale(self) -> "CouplingSpec":
        if (self.z_scale_sha256 is not None) != (self.z_dtype == "int8"):
            raise ValueError("z has a scale exactly when it is int8")
        return self


class Spec(StrictModel):
    """Everything that fixes the bytes of a store, known before the first file is written."""

    kind: Kind
    layout: LayoutName
    rows: Positive
    block_rows: Annotated[int, Field(ge=1, le=1 << 20)]
    shape: tuple[Positive, Positive, Positive]  # (C, H, W)
    num_classes: Annotated[int, Field(ge=1, le=1_000_000)]
    class_names: list[str]
    preprocessing: dict[str, Any]
    coupling: CouplingSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("shape"), list):
            return data | {"shape": tuple(data["shape"])}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> "Spec":
        if (self.coupling is not None) != (self.kind == "couplings"):
            raise ValueError("a store has a 'coupling' section exactly when its kind is 'couplings'")
        if self.dim * 4 > MAX_ROW_BYTES:
            raise ValueError(f"shape {self.shape} has more than {MAX_ROW_BYTES} bytes a row")
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes")
        return self

    @property
    def dim(self) -> int:
        """n = C·H·W."""
        c, h, w = self.shape
        return c * h * w

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block_rows)

    @property
    def draws(self) -> int:
        return self.coupling.draws if self.coupling else 0

    def rows_of(self, block: int) -> int:
        assert 0 <= block < self.blocks
        return min(self.block_rows, self.rows - block * self.block_rows)

    def indices(self, block: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        start = block * self.block_rows
        return np.arange(start, start + self.rows_of(block), dtype=np.int64)

    def check_labels(self, labels: NDArray[np.int64], name: str) -> None:
        """Raise StoreError, naming the file, unless all are class indices."""
        bad = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(bad):
            raise StoreError(f"{name}: got label {bad[0]}, expected 0 to {self.num_classes - 1}")

    def dtype(self, column: str) -> np.dtype[Any]:
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
        """The columns that have one file a block and draw."""
        if self.coupling is None:
            return ()
        return ("z", "noise") if self.coupling.noise.stored else ("z",)

    def canonical(self) -> bytes:
        return canonical_json(self.model_dump(mode="json"))

    @property
    def lineage(self) -> str:
        """Identity of everything that fixes the bytes of a unit: the spec but for the number of draws, which may
        grow.
        """
        document = self.model_dump(mode="json")
        if self.coupling:
            del document["coupling"]["draws"]
        return hashlib.sha256(canonical_json(document)).hexdigest()


def content_id(spec: Spec, file_sha256: list[str]) -> str:
    """Identity of a store's content: of its spec and the sha256 of every file, in manifest order."""
    return hashlib.sha256(spec.canonical() + "".join(file_sha256).encode()).hexdigest()


class FileRecord(StrictModel):
    """One file of the store: which column it holds, of which draw (-1: none) and block, and its exact bytes. Files of z
    have their `squared_error`: Σ (z as stored - z as the teacher gave it)²."""

    column: str
    draw: int
    block: int
    path: str
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256
    squared_error: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class Commit(StrictModel):
    """A block with draws `first` … `stop` - 1 whose files are all durable; the unit of resume. Beside its files of the
    store it lists "sum_z2": float64 (draws, C, H, W), Σ z² over the rows of the block."""

    lineage: Sha256
    block: int
    first: int
    stop: int
    rows: int
    files: list[FileRecord]
    label_counts: dict[str, int]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # that a worker spent in the teacher
    device: str


class Cost(StrictModel):
    """`cost.json`: what the couplings took to make, by name of the device. Told, not proved: no hash covers it."""

    seconds: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Totals(StrictModel):
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
    records: dict[str, dict[str, Any]]  # for readers without our code: where the values are inside each file
    manifest_sha256: Sha256
    sigma_f_sha256: Sha256 | None

    @model_validator(mode="after")
    def _labels_in_range(self) -> "Dataset":
        for label in self.totals.label_counts:
            if not label.isdecimal() or int(label) >= self.spec.num_classes:
                raise ValueError(f"label counts of class {label}, which is not in the spec")
        return self


def parse_dataset(data: bytes, name: str) -> Dataset:
    """`dataset.json`, refusing other major versions with the version that reads them."""
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
    """The JSON Schema of dataset.json, which the docs publish."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:nfm:dataset:{SCHEMA_VERSION}"}
    return head | Dataset.model_json_schema()


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1))
