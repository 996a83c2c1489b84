"""One change to the files of a folder: of a file's content by its format, of the spec with all that follows from it, or
of what lies at a path."""

import json
from random import Random
from typing import Any

from tests.tools.fuzz_files import OUTSIDE, Entry, Files, HardLink, Link, Sparse, Special
from tests.tools.fuzz_values import (
    TEXTS,
    mutate_bytes,
    mutate_json,
    mutate_npy,
    mutate_parquet,
    mutate_safetensors,
    mutate_shard,
    mutate_tar,
)

BY_SUFFIX = {
    ".json": mutate_json,
    ".parquet": mutate_parquet,
    ".npy": mutate_npy,
    ".tar": mutate_tar,
    ".safetensors": mutate_safetensors,
}
# Names of files that nobody has written: units, versions and tags that are none, in other digits, of a huge store.
STRAY_NAMES = [
    *("commits/000000.k000-99999.json", "commits/9999999999999.k000-002.json", "commits/٠٠٠٠٠٠.k000-002.json"),
    *("commits/000009.k000-002.json", "commits/000000.k000-000.json", "commits/000000.k001-002.json", "commits/x"),
    *(
        "commits/0000000.k000-002.json",
        "versions/9999.json",
        "versions/0000009.json",
        "versions/0000.json",
        "tags/v1.json",
    ),
    *(
        "tags/a\nerror: all good.json",
        "tags/\x1b[31m.json",
        "tags/x.json",
        "versions/0009/manifest.parquet",
        "copy.json",
    ),
    *(
        "x/\udcff\udcfe.tar",
        "\udcff",
        ".hidden",
        "export.json",
        "commits/driver.json",
        "z_scale.npy",
        "dataset.json.tmp",
    ),
    *("x/000999.tar", "z/k999/000000.tar", "columns.zarr/z/c/9/9/0/0/0", "columns.zarr/y/zarr.json", "a/b/c/d/e/f"),
    *("sums/000000.k000-002.npy", "quarantine.json", "~", "dataset.json\n", "-rf", "*", "train/dataset.json"),
]
SPEC_CHANGES: dict[str, list[Any]] = {
    "rows": [1, 2, 6, 8, 9, 12, 100, 10**12, 1 << 40],
    "block_rows": [1, 2, 4, 7, 1 << 20],
    "shape": [[1, 1, 1], [2, 2, 3], [2, 3, 3], [1, 8192, 8192], [1 << 26, 1, 1], [3, 3, 2], [1, 1, 4096]],
    "num_classes": [0, 1, 2, 4, 1_000_000],
    "class_names": [
        ["a", "a", "a"],
        ["a", "b"],
        ["", "", ""],
        TEXTS[3:6],
        TEXTS[6:9],
        TEXTS[12:15],
        ["x" * 70_000] * 3,
    ],
    "views": [["plain"], ["plain", "mirrored"], ["mirrored"], []],
    "names": [True, False],
    "layout": ["webdataset", "zarr", "tuples"],
    "kind": ["samples", "couplings"],
    "draws": [1, 2, 3, 4, 6, 1 << 16],
    "eta": [0.0, -1.0, 1e300, 5e-324],
    "z_dtype": ["float32", "float16", "bfloat16", "int8"],
    "dtype": ["uint8", "float32", "float16", "bfloat16"],
    "stored": [True, False],
    "seed": [0, 1, (1 << 63) - 1],
    "source": ["a" * 64],
    "precision": ["bf16", "tf32"],
    "preprocessing": [{}, {"resize": TEXTS[3]}, {TEXTS[4]: TEXTS[5]}, {"a": 1e300, "b": [1 << 70]}],
    "architecture": [{}, {"name": TEXTS[4]}, {"name": None}, {"name": {"a": 1}}, {TEXTS[3]: 1}],
    "training": [{}, {"images": "many"}, {"images": -1}, {"images": None, "val": 1e400}, {TEXTS[5]: TEXTS[6]}],
    "scale": [0.5, 1e6, 1e-6],
}
PLACE_OPERATIONS = (
    *("delete", "swap", "replace", "rename", "stray", "stray", "sparse", "special", "link", "link", "folder link"),
    "hard link",
)
UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    RecursionError,
)  # what an earlier change left
ATTRIBUTION_FIELDS = ("licence", "citation", "creator", "source_url", "notes")


def mutate_spec(rng: Random, files: Files) -> str | None:
    """Another value of one field of the spec. The manifest and all hashes are to follow."""
    data = files.get("dataset.json")
    if not isinstance(data, bytes):
        return None
    try:
        document = json.loads(data)
        spec = document["spec"]
        coupling = spec.get("coupling") or {}
        holders = [spec, spec.get("x") or {}, coupling, coupling.get("noise") or {}, coupling.get("teacher") or {}]
        fields = [(holder, field) for field in SPEC_CHANGES for holder in holders if field in holder]
        holder, field = rng.choice(fields)
    except UNREADABLE:
        return None
    holder[field] = rng.choice(SPEC_CHANGES[field])
    files["dataset.json"] = json.dumps(document).encode()
    return f"spec {field} = {holder[field]!r:.60}"


def mutate_attribution(rng: Random, files: Files) -> str | None:
    """Another text where nothing is hashed but the document itself."""
    data = files.get("dataset.json")
    if not isinstance(data, bytes):
        return None
    try:
        document = json.loads(data)
        field = rng.choice(ATTRIBUTION_FIELDS)
        document["attribution"][field] = rng.choice(TEXTS)
    except UNREADABLE:
        return None
    files["dataset.json"] = json.dumps(document).encode()
    return f"attribution {field} = {document['attribution'][field]!r:.40}"


def mutate_content(rng: Random, files: Files) -> str:
    """Another content of one file, by its format: documents more often than files of columns."""
    path = _choose_file(rng, files)
    data = files[path]
    assert isinstance(data, bytes)
    mutate = next((mutate for suffix, mutate in BY_SUFFIX.items() if path.endswith(suffix)), mutate_bytes)
    if "/c/" in path:
        mutate = mutate_shard
    if rng.random() < 0.2:
        mutate = mutate_bytes
    try:
        files[path], what = mutate(rng, data)
    except (ValueError, RecursionError):  # an earlier change left no document
        files[path], what = mutate_bytes(rng, data)
    return f"{path}: {what}"


def _choose_file(rng: Random, files: Files) -> str:
    paths = sorted(path for path, entry in files.items() if isinstance(entry, bytes))
    documents = [path for path in paths if path.endswith((".json", ".parquet", ".npy")) and not path.startswith("sums")]
    if "dataset.json" in paths and rng.random() < 0.3:
        return "dataset.json"
    return rng.choice(documents if documents and rng.random() < 0.5 else paths)


def mutate_place(rng: Random, files: Files) -> str:
    """Something else at a path: nothing, a link, a pipe, another file, a huge one; or a file at a place of its own."""
    paths = sorted(files)
    path, other = rng.choice(paths), rng.choice(paths)
    operation = rng.choice(PLACE_OPERATIONS)
    if operation == "delete":
        del files[path]
    elif operation == "swap":
        files[path], files[other] = files[other], files[path]
    elif operation == "replace":
        files[path] = files[other]
    elif operation == "rename":
        new = rng.choice([path.upper(), f"{path}~", path.replace("0", "1", 1), path.replace("/", "_", 1)])
        files[new] = files.pop(path)
        return f"{path} is renamed {new!r}"
    elif operation == "stray":
        path = rng.choice(STRAY_NAMES)
        contents: list[Entry] = [b"", b"{}", b"\x00" * 600, files[other], Special("folder"), Link(f"{OUTSIDE}/secret")]
        files[path] = rng.choice(contents)
        return f"{path!r} is {files[path]!r:.40}"
    elif operation == "sparse":
        files[path] = Sparse(rng.choice([1 << 20, 1 << 30, 1 << 36, 1 << 40]))
    elif operation == "special":
        files[path] = Special(rng.choice(["pipe", "socket", "folder"]))
    elif operation == "hard link":
        files[path] = HardLink(f"{OUTSIDE}/{path}")
    elif operation == "link":
        targets = [
            f"{OUTSIDE}/secret",
            f"{OUTSIDE}/{path}",
            f"{OUTSIDE}/none",
            OUTSIDE,
            "/dev/zero",
            path.split("/")[-1],
        ]
        files[path] = Link(rng.choice([*targets, other]))
    else:
        folders = sorted({path.rsplit("/", depth)[0] for path in paths for depth in (1, 2) if path.count("/") >= depth})
        folders = [path for path in folders if path not in ("train", "val")]  # the roots of stores may be links
        if not folders:
            return mutate_place(rng, files)
        path = rng.choice(folders)
        for name in [name for name in files if name.startswith(f"{path}/")]:
            del files[name]
        files[path] = Link(rng.choice([f"{OUTSIDE}/{path}", OUTSIDE, ".", ".."]))
        return f"{path} is {files[path]!r:.60}"
    return f"{operation} {path}: {files.get(path)!r:.60}" if path in files else f"{operation} {path}"
