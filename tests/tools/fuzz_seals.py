"""Hashes, totals and ids made again after a change, as somebody does who changes a store on purpose: so a change gets
past the outer checks to those behind them."""

import io
import json
from contextlib import suppress
from hashlib import sha256 as new_sha256
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from nfm.storage_specs.format.image_names import hash_rows
from nfm.storage_specs.format.layouts import LAYOUTS, LAYOUTS_1_0
from nfm.storage_specs.format.manifest import count_expected_files, expected_keys, view_of
from nfm.storage_specs.format.schema import FileRecord, Spec
from nfm.storage_specs.reading.store import sum_totals
from nfm.storage_specs.storage.documents import canonical_json
from nfm.storage_specs.storage.files import sha256
from tests.tools.fuzz_files import Files

# What values that no document may have can raise here; then they keep the hashes that they had.
UNSEALABLE = (
    *(KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError, OverflowError, OSError),
    *(ValidationError, pa.ArrowException, AssertionError),
)
MAX_FILES = 500  # of a store whose manifest is made again
COLUMN_FIELDS = ("x", "label", "index", "z", "noise")


class DuplicateKeyError(ValueError):
    """A JSON object has a key twice."""


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise DuplicateKeyError
    return dict(pairs)


def _refuse_constant(constant: str) -> None:
    raise ValueError(constant)


def strict_json(data: bytes) -> Any:
    """The value of a document. Raises ValueError or RecursionError for what is no JSON, or has a key twice."""
    return json.loads(data.decode(), object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)


def seal(files: Files, *, commits: bool, respecify: bool) -> None:
    """Make manifest, documents, totals and id of the newest version agree with the files and the spec; with `commits`
    also the commit records. With `respecify`, the manifest gets the rows that the spec asks for."""
    if commits:
        for path in [path for path in files if path.startswith("commits/") and not path.endswith("driver.json")]:
            with suppress(*UNSEALABLE):
                _seal_commit(files, path)
    with suppress(*UNSEALABLE):
        data = files["dataset.json"]
        assert isinstance(data, bytes)
        document = json.loads(data)
        if document["schema_version"] == "1.0":
            _seal_1_0(files, data, document)
        else:
            _seal_newest(files, data, document, respecify)


def _seal_commit(files: Files, path: str) -> None:
    data = files[path]
    assert isinstance(data, bytes)
    if path == "commits/spec.json":
        started, dataset = json.loads(data), files["dataset.json"]
        assert isinstance(dataset, bytes)
        files[path] = canonical_json(started | {"spec": json.loads(dataset)["spec"]})
        return
    commit = json.loads(data)
    del commit["sha256"]
    for record in commit["files"]:
        content = files.get(record["path"])
        if isinstance(content, bytes):
            record |= {"sha256": sha256(content), "bytes": len(content)}
    files[path] = canonical_json(commit | {"sha256": sha256(canonical_json(commit))})


def _write_document(files: Files, data: bytes, document: dict[str, Any], replaced: dict[str, str]) -> None:
    """Write dataset.json, and the document of its version. Where it is no plain JSON, only hashes are replaced."""
    try:
        strict_json(data)
        sealed = canonical_json(document)
    except UNSEALABLE:
        sealed = data
        for old, new in replaced.items():
            sealed = sealed.replace(old.encode(), new.encode())
    files["dataset.json"] = sealed
    version = document.get("version")
    if isinstance(version, int) and f"versions/{version:04d}.json" in files:
        files[f"versions/{version:04d}.json"] = sealed


def _manifest_rows(files: Files, path: str) -> list[dict[str, Any]]:
    """The rows of a manifest with the sha256 of the files; the file is written again if they were others."""
    data = files[path]
    assert isinstance(data, bytes)
    table = pq.read_table(io.BytesIO(data), use_threads=False)
    rows: list[dict[str, Any]] = table.to_pylist()
    changed = False
    for row in rows:
        content = files.get(row["path"])
        if isinstance(content, bytes) and row["sha256"] != sha256(content):
            row["sha256"] = sha256(content)
            changed = True
    if changed:
        _write_rows(files, path, rows, table.schema)
    return rows


def _write_rows(files: Files, path: str, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer := io.BytesIO(), compression="zstd")
    files[path] = buffer.getvalue()


def _respecify(files: Files, path: str, rows: list[dict[str, Any]], spec: Spec) -> list[dict[str, Any]]:
    """The rows of a manifest as the spec asks for them, over files that may be others."""
    layout, by_path = LAYOUTS[spec.layout], {row["path"]: row for row in rows}
    if count_expected_files(spec, layout) > MAX_FILES:
        return rows
    expected = []
    for key in expected_keys(spec, layout):
        count, place = spec.rows_of(key.block), layout.file_path(key.column, key.block, key.draw)
        row = by_path.get(place, {"sha256": "0" * 64, "label_counts": []})
        is_z = key.column == "z"
        counts = row["label_counts"] if sum(n for _, n in row["label_counts"]) == count else [(0, count)]
        row |= {"column": key.column, "draw": key.draw, "block": key.block, "rows": count, "path": place}
        row |= {"first_index": key.block * spec.block_rows, "bytes": layout.file_size(spec, key.column, count)}
        row |= {"label_counts": counts if key.column == "x" and spec.has_labels else [], "view": view_of(spec, key)}
        row["squared_error"] = (row.get("squared_error") or 0.0) if is_z else None
        expected.append(row)
    data = files[path]
    assert isinstance(data, bytes)
    _write_rows(files, path, expected, pq.read_schema(io.BytesIO(data)))
    return expected


def _seal_newest(files: Files, data: bytes, document: dict[str, Any], respecify: bool) -> None:
    documents = {name: file for name, file in document["documents"].items() if file is not None}
    rows: list[dict[str, Any]] | None = None
    spec: Spec | None = None
    replaced: dict[str, str] = {}
    with suppress(*UNSEALABLE):
        spec = Spec.model_validate_json(json.dumps(document["spec"]))
    with suppress(*UNSEALABLE):
        rows = _manifest_rows(files, documents["manifest"]["path"])
        if respecify and spec is not None:
            rows = _respecify(files, documents["manifest"]["path"], rows, spec)
            if spec.layout == "zarr":
                files |= LAYOUTS["zarr"].metadata_files(spec)
    for file in documents.values():
        content = files.get(file["path"])
        if isinstance(content, bytes):
            replaced[file["sha256"]] = sha256(content)
            file["sha256"] = sha256(content)
    with suppress(*UNSEALABLE):
        names = files[documents["names"]["path"]]
        assert isinstance(names, bytes)
        hashed = hash_rows(pq.read_table(io.BytesIO(names), use_threads=False))
        replaced[documents["names"]["rows_sha256"]] = hashed
        documents["names"]["rows_sha256"] = hashed
    with suppress(*UNSEALABLE):
        assert spec is not None
        document["records"] = LAYOUTS[spec.layout].describe_records(spec)
    with suppress(*UNSEALABLE):
        assert spec is not None and rows is not None
        records = [FileRecord.model_validate({field: row[field] for field in FileRecord.model_fields}) for row in rows]
        counts = [dict(row["label_counts"]) for row in rows[: spec.num_blocks]]
        document["totals"] = sum_totals(spec, records, counts).model_dump(mode="json")
    with suppress(*UNSEALABLE):
        assert rows is not None
        derived = {
            name: documents[name]["sha256"] for name in ("sigma_f", "z_sums", "z_class_sums") if name in documents
        }
        derived |= {"names": documents["names"]["rows_sha256"]} if "names" in documents else {}
        content_of_id = {  # as docs/store.md computes it: also of a spec that is none
            "spec": document["spec"] if spec is None else spec.model_dump(mode="json"),
            "files": [[row[k] for k in ("column", "draw", "block", "sha256", "squared_error")] for row in rows],
            "label_counts": [sorted(row["label_counts"]) for row in rows if row["column"] == "x"],
            "derived": derived,
        }
        text = json.dumps(content_of_id, sort_keys=True, separators=(",", ":"))
        new_id = new_sha256(text.encode()).hexdigest()
        replaced[document["id"]] = new_id
        document["id"] = new_id
    _write_document(files, data, document, replaced)


def _seal_1_0(files: Files, data: bytes, document: dict[str, Any]) -> None:
    replaced: dict[str, str] = {}
    with suppress(*UNSEALABLE):
        rows = _manifest_rows(files, "manifest.parquet")
        new_id = new_sha256(canonical_json(document["spec"]))
        new_id.update("".join(row["sha256"] for row in rows).encode())
        replaced[document["id"]] = new_id.hexdigest()
        document["id"] = new_id.hexdigest()
        document["totals"]["files"], document["totals"]["bytes"] = len(rows), sum(row["bytes"] for row in rows)
    for key, path in (("manifest_sha256", "manifest.parquet"), ("sigma_f_sha256", "sigma_f.npy")):
        content = files.get(path)
        if isinstance(content, bytes) and document.get(key):
            replaced[document[key]] = sha256(content)
            document[key] = sha256(content)
    with suppress(*UNSEALABLE):
        spec = document["spec"] | {"x": {"dtype": "uint8"}, "views": ["plain"], "names": False}
        if spec["coupling"] is not None:
            spec["coupling"] = spec["coupling"] | {"kind": "nfm"}
        parsed = Spec.model_validate_json(json.dumps(spec))
        document["records"] = LAYOUTS_1_0[parsed.layout].describe_records(parsed)
    _write_document(files, data, document, replaced)
