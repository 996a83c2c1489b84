"""HTTP answers that are never longer than what was asked for, whatever the server sends."""

import re
from functools import cache
from typing import Any

from nfm.storage_specs.storage.errors import StoreError

MAX_LISTING_BYTES = 1 << 23  # of an answer to a request that asks for no range, such as the listing of a folder


async def open_session(**options: Any) -> Any:
    """The aiohttp session that fsspec's HTTP file system asks its `get_client` for."""
    import aiohttp

    headers = {"Accept-Encoding": "identity"} | dict(options.pop("headers", None) or {})
    # Not decompressed: a few bytes would become any number of them.
    options |= {"auto_decompress": False, "response_class": _bounded_response_class(), "headers": headers}
    return aiohttp.ClientSession(**options)


@cache
def _bounded_response_class() -> type[Any]:
    """The class is made here, as importing aiohttp takes time that only HTTP is worth."""
    import aiohttp

    class BoundedResponse(aiohttp.ClientResponse):
        """An answer whose body is at most as long as the range that was asked for.

        `read` raises StoreError at a longer one, and at one that the server compressed.
        """

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
