"""Nothing is read or allocated on the word of a file: hostile files end in one line, soon, in little memory."""

import gzip
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nfm.stages.checkpoint import load, load_any_network
from nfm.stages.sample import SampleRequest, sample
from nfm.storage_specs.format.image_names import NAMES_SCHEMA, parse_names
from nfm.storage_specs.format.manifest import FILE_SCHEMA
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.verify import find_faults
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import sha256
from nfm.storage_specs.writing.transfer import copy_store
from nfm.storage_specs.writing.writer import read_started_spec
from tests.tools import hostile_checkpoints as checkpoints
from tests.tools.hostile import MANIFEST, VERSION, Case, Files, parquet, rows_of, sealed, sound_files, write_case
from tests.tools.memory import GIB, run_watched
from tests.tools.stores import edit, ignore_progress

SECONDS = 10.0


class Hostile(NamedTuple):
    """A hostile file and what reads it. `make` writes it into an empty folder and returns the arguments of `read`,
    a function of a module, which must raise an error that matches `message`."""

    name: str
    make: Callable[[Path], tuple[Any, ...]]
    read: Callable[..., object]
    message: str
    takes_long: bool = False


def open_store(url: str) -> None:
    Store(url)


def verify(url: str) -> None:
    """Open a store, copy it and raise its first fault."""
    store = Store(url)
    for fault in find_faults(store):
        raise StoreError(fault.message)
    copy_store(store, f"{url}-copy", ignore_progress, None)


def sample_100(checkpoint: str, out: str) -> None:
    sample(checkpoint, out, SampleRequest(count=100))


def parse_many_names(path: str, rows: int) -> None:
    parse_names(np.fromfile(path, np.uint8), 0, rows, path)


def changed(changes: Callable[[], Files]) -> Callable[[Path], tuple[str]]:
    """Writes a sound store with changes, which are made when the test runs."""

    def make(folder: Path) -> tuple[str]:
        write_case(Case("", "refuse", "", changes(), "webdataset"), folder / "store")
        return (f"{folder}/store",)

    return make


def nested_json(path: str) -> Callable[[], Files]:
    """60 MB of objects in objects."""
    return lambda: {path: b'{"a":[' * 10_000_000}


def wide_json(path: str) -> Callable[[], Files]:
    """60 MB of small objects, where any value may stand."""

    def change() -> Files:
        document = sound_files("webdataset")[path].rstrip()
        return {path: document[:-1] + b',"more":[' + b'{"a":{}},' * 6_000_000 + b"0]}"}

    return change


def forged_footer(list_length: int) -> bytes:
    """A manifest whose footer begins a list of so many elements of the schema."""
    length = b""
    while list_length >= 128:
        length += bytes([list_length % 128 + 128])
        list_length //= 128
    footer = b"\x15\x02\x19\xfc" + length + bytes([list_length]) + bytes(60_000)
    return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def forged_page() -> bytes:
    """A manifest whose first page says that it becomes 2 GB."""
    data = parquet(rows_of(sound_files("webdataset")))
    start = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0).column(0).dictionary_page_offset
    assert data[start : start + 3] == b"\x15\x04\x15", "the type of the page, then its size"
    size_bytes = next(number for number in range(1, 6) if data[start + 2 + number] < 128)
    rest = data[start + 3 + size_bytes :]
    return data[: start + 3] + b"\xfe\xff\xff\xff\x0f" + rest


def equal_rows(num_blocks: int) -> Files:
    """A manifest of equal rows in a store of so many blocks, which takes some kilobytes."""
    row = rows_of(sound_files("webdataset"))[0]
    table = pa.concat_tables([pa.Table.from_pylist([row] * 1000, FILE_SCHEMA)] * (5 * num_blocks // 1000))
    manifest = parquet(table.combine_chunks())
    changes = {"rows": num_blocks, "block_rows": 1}
    change = edit(documents__manifest__sha256=sha256(manifest), **{f"spec__{name}": n for name, n in changes.items()})
    return {MANIFEST: manifest, "dataset.json": change(sound_files("webdataset")["dataset.json"])}


def long_name(folder: Path) -> tuple[str, int]:
    """A million names of a megabyte each, one text in the file."""
    rows = 1_000_000
    names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["n" * 1_000_000]))
    digests = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["0" * 64]))
    table = pa.table([pa.array(np.arange(rows)), names, digests], names=NAMES_SCHEMA.names)
    pq.write_table(table, folder / "names.parquet", compression="zstd", store_schema=False)
    return f"{folder}/names.parquet", rows


class EndlessHandler(BaseHTTPRequestHandler):
    """Says that every file has 1000 bytes, and sends what never ends, or becomes 4 GB when it is decompressed."""

    protocol_version = "HTTP/1.1"
    bomb = gzip.compress(bytes(1 << 22)) * 1024  # members one after another, as gzip allows

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        is_bomb = self.path.startswith("/bomb")
        if is_bomb:
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(self.bomb)))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        try:
            self.wfile.write(self.bomb if is_bomb else b" ")
            while not is_bomb:
                self.wfile.write(bytes(1 << 20))
        except OSError:
            self.close_connection = True  # the client had enough

    def log_message(self, *_: object) -> None:
        pass


def serve(path: str) -> Callable[[Path], tuple[str]]:
    def make(folder: Path) -> tuple[str]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), EndlessHandler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return (f"http://127.0.0.1:{server.server_address[1]}/{path}",)

    return make


HOSTILE = [
    Hostile("nested JSON", changed(nested_json("dataset.json")), open_store, "dataset.json: .* lists and objects"),
    Hostile("wide JSON", changed(wide_json("dataset.json")), open_store, "dataset.json: .* values", True),
    Hostile("nested spec", changed(nested_json("commits/spec.json")), read_started_spec, "spec.json: .* lists", True),
    Hostile("nested cost", changed(nested_json("cost.json")), verify, "cost.json: .* lists and objects", True),
    Hostile("nested tag", changed(nested_json("tags/a.json")), verify, "tags/a.json: got 60000000 bytes"),
    Hostile("sparse README", changed(lambda: {"README.md": GIB}), verify, "README.md: got 1073741824 bytes"),
    Hostile("sparse card", changed(lambda: {f"{VERSION}/README.md": GIB}), verify, "README.md: got 1073741824 bytes"),
    Hostile("sparse names", changed(lambda: {f"{VERSION}/names.parquet": GIB}), verify, "names.parquet: got 107374182"),
    Hostile("sparse document", changed(lambda: {"dataset.json": 1 << 36}), verify, "dataset.json: got 68719476736 by"),
    Hostile("2^39 rows", changed(lambda: rows_changed(1 << 39)), verify, "expected at most 1048576; larger blocks"),
    Hostile("forged footer", changed(lambda: sealed_manifest(forged_footer(1_000_000))), verify, "not a Parquet file"),
    Hostile("huge footer", changed(lambda: sealed_manifest(forged_footer(1 << 31))), verify, "not a Parquet file"),
    Hostile("forged page", changed(lambda: sealed_manifest(forged_page())), verify, "a dictionary of 2147483647"),
    Hostile("equal rows", changed(lambda: equal_rows(60_000)), verify, "row 0 has rows"),
    Hostile("a long name", long_name, parse_many_names, "got a text of 1000000 bytes|got a dictionary"),
    Hostile("sparse weights", checkpoints.sparse_weights, load_any_network, 'Unexpected key.* "more"'),
    Hostile("a sparse network", checkpoints.sparse_network, load_any_network, "got a file of 2100622\\d{5} bytes"),
    Hostile("a sparse state", checkpoints.sparse_state, load, "got a file of 200000000156 bytes, expected at most"),
    Hostile("a long header", checkpoints.long_header, load, "a header of 60000000 bytes"),
    Hostile("a nested header", checkpoints.nested_header, load, "got more than 3000000 values"),
    Hostile("a nested checkpoint", checkpoints.nested_document, load, "got more than 3000000 values"),
    Hostile("a wide checkpoint", checkpoints.wide_document, load, "got more than 3000000 values", True),
    Hostile("many layers", checkpoints.many_layers, load_any_network, "got 90000 layers; expected at most 512"),
    Hostile("large images", checkpoints.large_images, sample_100, "which needs 6.7 GB, expected at most 1.1 GB"),
    Hostile("an endless body", serve("endless"), open_store, "got more than the 1000 bytes that were asked for"),
    Hostile("a bomb of gzip", serve("bomb"), open_store, "got a body with Content-Encoding 'gzip'"),
]


def rows_changed(rows: int) -> Files:
    document = sound_files("webdataset")["dataset.json"]
    return {"dataset.json": edit(spec__rows=rows, spec__block_rows=1 << 20)(document)}


def sealed_manifest(data: bytes) -> Files:
    return sealed("webdataset", {MANIFEST: data})


def parameter(hostile: Hostile) -> Any:
    return pytest.param(hostile, id=hostile.name, marks=[pytest.mark.long] * hostile.takes_long)


@pytest.mark.parametrize("hostile", [parameter(hostile) for hostile in HOSTILE])
def test_a_hostile_file_is_refused_in_one_line_and_little_memory(hostile: Hostile, tmp_path: Path) -> None:
    outcome = run_watched(hostile.read, *hostile.make(tmp_path), timeout=SECONDS)
    assert outcome.is_value_error, outcome
    assert "\n" not in outcome.message
    with pytest.raises(ValueError, match=hostile.message):
        raise ValueError(outcome.message)


def allocate(num_bytes: int) -> None:
    np.ones(num_bytes, np.uint8)
    raise ValueError("allocated")


def test_the_watch_sees_what_a_process_allocates() -> None:
    assert run_watched(allocate, 100 << 20, timeout=SECONDS).grown_bytes > 90 << 20
    assert run_watched(allocate, 100 << 20, timeout=SECONDS, max_bytes=50 << 20).error == "killed"
