"""Servers that fail: what another attempt may mend is repeated, and said at once; anything else ends in one line with
the URL."""

import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from nfm.pipeline.cli import main
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage import files, remote
from nfm.storage_specs.storage.errors import OutageError, StorageError, StoreError
from nfm.storage_specs.storage.files import Root
from nfm.storage_specs.storage.lease import Lease
from tests.tools.small_run import Run

AT_ONCE = 10.0  # seconds, on a busy machine; far below RETRY_SECONDS
REQUESTS: dict[str, Callable[[Root], object]] = {
    "exists": lambda root: root.exists("dataset.json"),
    "size": lambda root: root.size("dataset.json"),
    "list": lambda root: root.list_names("commits"),
    "list all": lambda root: root.list_file_sizes(),
    "read": lambda root: root.read_range("dataset.json", 0, 4),
    "write": lambda root: root.write("dataset.json", b"data"),
}


@dataclass
class Server:
    """A web server whose next answers have the statuses `planned`, and all others `status` with an error of S3."""

    port: int = 0
    status: int = 503
    code: str = ""
    planned: deque[int] = field(default_factory=deque)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/store"

    def s3_root(self) -> Root:
        """A folder in a bucket that this server has."""
        options = {"key": "a", "secret": "b", "endpoint_url": f"http://127.0.0.1:{self.port}"}
        return Root("s3://bucket/store", options)


@pytest.fixture
def server() -> Iterator[Server]:
    answers = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # which answers `Expect: 100-continue`

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = f"<Error><Code>{answers.code}</Code><Message>no</Message></Error>".encode()
            self.send_response(answers.planned.popleft() if answers.planned else answers.status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/xml")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET = do_PUT = do_POST = do_DELETE = answer  # noqa: N815  (so `http.server` wants it)

        def log_message(self, *_: object) -> None:
            pass

    yield from serve(answers, Handler)


def serve(server: Server, handler: type[BaseHTTPRequestHandler]) -> Iterator[Server]:
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    server.port = running.server_address[1]
    yield server
    running.shutdown()
    running.server_close()


@pytest.fixture(autouse=True)
def _nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_last_announced", {})


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("status", [403, 501])
def test_what_a_web_server_refuses_ends_at_once_with_the_url(server: Server, request_name: str, status: int) -> None:
    server.status = status
    started_at = time.monotonic()
    with pytest.raises(StorageError, match=rf"{server.url}.*HTTP {status} .*; the server"):
        REQUESTS[request_name](Root(server.url))
    assert time.monotonic() - started_at < AT_ONCE


@pytest.mark.parametrize("request_name", ["exists", "write"])
@pytest.mark.parametrize(("status", "code"), [(400, "ExpiredToken"), (403, "AccessDenied"), (501, "NotImplemented")])
def test_what_s3_refuses_ends_at_once_with_the_url(server: Server, request_name: str, status: int, code: str) -> None:
    server.status, server.code = status, code
    started_at = time.monotonic()
    with pytest.raises(StorageError, match=rf"s3://bucket/store/\S+: HTTP {status} .*; the server") as raised:
        REQUESTS[request_name](server.s3_root())
    assert time.monotonic() - started_at < AT_ONCE
    assert not isinstance(raised.value, OutageError)


@pytest.mark.parametrize("status", [404, 410])
def test_a_missing_file_is_no_failure(server: Server, status: int) -> None:
    server.status = status
    root = Root(server.url)
    assert not root.exists("dataset.json") and root.size("dataset.json") is None and root.list_names("commits") == []
    with pytest.raises(StoreError, match=f"{server.url}/dataset.json is missing"):
        root.read("dataset.json", 10)


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("status", [503])
def test_what_passes_is_repeated(server: Server, request_name: str, status: int) -> None:
    """The server fails four times, as some requests ask twice, and then has no such file, or takes it."""
    server.planned.extend([status] * 4)
    server.status = 200 if request_name == "write" else 404
    with suppress(StoreError):  # a file that is missing cannot be read
        REQUESTS[request_name](Root(server.url))
    assert not server.planned


@pytest.mark.parametrize("request_name", REQUESTS)
def test_a_server_that_is_away_is_no_missing_file(
    request_name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody listens at this port."""
    monkeypatch.setattr(files, "RETRY_SECONDS", 0.5)
    url = "http://127.0.0.1:9/store"
    with pytest.raises(OutageError, match=rf"{url}.* tried for .* s\. The same command continues"):
        REQUESTS[request_name](Root(url))
    said = capsys.readouterr().err
    assert re.fullmatch(rf"{url}.*Cannot connect.*; trying again for up to .* s\n", said), "once, in one line"


@pytest.mark.parametrize("scheme", ["https", "s3"])
def test_a_port_without_tls_ends_at_once(server: Server, scheme: str) -> None:
    endpoint = f"https://127.0.0.1:{server.port}"
    options = {"key": "a", "secret": "b", "endpoint_url": endpoint} if scheme == "s3" else {}
    url = "s3://bucket/store" if scheme == "s3" else f"{endpoint}/store"
    started_at = time.monotonic()
    with pytest.raises(StorageError, match=f"{url}.*; check the URL") as raised:
        Root(url, options).exists("dataset.json")
    assert time.monotonic() - started_at < AT_ONCE
    assert not isinstance(raised.value, OutageError)


def _no_answer(code: int) -> OSError:
    """What aiohttp raises where the name of a host was not resolved."""
    from aiohttp import ClientConnectorDNSError
    from aiohttp.client_reqrep import ConnectionKey

    key = ConnectionKey("nosuch", 443, True, True, None, None, None)
    reason = socket.gaierror(code, "no answer")
    error = ClientConnectorDNSError(key, reason)
    error.__cause__ = reason
    return error


def test_a_host_that_does_not_exist_is_no_outage() -> None:
    assert not remote.is_passing(_no_answer(socket.EAI_NONAME))
    assert remote.is_passing(_no_answer(socket.EAI_AGAIN))
    botocore = pytest.importorskip("botocore.exceptions")
    inside = botocore.EndpointConnectionError(endpoint_url="https://nosuch", error=_no_answer(socket.EAI_NONAME))
    assert not remote.is_passing(inside)
    missing = FileNotFoundError("https://nosuch/a")
    missing.__cause__ = _no_answer(socket.EAI_NONAME)
    assert not remote.is_missing(missing) and not remote.is_passing(missing)


def test_the_file_stands_before_the_query_of_its_url(server: Server) -> None:
    """A signature belongs to the URL, and is hidden."""
    server.status = 403
    with pytest.raises(StorageError, match=rf"^{server.url}/dataset\.json\?X-Amz-Signature=\*\*\*: HTTP 403"):
        Root(f"{server.url}?X-Amz-Signature=0123456789").size("dataset.json")
    server.status = 404
    with pytest.raises(StoreError, match=rf"^{server.url}/dataset\.json\?X-Amz-Signature=\*\*\* is missing"):
        Root(f"{server.url}?X-Amz-Signature=0123456789").read("dataset.json", 10)


def test_what_is_repeated_is_said_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Root(server.url)
    for _ in range(3):
        server.planned.extend([503] * 4)
        server.status = 404
        root.exists("dataset.json")
    assert capsys.readouterr().err.count("HTTP 503 Service Unavailable; trying again for up to 300 s") == 1


def test_a_store_opens_once_its_server_answers(run: Run) -> None:
    """Which another answer than yes or no must not keep it from."""
    failures = deque([503] * 6)

    class Failing(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, directory=run.couplings["webdataset"], **options)

        def send_head(self) -> Any:
            if failures:
                self.send_error(failures.popleft())
                return None
            return super().send_head()

        def log_message(self, *_: object) -> None:
            pass

    for server in serve(Server(), Failing):
        url = server.url.removesuffix("/store")
        assert Store(url).dataset.id == Store(run.couplings["webdataset"]).dataset.id
    assert not failures


def test_a_copy_to_a_plain_web_server_ends_at_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It answers 501 to what would write a file."""

    class Plain(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path), **options)

        def log_message(self, *_: object) -> None:
            pass

    for server in serve(Server(), Plain):
        monkeypatch.setattr("sys.argv", ["nfm", "store", "copy", run.couplings["zarr"], server.url])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert re.search(rf"{server.url}/\S+: HTTP 501 .*the server does not support", capsys.readouterr().err)


def test_a_lease_of_storage_that_takes_nothing_ends_at_once(server: Server) -> None:
    server.status = 403
    server.planned.extend([404] * 2)  # there is no lease yet
    with pytest.raises(StorageError, match=f"{server.url}/driver.json: HTTP 403"), Lease(server.url, "driver.json"):
        pass


@pytest.mark.parametrize(
    "error", [KeyError("x"), EOFError(), NotImplementedError(), RuntimeError("a\nb"), ValueError()]
)
def test_any_error_of_any_file_system_is_one_line_with_the_url(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    root = Root("memory://any/store")
    for name in ("info", "ls", "cat_file", "pipe_file", "find", "size", "rm_file"):
        monkeypatch.setattr(MemoryFileSystem, name, fail)
    for name, request in [*REQUESTS.items(), ("delete", lambda root: root.delete("dataset.json"))]:
        with pytest.raises(StorageError, match="memory://any/store") as raised:
            request(root)
        assert "\n" not in str(raised.value), name


def test_a_damaged_archive_is_one_line_with_the_url(tmp_path: Path) -> None:
    (tmp_path / "damaged.zip").write_bytes(b"PK\x03\x04 and no more")
    for name in ("damaged.zip", "missing.zip"):
        with pytest.raises(StoreError, match=f"cannot open 'zip://store::{tmp_path}/{name}'"):
            Root(f"zip://store::{tmp_path}/{name}")


def test_unknown_options_are_one_line_with_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "http", {"client_kwargs": {"nosuch": 1}})
    with pytest.raises(StoreError, match="http://127.0.0.1:9/store.*nosuch"):
        Root("http://127.0.0.1:9/store").exists("dataset.json")


def test_the_hugging_face_hub_without_a_network_is_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    assert hub
    monkeypatch.setattr(files, "RETRY_SECONDS", 0.5)
    options = {"endpoint": "http://127.0.0.1:9"}
    with pytest.raises(StoreError, match="hf://datasets/lab/couplings"):
        Store("hf://datasets/lab/couplings", options=options)


@pytest.mark.parametrize("path", ["~/folder/store", "~"])
def test_the_home_folder_is_found_behind_an_equals_sign(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--out=~/folder` comes as it is from a shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.absolute_url(path) == path.replace("~", str(tmp_path))
    Root(path).write("file", b"data")
    assert Path(path.replace("~", str(tmp_path)), "file").read_bytes() == b"data"
    assert Root(path).url == path.replace("~", str(tmp_path))
    assert files.absolute_url("s3://bucket/~/a") == "s3://bucket/~/a"
