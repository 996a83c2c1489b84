"""The spec of a store and `dataset.json`, in schema 1.1: JSON documents that are checked when they are read. Documents
of schema 1.0 are read by schema_1_0.py; what writers commit is in commits.py."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, model_validator

from nfm.storage_specs.format.attribution import Attribution
from nfm.storage_specs.format.codecs import STORED_DTYPES, FloatDtype, ZDtype
from nfm.storage_specs.format.names import MAX_VERSION
from nfm.storage_specs.storage.documents import StrictModel, canonical_json, load_json
from nfm.storage_specs.storage.errors import StoreError, UnsupportedError

SCHEMA_MAJOR = 1
SCHEMA_MINOR = 1
SCHEMA_VERSION = f"{SCHEMA_MAJOR}.{SCHEMA_MINOR}"
MAX_ROW_BYTES = 1 << 28  # of one float32 image; a spec with more is damaged or hostile
MAX_DRAWS = 1 << 16
MAX_FILES = 1 << 20  # of columns; a larger store needs larger blocks
MAX_FREE_FORM_BYTES = 1 << 20  # of JSON; what nfm writes takes a few KB
MAX_SQUARED_ERROR = 1e100  # of a file; that of float32 values is below it, and no sum over files overflows

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Kind = Literal["samples", "couplings"]
LayoutName = Literal["webdataset", "zarr"]
NoiseDtype = Literal["float32", "float16"]
NoiseLaw = Literal["philox-as241-v1"]
Precision = Literal["fp32", "tf32", "bf16"]
ImageView = Literal["plain", "mirrored"]
VersionNumber = Annotated[int, Field(ge=1, le=MAX_VERSION)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Draws = Annotated[int, Field(ge=1, le=MAX_DRAWS)]
Rows = Annotated[int, Field(ge=1, le=10**12)]  # a key in a WebDataset file has twelve digits
Positive = Annotated[int, Field(ge=1, le=1 << 48)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
FiniteNonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FinitePositive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _check_size(value: dict[str, Any]) -> dict[str, Any]:
    if (num_bytes := len(json.dumps(value, default=str))) > MAX_FREE_FORM_BYTES:
        raise ValueError(f"got {num_bytes} bytes of JSON, expected at most {MAX_FREE_FORM_BYTES}")
    return value


# A part of a document whose fields the schema does not know.
FreeForm = Annotated[dict[str, Any], AfterValidator(_check_size)]


class PixelSpec(StrictModel):
    """x as 8-bit pixels: x = value / 127.5 - 1, in [-1, 1]."""

    dtype: Literal["uint8"]


class DecoderSpec(StrictModel):
    """The network that turns latents into images: its name, its architecture, and the sha256 of its weights."""

    name: str
    architecture: FreeForm
    sha256: Sha256


class LatentSpec(StrictModel):
    """x as latents of an image: x = (value - shift) · scale, where `value` is what the decoder takes."""

    dtype: FloatDtype
    scale: Annotated[float, Field(ge=1e-6, le=1e6)]  # so that x stays finite
    shift: Annotated[float, Field(ge=-1e6, le=1e6)]
    decoder: DecoderSpec


XSpec = Annotated[PixelSpec | LatentSpec, Field(discriminator="dtype")]


class NoiseSpec(StrictModel):
    """How the noise ε′ was drawn (docs/store.md), in which dtype the teacher saw it, and whether it is stored. If it is
    not, it can be drawn again from law, seed, image index and draw."""

    law: NoiseLaw
    seed: Seed
    dtype: NoiseDtype
    stored: bool


class NetworkSpec(StrictModel):
    """A network that values of a store were made with: its architecture, the sha256 of its weights, and, as
    information, how it was trained."""

    architecture: FreeForm
    sha256: Sha256
    training: FreeForm


class NfmCoupling(StrictModel):
    """z = f(x + η·ε′, label), by the teacher f."""

    kind: Literal["nfm"]
    draws: Draws  # K, of each image
    eta: FiniteNonNegative
    precision: Precision  # of the teacher's matrix products (docs/encode.md)
    z_dtype: ZDtype
    z_scale_sha256: Sha256 | None  # of z_scale.npy, which only int8 has
    noise: NoiseSpec
    teacher: NetworkSpec
    source: Sha256  # id of the sample store that x comes from

    @model_validator(mode="after")
    def _check_scale(self) -> "NfmCoupling":
        _check_scale(self.z_dtype, self.z_scale_sha256)
        return self


class PotentialsSpec(StrictModel):
    """The potentials of a semidiscrete optimal transport problem: the sha256 of `potentials.npy`, the cost that they
    are for, and χ², how far the masses of their cells are from equal."""

    sha256: Sha256
    cost: Literal["dot"]  # -⟨x, ε⟩
    chi2: Finite


class SemidiscreteCoupling(StrictModel):
    """Draw k of row i is the k-th noise, in the order of counters, that falls into the cell of x_i. The store holds the
    counters. The noise of counter c is drawn by the law with index c and, in place of the draw, the label of x_i (0 in
    a store without labels)."""

    kind: Literal["semidiscrete"]
    draws: Draws  # K, of each image
    law: NoiseLaw
    seed: Seed
    potentials: PotentialsSpec
    source: Sha256  # id of the sample store that x comes from


class ReflowCoupling(StrictModel):
    """x was generated by a network from the noise z. There is no η, and x comes from no sample store."""

    kind: Literal["reflow"]
    draws: Literal[1]
    z_dtype: ZDtype
    z_scale_sha256: Sha256 | None
    law: NoiseLaw
    seed: Seed
    generator: NetworkSpec
    sampler: str  # such as "heun31"
    guidance: FiniteNonNegative
    precision: Precision

    @model_validator(mode="after")
    def _check_scale(self) -> "ReflowCoupling":
        _check_scale(self.z_dtype, self.z_scale_sha256)
        return self


def _check_scale(z_dtype: ZDtype, z_scale_sha256: str | None) -> None:
    if (z_scale_sha256 is not None) != (z_dtype == "int8"):
        raise ValueError("z has a scale exactly when it is int8")


Coupling = Annotated[NfmCoupling | SemidiscreteCoupling | ReflowCoupling, Field(discriminator="kind")]


class Spec(StrictModel):
    """Everything that determines the bytes of a store, known before the first file is written."""

    kind: Kind
    layout: LayoutName
    rows: Rows
    block_rows: Annotated[int, Field(ge=1, le=1 << 20)]  # of every block but the last, which may have fewer
    shape: tuple[Positive, Positive, Positive]  # (C, H, W)
    x: XSpec
    views: list[ImageView]  # draw k is of view k mod the number of views
    num_classes: Annotated[int, Field(ge=0, le=1_000_000)]  # 0: the images have no labels
    class_names: list[str]
    names: bool  # whether names.parquet says where each image comes from
    preprocessing: FreeForm
    coupling: Coupling | None = None

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
        max_files = self.num_blocks * (len(self.image_columns) + 2 + 2 * self.num_draws)  # in any layout
        if max_files > MAX_FILES:
            raise ValueError(
                f"{self.rows} rows in blocks of {self.block_rows} with {self.num_draws} draws are up to {max_files} "
                f"files, expected at most {MAX_FILES}; larger blocks make fewer"
            )
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes")
        if self.views not in (["plain"], ["plain", "mirrored"]):
            raise ValueError(f"views {self.views}; there may be ['plain'] or ['plain', 'mirrored']")
        if self.num_draws % len(self.views):
            raise ValueError(f"{self.num_draws} draws do not show each of {len(self.views)} views equally often")
        return self

    @property
    def dim(self) -> int:
        """n = C·H·W, the number of values of an image."""
        return math.prod(self.shape)

    @property
    def num_blocks(self) -> int:
        """The number of blocks."""
        return -(-self.rows // self.block_rows)

    @property
    def num_draws(self) -> int:
        """K, the number of noise draws of each image; 0 for a sample store."""
        return self.coupling.draws if self.coupling else 0

    @property
    def nfm(self) -> NfmCoupling:
        """The coupling section of a store whose z a teacher made, which is the only kind that is written yet."""
        assert isinstance(self.coupling, NfmCoupling)
        return self.coupling

    @property
    def has_labels(self) -> bool:
        """Whether the images have labels."""
        return self.num_classes > 0

    def is_class(self, label: str) -> bool:
        """Whether a text is the decimal number of a class."""
        return label.isascii() and label.isdecimal() and len(label) <= 7 and int(label) < self.num_classes

    def view_of(self, draw: int) -> ImageView:
        """The view of the image that a draw was made of."""
        return self.views[draw % len(self.views)]

    def rows_of(self, block: int) -> int:
        """The number of rows of a block."""
        assert 0 <= block < self.num_blocks
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

    @property
    def image_columns(self) -> tuple[str, ...]:
        """The columns that hold x: the mirrored view of latents has one of its own, as latents cannot be mirrored."""
        if "mirrored" in self.views and isinstance(self.x, LatentSpec):
            return ("x", "x_mirrored")
        return ("x",)

    @property
    def draw_columns(self) -> tuple[str, ...]:
        """The stored columns that have a value for each draw: one file for each block and draw."""
        match self.coupling:
            case None:
                return ()
            case SemidiscreteCoupling():
                return ("counter",)
            case ReflowCoupling():
                return ("z",)  # it is the noise
            case NfmCoupling(noise=noise):
                return ("z", "noise") if noise.stored else ("z",)

    def dtype(self, column: str) -> np.dtype[Any]:
        """The stored dtype of a column: "x", "x_mirrored", "label", "index", "z", "noise" or "counter"."""
        if column in ("label", "index", "counter"):
            return np.dtype("<i8")
        if column in ("x", "x_mirrored"):
            return np.dtype("u1" if self.x.dtype == "uint8" else STORED_DTYPES[self.x.dtype])
        assert isinstance(self.coupling, NfmCoupling | ReflowCoupling), column
        if column == "z":
            return np.dtype(STORED_DTYPES[self.coupling.z_dtype])
        assert column == "noise", column
        return np.dtype(self.nfm.noise.dtype).newbyteorder("<")

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


class FileRecord(StrictModel):
    """One file of a column: its column, draw (-1 where the column has none) and block, its path, size and sha256. Only
    files of z have a `squared_error`: Σ (z as stored - z as the teacher gave it)²."""

    column: str
    draw: int
    block: int
    path: str
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256
    squared_error: Annotated[float, Field(ge=0, le=MAX_SQUARED_ERROR)] | None = None


class Totals(StrictModel):
    """Sums over the files of columns of a complete store."""

    files: int
    bytes: int
    label_counts: dict[str, int]
    z_rms_error: FiniteNonNegative | None  # of z as stored against the teacher's own


class DocumentFile(StrictModel):
    """A file that belongs to a version as a whole: its path in the store, and its sha256."""

    path: str
    sha256: Sha256


class NamesFile(DocumentFile):
    """The file of the names of the images, and the sha256 of its rows (see `image_names.hash_rows`), as another library
    writes the same rows as other bytes."""

    rows_sha256: Sha256


class Documents(StrictModel):
    """The files of a version beside those of columns. Versions may share them."""

    manifest: DocumentFile
    readme: DocumentFile
    croissant: DocumentFile
    names: NamesFile | None = None  # where the spec says so
    sigma_f: DocumentFile | None = None  # these three where there is z; the last where there are labels too
    z_sums: DocumentFile | None = None
    z_class_sums: DocumentFile | None = None

    def by_name(self) -> dict[str, DocumentFile]:
        """Those that exist, by name."""
        return {name: file for name in type(self).model_fields if (file := getattr(self, name)) is not None}

    def derived_sha256(self) -> dict[str, str]:
        """The hashes that the id covers, by name: those of the files that are computed from columns, and that of the
        rows of names."""
        files = {"sigma_f": self.sigma_f, "z_sums": self.z_sums, "z_class_sums": self.z_class_sums}
        hashes = {name: file.sha256 for name, file in files.items() if file is not None}
        return hashes if self.names is None else hashes | {"names": self.names.rows_sha256}


class Dataset(StrictModel):
    """One version of a store: `versions/000N.json`, which never changes once it is written, and of the newest version
    also `dataset.json`, written last, so that its presence means that the store is complete."""

    schema_version: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+$")]
    id: Sha256  # of the content (see `content_id`); versions that differ in their attribution alone share it
    version: VersionNumber
    parent: Sha256 | None  # id of the version before this one
    spec: Spec
    totals: Totals
    records: dict[str, FreeForm]  # where the values are inside each file, for readers without our code
    documents: Documents
    attribution: Attribution

    @model_validator(mode="after")
    def _check_labels(self) -> "Dataset":
        for label in self.totals.label_counts:
            if not self.spec.is_class(label):
                raise ValueError(f"label counts of class {label[:20]}, which is not in the spec")
        return self


class Tag(StrictModel):
    """`tags/<name>.json`: a name for a version."""

    version: VersionNumber
    id: Sha256


def content_id(
    spec: Spec,
    files: Iterable[FileRecord],
    label_counts: Iterable[Mapping[int, int]],
    derived: Mapping[str, str],
) -> str:
    """Identity of a store's content: the sha256 of JSON (sorted keys, no spaces, ASCII) of an object with

    - "spec": the spec;
    - "files": column, draw, block, sha256 and squared error of each file, in the order of the manifest;
    - "label_counts": for each block, [label, rows] in the order of labels;
    - "derived": what `Documents.derived_sha256` gives.
    """
    document = {
        "spec": spec.model_dump(mode="json"),
        "files": [[file.column, file.draw, file.block, file.sha256, file.squared_error] for file in files],
        "label_counts": [[[label, counts[label]] for label in sorted(counts)] for counts in label_counts],
        "derived": dict(derived),
    }
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_schema_version(data: bytes, name: str) -> tuple[int, int]:
    """Major and minor schema version of a document. Raises StoreError with the file's `name` if it has none, or one
    that this nfm cannot read; the message then says which nfm can."""
    document = load_json(data, name)
    try:
        version = document["schema_version"]
        match = re.fullmatch(r"(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})", version)
        if match is None:
            raise ValueError(version)
        major, minor = int(match[1]), int(match[2])
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{name}: got no readable schema_version; expected the dataset.json of a store") from error
    if major != SCHEMA_MAJOR or minor > SCHEMA_MINOR:
        needed = f"nfm {major}.x" if major != SCHEMA_MAJOR else f"a later nfm {major}.x"
        raise UnsupportedError(
            f"{name}: got schema version {version}, this nfm reads {SCHEMA_VERSION}; install {needed}"
        )
    return major, minor


def json_schema() -> dict[str, Any]:
    """The JSON Schema of dataset.json, published in docs/dataset.schema.json."""
    header = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:nfm:dataset:{SCHEMA_VERSION}"}
    return header | Dataset.model_json_schema()


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1))
