"""What differs between the schemas that this nfm reads: how a document is parsed, where files lie, what the id is."""

import re
from collections.abc import Iterable, Mapping

from nfm.storage_specs.format import schema, schema_1_0
from nfm.storage_specs.format.image_names import max_names_bytes
from nfm.storage_specs.format.layouts import LAYOUTS, LAYOUTS_1_0, Layout
from nfm.storage_specs.format.manifest import max_manifest_bytes
from nfm.storage_specs.format.names import (
    CROISSANT_FILE,
    MANIFEST_NAME,
    MAX_CARD_BYTES,
    MAX_DOCUMENT_BYTES,
    NAMES_NAME,
    README_FILE,
    SIGMA_F_NAME,
    VERSIONS_FOLDER,
    Z_CLASS_SUMS_NAME,
    Z_SUMS_NAME,
)
from nfm.storage_specs.format.schema import Dataset, FileRecord, NfmCoupling, Spec
from nfm.storage_specs.format.sums import NUM_POWERS
from nfm.storage_specs.storage.documents import parse_json
from nfm.storage_specs.storage.errors import StoreError, UnsupportedError

MAX_NPY_HEADER_BYTES = 4096
_DOCUMENT_NAMES = {
    "manifest": MANIFEST_NAME,
    "names": NAMES_NAME,
    "readme": README_FILE,
    "croissant": CROISSANT_FILE,
    "sigma_f": SIGMA_F_NAME,
    "z_sums": Z_SUMS_NAME,
    "z_class_sums": Z_CLASS_SUMS_NAME,
}


def parse_dataset(data: bytes, name: str) -> Dataset:
    """The document in a dataset.json, of any schema that this nfm reads. Raises StoreError with the file's `name` if it
    is damaged, of a later schema, or names other documents than its spec asks for."""
    if schema.read_schema_version(data, name) == (1, 0):
        return schema_1_0.parse_dataset(data, name)
    dataset = parse_json(Dataset, data, name)
    check_kind_is_supported(dataset.spec, name)
    documents = dataset.documents.by_name()
    if set(documents) != expected_documents(dataset.spec):
        raise StoreError(
            f"{name}: got documents {sorted(documents)}, expected {sorted(expected_documents(dataset.spec))}"
        )
    for kind, file in documents.items():
        match = re.fullmatch(rf"{VERSIONS_FOLDER}/([0-9]{{4,7}})/{re.escape(_DOCUMENT_NAMES[kind])}", file.path)
        if match is None or not 1 <= int(match[1]) <= dataset.version:
            raise StoreError(f"{name}: documents.{kind}: got path {file.path[:100]!r}; the file is damaged")
    if (dataset.parent is None) != (dataset.version == 1):
        raise StoreError(f"{name}: expected a parent of every version but the first; the file is damaged")
    return dataset


def expected_documents(spec: Spec) -> set[str]:
    """The names of the documents that a version of a store has."""
    names = {"manifest", "readme", "croissant"}
    if spec.names:
        names.add("names")
    if "z" in spec.draw_columns:
        names |= {"sigma_f", "z_sums"}
        if spec.has_labels:
            names.add("z_class_sums")
    return names


def max_document_bytes(dataset: Dataset) -> dict[str, int]:
    """Upper bounds of the sizes of a version's documents, by name."""
    spec = dataset.spec
    return {
        "manifest": max_manifest_bytes(spec, layout_of(dataset)),
        "names": min(max_names_bytes(spec.rows), MAX_DOCUMENT_BYTES),
        "readme": MAX_CARD_BYTES,
        "croissant": MAX_CARD_BYTES,
        "sigma_f": MAX_NPY_HEADER_BYTES + 4 * spec.dim,
        "z_sums": MAX_NPY_HEADER_BYTES + 8 * NUM_POWERS * spec.dim,
        "z_class_sums": MAX_NPY_HEADER_BYTES + 8 * NUM_POWERS * spec.num_classes,
    }


def check_kind_is_supported(spec: Spec, name: str) -> None:
    """Raise StoreError with the file's `name` for a kind of coupling that the schema has and this nfm does not write or
    read yet."""
    if spec.coupling is not None and not isinstance(spec.coupling, NfmCoupling):
        raise UnsupportedError(
            f"{name}: got a coupling of kind {spec.coupling.kind!r}; this nfm reads and writes 'nfm' alone"
        )


def is_1_0(dataset: Dataset) -> bool:
    """Whether a document is of schema 1.0."""
    return dataset.schema_version == schema_1_0.SCHEMA_VERSION


def layout_of(dataset: Dataset) -> Layout:
    """The layout of the files of a store."""
    return (LAYOUTS_1_0 if is_1_0(dataset) else LAYOUTS)[dataset.spec.layout]


def content_id(dataset: Dataset, files: list[FileRecord], label_counts: Iterable[Mapping[int, int]]) -> str:
    """The id that a document must have, from its spec and the rows of its manifest."""
    if is_1_0(dataset):
        return schema_1_0.content_id(dataset.spec, [file.sha256 for file in files])
    return schema.content_id(dataset.spec, files, label_counts, dataset.documents.derived_sha256())
