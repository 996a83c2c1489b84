"""HTTP answers that are never longer than what was asked for, whatever the server sends, and requests that tell the
user's secrets to no other server."""

import re
from contextvars import ContextVar
from functools import cache
from typing import Any

from nfm.storage_specs.storage.errors import StoreError

MAX_LISTING_BYTES = 1 << 23  # of an answer to a request that asks for no range, such as the listing of a folder
_PUBLIC_HEADERS = ("Accept", "Accept-Encoding", "Range", "User-Agent")  # which any server may see
_ANCHOR = re.compile(r"<[aA](?=\s)")
_HREF = re.compile(r"""\s(?:href|HREF)=["']([^"']+)""")
_WEB_URL = re.compile(r"https?://[-a-zA-Z0-9@:%_+.~#?&/=]+")

_requested_origin: ContextVar[Any] = ContextVar("_requested_origin")  # scheme, host and port that a caller asked


async def open_session(**options: Any) -> Any:
    """The aiohttp session that fsspec's HTTP file system asks its `get_client` for."""
    import aiohttp

    headers = {"Accept-Encoding": "identity"} | dict(options.pop("headers", None) or {})
    # Not decompressed: a few bytes would become any number of them.
    options |= {"auto_decompress": False, "response_class": _bounded_response_class(), "headers": headers}
    origins = aiohttp.TraceConfig()
    origins.on_request_start.append(_keep_origin)
    options["trace_configs"] = [*(options.get("trace_configs") or ()), origins]
    return aiohttp.ClientSession(request_class=_discreet_request_class(), **options)


async def _keep_origin(_session: Any, _context: Any, request: Any) -> None:
    _requested_origin.set(request.url.origin())


@cache
def _discreet_request_class() -> type[Any]:
    import aiohttp

    class DiscreetRequest(aiohttp.ClientRequest):
        """A request without headers, cookies and password of the user where a server redirects it to another one:
        any of them may be a secret. aiohttp itself leaves out one header, Authorization."""

        def __init__(self, method: str, url: Any, *, headers: Any = None, **options: Any) -> None:
            if url.origin() != _requested_origin.get():
                headers = [(name, value) for name, value in headers.items() if name.title() in _PUBLIC_HEADERS]
                options |= {"cookies": None, "auth": None}
            super().__init__(method, url, headers=headers, **options)

    return DiscreetRequest


def _keep_links(page: str) -> str:
    """The links of an HTML page alone, one a line. fsspec looks for them by a regular expression whose time grows with
    the third power of the white space in a page; ours grows with its length."""
    anchors = (anchor.partition(">")[0] for anchor in _ANCHOR.split(page)[1:])
    links = [match[1] for match in map(_HREF.search, anchors) if match]
    return "\n".join([*(f'<a href="{link}">' for link in links), *_WEB_URL.findall(page)])


@cache
def _bounded_response_class() -> type[Any]:
    """The class is made here, as importing aiohttp takes time that only HTTP is worth."""
    import aiohttp

    class BoundedResponse(aiohttp.ClientResponse):
        """An answer whose body is at most as long as the range that was asked for.

        `read` raises StoreError at a longer one, and at one that the server compressed. `text` is the links of a page.
        """

        async def text(self, encoding: str | None = None, errors: str = "ignore") -> str:  # noqa: ARG002
            # Not in an encoding that the server names: Python has some that take long.
            return _keep_links((await self.read()).decode(errors="ignore"))

        async def read(self) -> bytes:
            if self._body is None:
                self._body = await self._read_bounded()
            return self._body

        async def _read_bounded(self) -> bytes:
            if self.status >= 400:  # the caller raises an error that names the status
                self.close()
                return b""
            encoding = self.headers.get("Content-Encoding", "identity")
            if encoding != "identity":
                self.close()
                raise StoreError(
                    f"{self.url}: got a body with Content-Encoding {encoding[:40]!r}, expected a plain one"
                )
            limit = _max_bytes(self.request_info.headers.get("Range", ""))
            chunks: list[bytes] = []
            received_bytes = 0
            while chunk := await self.content.readany():
                chunks.append(chunk)
                received_bytes += len(chunk)
                if received_bytes > limit:
                    self.close()
                    raise StoreError(
                        f"{self.url}: got more than the {limit} bytes that were asked for; "
                        "the file is not the one of the manifest, or its server does not support range requests"
                    )
            self.release()
            return b"".join(chunks)

    return BoundedResponse


def _max_bytes(range_header: str) -> int:
    """The number of bytes that a Range header asks for."""
    match = re.fullmatch(r"bytes=([0-9]*)-([0-9]*)", range_header)
    if match is None or not match[2]:
        return MAX_LISTING_BYTES
    return int(match[2]) - int(match[1]) + 1 if match[1] else int(match[2])
