"""Servers that send more than was asked for, pages that take long to read, and redirects to other servers."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from fsspec.implementations import http

from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import Root

Answer = Callable[[BaseHTTPRequestHandler], None]
SECRETS = {"PRIVATE-TOKEN": "of-the-user", "Authorization": "Bearer of-the-user"}


@contextmanager
def serve(answer: Answer) -> Iterator[int]:
    """The port of a server that answers every request like this."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self)

        do_HEAD = do_GET  # noqa: N815  (so `http.server` wants it)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body)


PAGES = {
    "apache": '<tr><td><a href="v1.json">v1</a></td></tr>\n<A class="x"\n HREF=\'/store/v2.json\'>v2</A>',
    "python": '<li><a href="000000.tar">000000.tar</a></li>\n<li><a href="deep/">deep/</a></li>',
    "others": '<a href="../">up</a> <a name=href></a> <a  id="1" href="{url}/a?b=c">a</a> <abbr href="no"> {url}/plain',
    "broken": '<a href="one"<a name="two"> <a href=""> <a href="three"',
}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_a_listing_is_the_one_of_fsspec(page: str) -> None:
    with serve(lambda handler: send(handler, text.encode(), Content_Type="text/html")) as port:
        text = page.replace("{url}", f"http://127.0.0.1:{port}/store")
        theirs = http.HTTPFileSystem(skip_instance_cache=True).ls(f"http://127.0.0.1:{port}/store", detail=False)
        names = {name.rstrip("/").rpartition("/")[2] for name in theirs}
        assert set(Root(f"http://127.0.0.1:{port}/store").list_names("")) == names != set()


@pytest.mark.parametrize(
    "page", ["<a" + " " * (1 << 20), "<a " * (1 << 20), "<a href=" * (1 << 18), "http:/" * (1 << 18)]
)
def test_a_page_takes_no_longer_than_its_length(page: str) -> None:
    """That of fsspec takes hours for the first one."""
    with serve(lambda handler: send(handler, page.encode(), Content_Type="text/html; charset=punycode")) as port:
        started_at = time.monotonic()
        assert Root(f"http://127.0.0.1:{port}").list_names("versions") == []
        assert time.monotonic() - started_at < 10


@pytest.mark.parametrize(
    "options",
    [
        {"headers": SECRETS},
        {"client_kwargs": {"headers": SECRETS}},
        {"client_kwargs": {"headers": {"private-token": "of-the-user"}, "cookies": {"session": "of-the-user"}}},
        {"cookies": {"session": "of-the-user"}},
    ],
    ids=["of requests", "of the session", "cookies of the session", "cookies of requests"],
)
def test_no_other_server_is_told_the_headers_of_the_user(options: dict[str, Any]) -> None:
    """Not even where the one that was asked redirects to it; on the same server they stay."""
    seen: dict[str, list[str]] = {}

    def keep(handler: BaseHTTPRequestHandler) -> None:
        seen.setdefault(handler.path, []).append(str(handler.headers))
        send(handler, b"data")

    def redirect(handler: BaseHTTPRequestHandler) -> None:
        seen.setdefault(handler.path, []).append(str(handler.headers))
        if handler.path == "/same":
            send(handler, b"", 302, Location="/here")
        elif handler.path == "/here":
            send(handler, b"data")
        else:
            send(handler, b"", 302, Location=f"http://localhost:{other}/there")

    with serve(keep) as other, serve(redirect) as port:
        root = Root(f"http://127.0.0.1:{port}", options)
        for path in ("same", "other"):
            assert root.read_range(path, 0, 4) == b"data" and root.size(path) == 4
    assert all("of-the-user" in headers for path in ("/same", "/here", "/other") for headers in seen[path])
    assert len(seen["/there"]) >= 2 and not any("of-the-user" in headers for headers in seen["/there"])
    assert "Range: bytes=0-3" in seen["/there"][0]


def test_a_range_of_s3_is_never_longer_than_what_was_asked_for() -> None:
    sent = 0

    def send_endlessly(handler: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        handler.send_response(206)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        try:
            for _ in range(200):
                handler.wfile.write(b"%x\r\n" % (1 << 20) + bytes(1 << 20) + b"\r\n")
                sent += 1
        except OSError:
            pass
        handler.close_connection = True

    with serve(send_endlessly) as port:
        root = Root("s3://bucket/store", {"anon": True, "endpoint_url": f"http://127.0.0.1:{port}"})
        with pytest.raises(StoreError, match="s3://bucket/store/file: got 1001 bytes for a range of 1000"):
            root.read_range("file", 0, 1000)
    assert sent < 100
