"""Stores that other teams damaged or forged: each ends in one StoreError that names the file. None runs code, hangs,
takes memory by its own word, or gives a batch.
"""

import io
import itertools
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from nfm.storage_specs.format.image_names import NAMES_SCHEMA
from nfm.storage_specs.format.layouts import LAYOUTS
from nfm.storage_specs.format.manifest import FILE_SCHEMA
from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.format.webdataset import WebDatasetLayout
from nfm.storage_specs.reading.batches import Batch
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream
from nfm.storage_specs.reading.verify import find_faults
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import sha256
from nfm.storage_specs.storage.npy import npy_bytes, npy_header
from tests.tools.hostile import (
    BOMB,
    BOMB_NPY,
    CARDS,
    DOCUMENTS,
    FOLDER,
    LONG,
    MANIFEST,
    MIB,
    REPLACEMENTS,
    SIGMA_F,
    SUMS,
    VERSION,
    WIDE,
    Bomb,
    Case,
    Reading,
    parquet,
    patch,
    rows_of,
    sealed,
    sound_files,
    spec_of,
    write_case,
)
from tests.tools.stores import LAYOUT_NAMES


def column_files(layout: LayoutName) -> Iterator[Case]:
    """Files of columns cut, missing, replaced, exchanged, with one bit changed, or with values that none may have."""
    rng, files, file_layout = random.Random(layout), sound_files(layout), LAYOUTS[layout]
    spec, tar = spec_of(json.loads(files["dataset.json"])), WebDatasetLayout()
    paths = {(row["column"], row["draw"], row["block"]): row["path"] for row in rows_of(files)}
    for column in (*file_layout.base_columns(spec), *spec.draw_columns):
        path = rng.choice([path for key, path in paths.items() if key[0] == column])
        data, size = files[path], len(files[path])
        reading: Reading = "indifferent" if column == "noise" else "refuse"
        for what, content in {**REPLACEMENTS, "a padded pickle": BOMB.ljust(size, b"\0")}.items():
            yield Case(f"{path} {what}", reading, path, {path: content})
        for length in (1, size - 1, size + 1, size + 512, *rng.choices(range(size), k=2)):
            yield Case(f"{path} of length {length}", reading, path, {path: data[:length].ljust(length, b"\0")})
        fixed = set(range(size - 20, size - 4))  # zarr: the index; webdataset: all headers of the first record
        if layout == "webdataset":
            fixed = set()
            for member in tar.members(spec, column):
                fixed |= set(range(member.start, member.value_start))
        for offset in rng.sample(sorted(fixed), 8) + rng.sample(sorted(set(range(size)) - fixed), 4):
            flipped = patch(data, offset, bytes([data[offset] ^ 1 << offset % 8]))
            yield Case(f"{path} byte {offset}", reading, path, {path: flipped})
    x, z, z1, noise = (paths[key] for key in (("x", -1, 0), ("z", 0, 0), ("z", 1, 0), ("noise", 0, 0)))
    pairs: list[tuple[str, str, Reading]] = [(x, paths["x", -1, 1], "refuse"), (z, paths["z", 0, 1], "refuse")]
    pairs += [(z, z1, "refuse"), (z, noise, "refuse"), (noise, paths["noise", 1, 0], "indifferent")]
    if layout == "zarr":
        pairs += [(paths[column, -1, 0], paths[column, -1, 1], "refuse") for column in ("label", "index")]
    for path, other_path, expected in pairs:
        exchanged = {path: files[other_path], other_path: files[path]}
        yield Case(f"{path} is {other_path}", expected, path, exchanged)
    first, stride = file_layout.row_placement(spec, "z")
    swapped = files[z][first + stride :][:32] + files[z][first + 32 : first + stride] + files[z][first:][:32]
    yield Case("values of two rows exchanged", "refuse", z, {z: patch(files[z], first, swapped)})
    forged: list[tuple[Reading, str, int, bytes]] = []
    for bits in (np.float16(value).tobytes() for value in (math.nan, math.inf, -math.inf)):
        forged += [("refuse", z, first + stride + 6, bits), ("indifferent", noise, first, bits)]
    if layout == "webdataset":
        header, shape, cls = npy_header(np.dtype("<f2"), spec.shape), b"1, 4, 4", tar.members(spec, "x")[1].value_start
        edits = [(b"<f2", b"|O8"), (b"False", b"True "), (b"NUMPY\x01", b"NUMPY\x03"), (b"v\0", b"\xff\xff")]
        edits += [(shape, b"1<<60,9"), (shape, b"9999999"), (shape, b"-1,4, 4"), (shape, b"4, 4, 1")]
        forged += [("refuse", z, 512, header.replace(*edit)) for edit in edits]
        forged += [("refuse", z, 512, BOMB_NPY), ("refuse", z, 0, files[z][stride : 2 * stride] + files[z][:stride])]
        labels = (b"000003", b"999999", b"-00001", b"00000x", b"1e0000", bytes(6), b"     1", "١٢٣".encode())
        forged += [("refuse", x, cls, label) for label in labels]
    else:
        words = [value.to_bytes(8, "little", signed=True) for value in (3, -1, 1 << 62, -1 << 63)]
        forged += [
            ("refuse", path, 8, word) for word in words for path in (paths["label", -1, 1], paths["index", -1, 1])
        ]
    for reading, path, offset, data in forged:
        changes = sealed(layout, {path: patch(files[path], offset, data)})
        yield Case(f"{path} {offset} {sha256(data)[:6]}", reading, path, changes)


def zarrs(layout: LayoutName) -> Iterator[Case]:
    """Metadata of another type, and files of two chunks whose shard index gives them other places."""
    for path, data in sound_files(layout).items() if layout == "zarr" else ():
        for old, new in {b"int": b"uint", b"float16": b"float32", b'"bytes"': b'"pickle"', b"{": b"["}.items():
            if path.endswith("zarr.json") and old in data:
                yield Case(f"{path} {new!r}", "indifferent", path, {path: data.replace(old, new)})
    path = "columns.zarr/z/c/0/1/0/0/0"
    size = len(sound_files("zarr", 128)[path])
    half, far = (size - 36) // 2, (1 << 64) - 1
    places = [(0, half, 0, half), (half, half, 0, half), (0, half, half - 1, half), (0, half, size, half), (0,) * 4]
    places += [(0, half, 1 << 60, half), (0, half, half, 1 << 60), (far,) * 4, (0, half, half, far)]
    for place in places if layout == "zarr" else ():
        data = patch(sound_files("zarr", 128)[path], size - 36, np.array(place, "<u8").tobytes())
        yield Case(f"chunks {place}", "refuse", path, sealed("zarr", {path: data}, 128), side=128)


def arrays(layout: LayoutName) -> Iterator[Case]:
    """σ_f that no data has, or that is none, and sums over z that are none, with hashes that agree."""
    ones, values = np.ones((1, 4, 4), "<f4"), (0, -1, math.nan, math.inf, 1e-45)
    arrays = {f"{value}": np.where(np.eye(4) > 0, np.float32(value), ones) for value in values}
    arrays |= {kind: ones.astype(kind) for kind in ("f8", ">f4", "i4")}
    arrays |= {f"{shape}": np.ones(shape, "<f4") for shape in ((16,), (1, 4, 8), (), (0,))}
    forged = {what: npy_bytes(array) for what, array in arrays.items()} | {"pickle": BOMB, "npy of pickle": BOMB_NPY}
    forged |= {
        "cut": npy_bytes(ones)[:-4],
        "long": npy_bytes(ones) + b"\0",
        "fortran": npy_bytes(ones).replace(b"False", b"True "),
    }
    forged |= {"empty": b"", "huge": npy_bytes(ones).replace(b"(1, 4, 4), }", b"(99999999,)}")}
    for what, data in forged.items():
        yield Case(f"sigma_f {what}", "refuse", SIGMA_F, sealed(layout, {SIGMA_F: data}))
        for name in SUMS:
            yield Case(f"{name} {what}", "indifferent", name, sealed(layout, {name: data}))
    for name, value in itertools.product(SUMS, (math.nan, math.inf, -1e300, 0.0)):
        data = sound_files(layout)[name][:-8] + np.float64(value).tobytes()
        yield Case(f"{name} {value}", "indifferent", name, sealed(layout, {name: data}))


WRONG: list[Any] = [None, True, -1, 0, 7, 1 << 63, 10**30, 0.5, math.nan, math.inf]
WRONG += ["", "x", "../x", "9" * 40, [], {}, [[]]]
# What neither id nor σ_f depends on: any value of its type is read, and `find_faults` compares it with other documents.
FREE = re.compile("attribution|documents.(readme|croissant).sha256|documents.z_(class_)?sums.path")


def places(value: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every place in a JSON document: its dotted path, the object or list that holds it, and its key or index there."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    for key in keys:
        yield f"{prefix}{key}", value, key
        yield from places(value[key], f"{prefix}{key}.")


def documents(layout: LayoutName) -> Iterator[Case]:
    """The documents replaced, and dataset.json with every value that it must not have."""
    for name, (what, content) in itertools.product(DOCUMENTS, REPLACEMENTS.items()):
        yield Case(f"{name} {what}", "refuse", name, {name: content})
    others = (f"{VERSION}.json", f"{VERSION}/names.parquet", *SUMS, *CARDS)
    for name, (what, content) in itertools.product(others, REPLACEMENTS.items()):
        blamed = name if what != "a folder" or "/" in name else f"{name}|{VERSION}"
        yield Case(f"{name} {what}", "indifferent", blamed, {name: content})
    for tag in ({"version": 1, "id": "0" * 64}, {"version": 2, "id": "0" * 64}, {"version": "../1"}, {}):
        yield Case(f"tag {tag}", "indifferent", r"tags/t\.json", {"tags/t.json": json.dumps(tag).encode()})
    rng, name, good = random.Random(layout), "dataset.json", sound_files(layout)["dataset.json"]
    document = json.loads(good)
    for path, holder, key in places(document):
        reading: Reading = "indifferent" if FREE.match(path) else "refuse"
        intact = holder[key]
        for wrong in rng.sample([wrong for wrong in WRONG if wrong != intact], 1 if path.startswith("records") else 2):
            holder[key] = wrong
            data = json.dumps(document).encode()
            yield Case(f"{path} = {wrong!r:.20}", reading, "|".join((*DOCUMENTS, f"{VERSION}.json")), {name: data})
        holder[key] = intact
    for version in ("2.0", "0.9", "1.2", "1.0", "", "one", "1e0", "-1.0", "1" * 5000, "nan"):
        data = json.dumps(document | {"schema_version": version}).encode()
        yield Case(f"version {version:.9}", "refuse", name, {name: data})
    texts = [b"[" * 190 + b"]" * 190, b"[" * 9999 + b"]" * 9999, b"Infinity", b"-NaN", b"1e999", b"1" * 9999]
    for text, old in itertools.product((*texts, b'"\\ud800"', b'"\\u0000"', b'"\xff"'), (b'"none"', b"0.1")):
        yield Case(f"{old!r} is {text[:9]!r} {len(text)}", "refuse", name, {name: good.replace(old, text)})
    texts = [b"[" * 100_000, b'{"a":' * 100_000, b"null", good[:-9], good * 2, good + b"\0", b"\xef\xbb\xbf" + good]
    for text in (*texts, good.decode().encode("utf-16"), good.replace(b'"eta"', b'"ate"'), b"\xff" * 99):
        yield Case(f"{name} is {text[:9]!r} {len(text)}", "refuse", name, {name: text})


def specs(layout: LayoutName) -> Iterator[Case]:
    """Another spec, with records, manifest and hashes that agree with it, over files that do not."""
    changes: list[dict[str, Any]] = [{"shape": shape} for shape in ([1, 2, 8], [2, 4, 4], [1, 1, 1])] + [WIDE]
    changes += [{"block_rows": rows} for rows in (1, 16, MIB)] + [{"rows": 71}, {"rows": 400}, {"draws": 3}]
    changes += [{"draws": 40}, {"z_dtype": "float32"}, {"num_classes": 2, "class_names": ["a", "b"]}]
    changes += [{"dtype": "float32"}, {"layout": "zarr" if layout == "webdataset" else "webdataset"}]
    for change in changes:
        reading: Reading = "indifferent" if "dtype" in change else "refuse"
        yield Case(f"{change}", reading, "(x|z|noise|label|index)/|sigma_f", sealed(layout, {}, **change))


def manifests(layout: LayoutName) -> Iterator[Case]:
    """manifest.parquet with hashes that agree with it."""
    name, good, intact = MANIFEST, rows_of(sound_files(layout)), sound_files(layout)[MANIFEST]
    path, table, int32_min = good[0]["path"], pa.Table.from_pylist(good, FILE_SCHEMA), -1 << 31
    outside = ["../outside", "/etc/passwd", f"{path}\0", path.replace("/", "\\"), f"link{path[1:]}", f"./{path}", "~"]
    outside += ["", f"x/../{path}", path.replace("/", "//"), f"file:///{path}", "x" * MIB, good[1]["path"]]
    values: dict[str, Any] = {"path": outside, "column": ["z", "../x"], "draw": [0, int32_min], "rows": [15, -1]}
    values |= {"block": [1, int32_min], "first_index": [1, int32_min], "bytes": [0, -1, MIB**3 - 1]}
    values |= {"sha256": ["A" * 64, "../x", "a" * 9999, "b" * 64], "squared_error": [0.0, -1.0, math.nan, math.inf]}
    values |= {"label_counts": [[], [(0, -1)], [(99, 16)], [(0, 1), (0, 16)], [(0, 32)]], "view": ["mirrored", ""]}
    pairs = [(name, value) for name, wrong in values.items() for value in (None, *wrong)]
    pairs.remove(("squared_error", None))  # which files of x have not
    for field, value in pairs:
        reading: Reading = "indifferent" if field == "label_counts" else "refuse"
        reading = "refuse" if value == "b" * 64 else reading
        changes = sealed(layout, {name: parquet([good[0] | {field: value}, *good[1:]])})
        yield Case(f"{field} = {value!r:.20}", reading, f"{path}|manifest|dataset", changes)
    lists = {"none": [], "twice": [*good, good[0]], "one for another": [*good[:-1], good[0]], "one short": good[:-1]}
    lists |= {"reversed": good[::-1], "exchanged": [good[1], good[0], *good[2:]]}
    raw = {f"rows {what}": parquet(rows) for what, rows in lists.items()}
    text = pa.array([b"\xff\xfe"] * len(good)).view(pa.string())
    kinds = {"draw": pa.int64(), "block": pa.string(), "path": pa.binary(), "bytes": pa.float64()}
    columns = [(f"{field} as {kind}", field, table[field].cast(kind)) for field, kind in kinds.items()]
    columns += [(f"{field} no utf-8", field, text) for field in ("column", "path", "sha256")]
    for what, field, column in columns:
        raw[what] = parquet(table.set_column(FILE_SCHEMA.get_field_index(field), field, column))
    raw |= {f"no {field}": parquet(table.drop_columns([field])) for field in FILE_SCHEMA.names}
    raw |= {"extra column": parquet(table.append_column("extra", table["path"])), "cut": intact[:-1], "magic": b"PAR1"}
    raw |= {"name no utf-8": intact.replace(b"squared_e", b"squared_\xff"), "headless": intact[4:], "zeros": bytes(99)}
    raw |= {"footer": intact[:-8] + b"\xff\xff\xff\x7fPAR1", "json": sound_files(layout)["dataset.json"]}
    for what, data in raw.items():
        yield Case(f"{name} {what}", "refuse", name, sealed(layout, {name: data}))
    yield Case(f"{name} changed", "refuse", name, {name: patch(intact, 40, b"?")})


def image_names(layout: LayoutName) -> Iterator[Case]:
    """names.parquet with hashes that agree with it."""
    name = f"{VERSION}/names.parquet"
    good = pq.read_table(io.BytesIO(sound_files(layout)[name])).to_pylist()
    values: dict[str, Any] = {"index": [1, -1, None], "name": ["", "x" * 1025, None], "sha256": ["x", "C" * 64, None]}
    lists = {
        f"{field} = {value!r:.20}": [good[0] | {field: value}, *good[1:]] for field in values for value in values[field]
    }
    lists |= {"none": [], "one short": good[:-1], "reversed": good[::-1], "twice": [*good, good[0]]}
    tables = {what: pa.Table.from_pylist(rows, NAMES_SCHEMA) for what, rows in lists.items()}
    sound = pa.Table.from_pylist(good, NAMES_SCHEMA)
    tables |= {f"no {field}": sound.drop_columns([field]) for field in NAMES_SCHEMA.names}
    tables |= {"index as int32": sound.set_column(0, "index", sound["index"].cast(pa.int32()))}
    tables |= {"no utf-8": sound.set_column(1, "name", pa.array([b"\xff"] * len(good)).view(pa.string()))}
    for what, table in tables.items():
        yield Case(f"{name} {what}", "indifferent", name, sealed(layout, {name: parquet(table)}))


CASE_GENERATORS = (column_files, zarrs, arrays, documents, specs, manifests, image_names)
CASES = [
    case._replace(layout=layout) for layout in LAYOUT_NAMES for generate in CASE_GENERATORS for case in generate(layout)
]


def batch_of(url: str) -> Batch:
    """Two epochs with their two draws: every file that a stream reads."""
    with closing(CouplingStream(url, 140, seed=0)) as stream:
        return next(stream)


def faults_of(url: str) -> None:
    faults = [fault.message for fault in find_faults(Store(url))]
    if faults:
        raise StoreError("; ".join(faults))


@cache
def sound_batch(layout: LayoutName, side: int) -> dict[str, torch.Tensor]:
    faults_of(f"{FOLDER.name}/{layout}{side}")
    return vars(batch_of(f"{FOLDER.name}/{layout}{side}"))


def check(case: Case, url: str, read: Callable[[str], Batch | None], must_refuse: bool) -> None:
    try:
        batch = read(url)
    except StoreError as error:
        message = str(error)
    else:
        expected = sound_batch(case.layout, case.side) if case.reading == "indifferent" else {}
        assert not must_refuse and all(torch.equal(getattr(batch, name), value) for name, value in expected.items())
        return
    assert re.search(f"{re.escape(url)}.*({case.blamed_files})", message, re.DOTALL), message


# `make test` takes every tenth, which is one at least of each kind and layout.
SWEEP = [pytest.param(case, marks=() if i % 10 == 0 else pytest.mark.long) for i, case in enumerate(CASES)]


@pytest.mark.parametrize("case", SWEEP, ids=lambda case: f"{case.layout} {case.name}".encode("unicode_escape").decode())
def test_every_reader_refuses(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)  # of the cache, which takes most of the time
    files, root = sound_files(case.layout, case.side) | case.changes, f"{tmp_path}/store"
    write_case(case, Path(root))
    check(case, root, batch_of, must_refuse=case.reading == "refuse")
    check(case, root, faults_of, must_refuse=True)
    if case.reading != "indifferent" and not any(map(callable, files.values())):
        monkeypatch.setattr(MemoryFileSystem, "store", {})
        MemoryFileSystem().pipe({f"/hostile/{path}": data for path, data in files.items() if data is not None})
        check(case, "memory://hostile", batch_of, must_refuse=True)
    assert not Bomb.marker.exists()


def test_there_are_many_cases_and_their_pickles_are_live() -> None:
    assert len(CASES) >= 200
    np.load(io.BytesIO(BOMB_NPY), allow_pickle=True)
    Bomb.marker.rmdir()


def resource_cases() -> Iterator[Case]:
    """What takes memory or time without end, if a reader believes it."""
    table = pa.Table.from_pylist(rows_of(sound_files("zarr")), FILE_SCHEMA)
    text = pa.DictionaryArray.from_arrays(pa.array([0] * len(table), pa.int32()), pa.array(["x" * (64 * MIB)]))
    table = table.set_column(FILE_SCHEMA.get_field_index("path"), "path", text)
    short = parquet(table, store_schema=False, dictionary_pagesize_limit=1 << 30)
    yield Case("long text", "refuse", "manifest", sealed("zarr", {MANIFEST: short}))
    for name, spec in {"wide": WIDE, "many": LONG, "wide and many": WIDE | LONG}.items():
        yield Case(name, "refuse", "/", sealed("zarr", {}, **spec))
    for name in (
        *DOCUMENTS,
        *(f"columns.zarr/{path}" for path in ("x/c/0/0/0/0", "z/c/1/1/0/0/0", "label/c/1", "index/c/2")),
    ):
        yield Case(f"sparse {name}", "refuse", name, {name: 900 * MIB if name in DOCUMENTS[1:] else MIB * MIB})
        yield Case(f"endless {name}", "refuse", name, {name: lambda to: to.symlink_to("/dev/zero")})
    for name in ("dataset.json", "columns.zarr/x/c/0/0/0/0", "columns.zarr/label/c/1"):
        yield Case(f"pipe {name}", "refuse", name, {name: os.mkfifo})


def largest_size() -> int:
    """What this process had in memory at most, in MiB, since it was asked to forget."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10


def probe(urls: list[str]) -> None:
    """Print how each reader of each store ends, and by how many MiB it made the process grow."""
    resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))  # of which Arrow takes one at once
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for number, (url, read) in enumerate(itertools.product(urls, (batch_of, faults_of))):
        os.environ["NFM_CACHE"] = f"{FOLDER.name}/cache-{number}"
        Path("/proc/self/clear_refs").write_text("5")  # forgets the largest size
        before = largest_size()
        signal.setitimer(signal.ITIMER_REAL, 120, 0.5)  # what hangs may hang again when it is closed
        try:
            end = f"no error but {type(read(url))}"
        except BaseException as error:
            end = f"{type(error).__name__}: {error}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps([url, end[:4000], largest_size() - before]), flush=True)
    FOLDER.cleanup()
    os._exit(0)  # without the threads that hang


@pytest.mark.long
def test_nothing_is_taken_by_the_word_of_a_store(tmp_path: Path) -> None:
    cases = {f"{tmp_path}/{number}": case for number, case in enumerate(resource_cases())}
    for path, case in cases.items():
        write_case(case, Path(path))
    # The sparse ones once more as of a server: what fsspec reads through another file system is not local to us.
    cases |= {f"dir:/{path}::file:///.": case for path, case in cases.items() if case.name.startswith("sparse")}
    urls = sorted(cases, key=lambda url: cases[url].name.startswith("pipe"))  # threads that hang take room
    command = [sys.executable, "-m", "tests.test_hostile", *urls]
    run = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    ends = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(ends) == 2 * len(cases)
    wrong = []
    for url, end, grown in ends:
        if not re.match(f"StoreError.*{re.escape(url)}.*{cases[url].blamed_files}", end) or grown >= 200:
            wrong.append(f"{url[:4]} {cases[url].name}: {end.replace(url, '')[:120]}, {grown} MiB more")
    assert not wrong, "\n".join(wrong)


if __name__ == "__main__":
    probe(sys.argv[1:])
