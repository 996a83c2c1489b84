"""croissant.json, the metadata that data set search engines and loaders read: Croissant 1.1 of MLCommons
(http://mlcommons.org/croissant/1.1), with provenance in the terms of PROV-O (https://www.w3.org/TR/prov-o/).

What Croissant requires and a store does not state is stated to be unknown. Paths are relative to the folder of the
store.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from nfm.storage_specs.format.card_text import (
    TUPLES_OF_VIEWS,
    Z_IS_THE_IMAGE,
    describe_meaning,
    describe_storage,
    describe_views,
    teacher_name,
    title,
)
from nfm.storage_specs.format.dataset import layout_of
from nfm.storage_specs.format.image_names import NAMES_SCHEMA
from nfm.storage_specs.format.manifest import FILE_SCHEMA
from nfm.storage_specs.format.names import SIGMA_F_NAME, Z_SCALE_FILE
from nfm.storage_specs.format.schema import Dataset, LatentSpec, Spec
from nfm.storage_specs.format.zarr_layout import GROUP_FOLDER
from nfm.storage_specs.storage.text import printable

Node = dict[str, Any]  # of JSON-LD

UNKNOWN: Final = "NOASSERTION"  # SPDX's word for what is not stated
# Croissant requires a date. A store has none, since its bytes do not depend on when it was written; the time stamps in
# its tar files are this one too.
NO_DATE: Final = "1970-01-01"
_NO_DATE_SENTENCE = f"The date {NO_DATE} stands for none: a store does not say when it was written."

TAR = "application/x-tar"
PARQUET = "application/x-parquet"
# Formats without a media type are named by an address (Croissant 1.1, FileObject).
NPY = "https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html"
ZARR = "https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html"

_CONTEXT: Node = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "annotation": "cr:annotation",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "excludes": "cr:excludes",
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "prov": "http://www.w3.org/ns/prov#",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_ARROW_TYPES = {"string": "sc:Text", "int32": "cr:Int32", "int64": "cr:Int64", "double": "cr:Float64"}
_NUMPY_TYPES = {
    "|u1": "cr:UInt8",
    "|i1": "cr:Int8",
    "<u2": "cr:UInt16",
    "<f2": "cr:Float16",
    "<f4": "cr:Float32",
    "<i8": "cr:Int64",
}


def croissant(dataset: Dataset) -> Node:
    """The document of a store."""
    spec = dataset.spec
    sigma_f = dataset.documents.sigma_f
    describe_columns = _zarr_columns if spec.layout == "zarr" else _webdataset_columns
    column_files, column_records = describe_columns(dataset)
    return {
        **_origin(dataset),
        "name": f"nfm-{spec.kind}-{dataset.id[:12]}",
        "description": " ".join(
            [
                f"{title(spec)}.",
                *describe_meaning(spec, sigma_f.path if sigma_f else None, printable),
                *describe_views(spec),
                *describe_storage(spec),
                _NO_DATE_SENTENCE,
            ]
        ),
        "identifier": dataset.id,
        "distribution": [*_documents(dataset), *column_files],
        "recordSet": [*_document_records(dataset), *_classes(spec), *column_records],
    }


def tuples_croissant(dataset: Dataset, tars: Mapping[str, str]) -> Node:
    """The document of a folder of tuples that were exported from a coupling store. `tars` has the sha256 of each of its
    files k<draw>/<block>.tar, by path.

    The records of "pairs" have all members of a sample. They are joined in steps, as mlcroissant 1.1 joins two sources
    at a time.
    """
    spec, sigma_f = dataset.spec, dataset.documents.sigma_f
    assert sigma_f is not None
    files = [_file(path, digest, TAR) for path, digest in sorted(tars.items())]
    contained_in = [{"@id": file["@id"]} for file in files]
    columns = ["x", "z", "noise", *(["label"] if spec.has_labels else [])]
    file_sets = [_members(f"{column}-members", column, contained_in) for column in columns]
    record_sets = [_member_records(column, column, f"{column}-members", "of each sample") for column in columns]
    joined = ["x"]
    for column in columns[1:]:
        left, right = "-".join(joined), column
        joined.append(column)
        name = "pairs" if joined == columns else "-".join(joined)
        record_sets.append(_joined_records(name, left, joined[:-1], right))
    return {
        **_origin(dataset),
        "name": f"nfm-tuples-{dataset.id[:12]}",
        "description": " ".join(
            [
                f"Tuples of a store. {title(spec)}.",
                *describe_meaning(spec, SIGMA_F_NAME, printable),
                *([TUPLES_OF_VIEWS] if "mirrored" in spec.views else []),
                "A key is the index of the image and the number of the draw.",
                _NO_DATE_SENTENCE,
            ]
        ),
        "prov:wasDerivedFrom": [
            {"@type": "prov:Entity", "@id": _urn(dataset.id), "prov:label": "coupling store"},
            *_sources(dataset),
        ],
        "distribution": [_file(SIGMA_F_NAME, sigma_f.sha256, NPY), *files, *file_sets],
        "recordSet": [*_classes(spec), *record_sets],
    }


def _urn(store_id: str) -> str:
    """The name of a store's content."""
    return f"urn:nfm:{store_id}"


def _origin(dataset: Dataset) -> Node:
    """What a document says of the data set as a whole: who made it, from what, how, and on what terms."""
    attribution, spec = dataset.attribution, dataset.spec
    reference = f"nfm {spec.kind} {dataset.id}, version {dataset.version}"
    terms = [f"Licence: {attribution.licence or 'not stated'}."]
    if attribution.notes is not None:
        terms.append(attribution.notes)
    if spec.coupling is not None:
        terms.append(Z_IS_THE_IMAGE)
    origin: Node = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "version": f"{dataset.version}.0.0",
        "url": attribution.source_url or "./",  # what is known of where it lies is: beside this file
        "license": _licence(attribution.licence),
        "creator": _creator(attribution.creator),
        "citeAs": attribution.citation or reference,
        "datePublished": NO_DATE,
        "keywords": ["flow matching", "normalizing flow", *(["noise-data pairs"] if spec.coupling else ["images"])],
        "usageInfo": {"@type": "sc:CreativeWork", "name": "Terms of use", "text": "\n".join(terms)},
        "prov:wasDerivedFrom": _sources(dataset),
        "prov:wasGeneratedBy": _activity(spec),
    }
    if attribution.creator is not None:
        origin["prov:wasAttributedTo"] = {"@type": "prov:Agent", "prov:label": attribution.creator}
    if dataset.parent not in (None, dataset.id):
        origin["prov:wasRevisionOf"] = {"@type": "prov:Entity", "@id": _urn(str(dataset.parent))}
    return origin


def _licence(licence: str | None) -> Node:
    if licence is None:
        return {
            "@type": "sc:CreativeWork",
            "name": UNKNOWN,
            "description": "The store does not state the licence of its data.",
        }
    node = {"@type": "sc:CreativeWork", "name": licence}
    # An SPDX expression is one identifier from SPDX's list, one that refers to a text elsewhere, or a combination.
    if re.fullmatch(r"[A-Za-z0-9.-]+", licence) and not licence.startswith(("LicenseRef-", "DocumentRef-")):
        node["url"] = f"https://spdx.org/licenses/{licence}.html"
    return node


def _creator(creator: str | None) -> Node:
    """Croissant takes persons and organizations; a store does not say which of them its creator is."""
    node = {"@type": "sc:Organization", "name": creator or UNKNOWN}
    if creator is None:
        node["description"] = "The store does not state who made its data."
    return node


def _sources(dataset: Dataset) -> list[Node]:
    """What the data were made from."""
    sources: list[Node] = []
    if dataset.spec.coupling is not None:
        source = dataset.spec.nfm.source
        sources.append({"@type": "prov:Entity", "@id": _urn(source), "prov:label": "sample store of x"})
    if dataset.attribution.source_url is not None:
        sources.append(
            {"@type": "prov:Entity", "prov:label": "source of the images", "url": dataset.attribution.source_url}
        )
    return sources


def _activity(spec: Spec) -> Node:
    """How the data were made."""
    used: list[Node] = []
    if isinstance(spec.x, LatentSpec):
        decoder = spec.x.decoder
        used.append({"@type": "prov:Entity", "prov:label": f"decoder {decoder.name}", "sha256": decoder.sha256})
    if spec.coupling is None:
        label = f"preparation of images: {json.dumps(spec.preprocessing, sort_keys=True)}"
    else:
        nfm = spec.nfm
        label = f"encoding by the teacher, {nfm.draws} draws of noise per image, η = {nfm.eta}, {nfm.precision}"
        teacher, noise = nfm.teacher, nfm.noise
        used += [
            {"@type": "prov:Entity", "prov:label": f"teacher {teacher_name(spec)}", "sha256": teacher.sha256},
            {"@type": "prov:Entity", "prov:label": f"noise law {noise.law}, seed {noise.seed}, {noise.dtype}"},
        ]
    activity: Node = {"@type": "prov:Activity", "prov:label": label}
    return activity | ({"prov:used": used} if used else {})


def _file(path: str, sha256: str, encoding: str) -> Node:
    return {
        "@type": "cr:FileObject",
        "@id": path,
        "name": path,
        "contentUrl": path,
        "encodingFormat": encoding,
        "sha256": sha256,
    }


def _documents(dataset: Dataset) -> list[Node]:
    """The files that belong to the version as a whole, but for the cards."""
    files = []
    for name, file in dataset.documents.by_name().items():
        if name not in ("readme", "croissant"):
            files.append(_file(file.path, file.sha256, PARQUET if file.path.endswith(".parquet") else NPY))
    if dataset.spec.coupling is not None and dataset.spec.nfm.z_scale_sha256 is not None:
        files.append(_file(Z_SCALE_FILE, dataset.spec.nfm.z_scale_sha256, NPY))
    return files


def _record_set(name: str, description: str, fields: list[Node]) -> Node:
    """A record set whose key is the first field."""
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": description,
        "key": {"@id": fields[0]["@id"]},
        "field": fields,
    }


def _field(record_set: str, name: str, data_type: str, **properties: Any) -> Node:
    return {
        "@type": "cr:Field",
        "@id": f"{record_set}/{name}",
        "name": name,
        "dataType": data_type,
        **properties,
    }


def _document_records(dataset: Dataset) -> list[Node]:
    """The rows of the Parquet files."""
    documents = dataset.documents
    tables = [("files", "One file of a column.", documents.manifest, "path", FILE_SCHEMA)]
    if documents.names is not None:
        tables.append(("names", "Where one image comes from.", documents.names, "index", NAMES_SCHEMA))
    record_sets = []
    for record_set, description, file, key, schema in tables:
        columns = [schema.field(key), *(column for column in schema if column.name != key)]
        fields = [
            _field(
                record_set,
                column.name,
                _ARROW_TYPES[str(column.type)],
                source={"fileObject": {"@id": file.path}, "extract": {"column": column.name}},
            )
            for column in columns
            if str(column.type) in _ARROW_TYPES
        ]
        record_sets.append(_record_set(record_set, description, fields))
    return record_sets


def _classes(spec: Spec) -> list[Node]:
    """The names of the classes, where there are any."""
    if not spec.has_labels:
        return []
    fields = [_field("classes", "label", "sc:Integer"), _field("classes", "name", "sc:Text")]
    record_set = _record_set("classes", "The name of each class.", fields)
    data = [{"classes/label": label, "classes/name": name} for label, name in enumerate(spec.class_names)]
    return [record_set | {"dataType": "sc:Enumeration", "data": data}]


def _members(name: str, column: str, contained_in: Node | list[Node]) -> Node:
    """The members of one column in tar files."""
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        "containedIn": contained_in,
        "encodingFormat": "text/plain" if column == "label" else NPY,
        "includes": "*.cls" if column == "label" else f"*.{column}.npy",
    }


def _value_field(record_set: str, column: str, source: Node) -> Node:
    """The value of a column: a label, or the bytes of an npy file, for which Croissant has no type but text."""
    if column == "label":
        return _field(record_set, column, "sc:Integer", source=source, description="Index of the class.")
    return _field(record_set, column, "sc:Text", source=source, description="The bytes of an npy file.")


def _member_records(name: str, column: str, file_set: str, of_what: str, references: str | None = None) -> Node:
    """The members of one column, by key, which is the first part of a member's name. `references` is the field of
    another record set that has the same keys."""
    key = _field(
        name,
        "key",
        "sc:Text",
        source={
            "fileSet": {"@id": file_set},
            "extract": {"fileProperty": "filename"},
            "transform": {"regex": r"^([^.]*)\..*$"},
        },
    )
    if references is not None:
        key["references"] = {"field": {"@id": references}}
    content = {"fileSet": {"@id": file_set}, "extract": {"fileProperty": "content"}}
    return _record_set(name, f"The {column} {of_what}.", [key, _value_field(name, column, content)])


def _joined_records(name: str, left: str, left_columns: list[str], right: str) -> Node:
    """The records of two record sets, joined by their keys; the right one has one column of its own name."""
    key = _field(
        name,
        "key",
        "sc:Text",
        source={"field": {"@id": f"{left}/key"}},
        references={"field": {"@id": f"{right}/key"}},
    )
    sources = {column: f"{left}/{column}" for column in left_columns} | {right: f"{right}/{right}"}
    fields = [_value_field(name, column, {"field": {"@id": source}}) for column, source in sources.items()]
    return _record_set(name, f"The {', '.join(sources)} of each sample.", [key, *fields])


def _webdataset_columns(dataset: Dataset) -> tuple[list[Node], list[Node]]:
    """The tar files of each column and draw, their members, and the values by key, which is the same in all of them."""
    spec = dataset.spec
    files: list[Node] = []
    record_sets: list[Node] = []

    def add(name: str, column: str, folder: str, of_what: str) -> None:
        tars = f"{name}-tars"
        files.append(
            {"@type": "cr:FileSet", "@id": tars, "name": tars, "encodingFormat": TAR, "includes": f"{folder}/*.tar"}
        )
        add_members(name, column, tars, of_what)

    def add_members(name: str, column: str, tars: str, of_what: str) -> None:
        files.append(_members(f"{name}-members", column, {"@id": tars}))
        references = None if name == "x" else "x/key"
        record_sets.append(_member_records(name, column, f"{name}-members", of_what, references))

    for column in spec.image_columns:
        add(column, column, column, "of each image")
    if spec.has_labels:
        add_members("label", "label", "x-tars", "of each image")
    for column in spec.draw_columns:
        for draw in range(spec.num_draws):
            add(f"{column}-k{draw:03d}", column, f"{column}/k{draw:03d}", f"of each image in draw {draw}")
    return files, record_sets


def _zarr_columns(dataset: Dataset) -> tuple[list[Node], list[Node]]:
    """The files of each array, and the array as one record. Row i of every array is of the same image."""
    spec = dataset.spec
    files: list[Node] = []
    record_sets: list[Node] = []
    for column in (*layout_of(dataset).base_columns(spec), *spec.draw_columns):
        shape = [spec.rows, *(() if column in ("label", "index") else spec.shape)]
        if column in spec.draw_columns:
            shape.insert(0, spec.num_draws)
        files.append(
            {
                "@type": "cr:FileSet",
                "@id": f"{column}-files",
                "name": f"{column}-files",
                "encodingFormat": ZARR,
                "includes": f"{GROUP_FOLDER}/{column}/*",
            }
        )
        field = _field(
            column,
            column,
            _NUMPY_TYPES[spec.dtype(column).str],
            isArray=True,
            arrayShape=",".join(map(str, shape)),
            source={"fileSet": {"@id": f"{column}-files"}},
        )
        record_set = _record_set(column, f"The array {column} of the Zarr group {GROUP_FOLDER}.", [field])
        del record_set["key"]  # there is one record
        record_sets.append(record_set)
    return files, record_sets
