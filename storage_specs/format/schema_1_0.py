"""Documents of schema 1.0, which this nfm reads and does not write.

A store of 1.0 has one version, without a number. Its id covers the spec and the files of columns, but not σ_f, the
label counts and the rounding errors. Its files of documents lie in its folder, and so do the arrays of the Zarr layout.
"""

import hashlib
from typing import Annotated, Any

from pydantic import Field, ValidationError

from nfm.storage_specs.format.attribution import Attribution
from nfm.storage_specs.format.codecs import ZDtype
from nfm.storage_specs.format.names import MANIFEST_NAME, SIGMA_F_NAME
from nfm.storage_specs.format.schema import (
    Dataset,
    DocumentFile,
    Documents,
    Kind,
    LayoutName,
    NetworkSpec,
    NoiseSpec,
    Precision,
    Sha256,
    Spec,
    Totals,
)
from nfm.storage_specs.storage.documents import StrictModel, canonical_json, parse_json
from nfm.storage_specs.storage.errors import StoreError

SCHEMA_VERSION = "1.0"


class CouplingSpec(StrictModel):
    """The part of the spec that only a coupling store has."""

    draws: int
    eta: float
    precision: Precision
    z_dtype: ZDtype
    z_scale_sha256: Sha256 | None
    noise: NoiseSpec
    teacher: NetworkSpec
    source: Sha256


class SpecDocument(StrictModel):
    """The spec of a store. What its values may be is checked by `Spec`."""

    kind: Kind
    layout: LayoutName
    rows: int
    block_rows: int
    shape: list[int]
    num_classes: Annotated[int, Field(ge=1)]
    class_names: list[str]
    preprocessing: dict[str, Any]
    coupling: CouplingSpec | None = None


class DatasetDocument(StrictModel):
    """`dataset.json`."""

    schema_version: Annotated[str, Field(pattern=r"^1\.0$")]
    id: Sha256
    spec: SpecDocument
    totals: Totals
    records: dict[str, dict[str, Any]]
    manifest_sha256: Sha256
    sigma_f_sha256: Sha256 | None


def parse_dataset(data: bytes, name: str) -> Dataset:
    """The document in a dataset.json of schema 1.0, as one of today. Raises StoreError with the file's `name` if it is
    damaged."""
    document = parse_json(DatasetDocument, data, name)
    spec = document.spec.model_dump(mode="json")
    spec |= {"x": {"dtype": "uint8"}, "views": ["plain"], "names": False}
    if spec["coupling"] is not None:
        spec["coupling"] |= {"kind": "nfm"}
    sigma_f = None
    if document.sigma_f_sha256 is not None:
        sigma_f = DocumentFile(path=SIGMA_F_NAME, sha256=document.sigma_f_sha256)
    unknown = DocumentFile(path="", sha256="0" * 64)  # 1.0 has no hashes of its cards
    if (document.sigma_f_sha256 is not None) != (document.spec.coupling is not None):
        raise StoreError(f"{name}: sigma_f_sha256: expected it exactly of couplings; the file is damaged")
    try:
        return Dataset(
            schema_version=document.schema_version,
            id=document.id,
            version=1,
            parent=None,
            spec=Spec.model_validate(spec),
            totals=document.totals,
            records=document.records,
            documents=Documents(
                manifest=DocumentFile(path=MANIFEST_NAME, sha256=document.manifest_sha256),
                readme=unknown,
                croissant=unknown,
                sigma_f=sigma_f,
            ),
            attribution=Attribution(),
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise StoreError(f"{name}: {field}: {first['msg']}; the file is damaged") from error


def content_id(spec: Spec, file_sha256: list[str]) -> str:
    """Identity of a store's content in 1.0: the sha256 of its spec and of the sha256 of every file, in manifest
    order."""
    document = spec.model_dump(mode="json")
    for key in ("x", "views", "names"):
        del document[key]
    if document["coupling"] is not None:
        del document["coupling"]["kind"]
    return hashlib.sha256(canonical_json(document) + "".join(file_sha256).encode()).hexdigest()
