"""Files under one root, on any fsspec file system, written so that a crash leaves either nothing or all of a file."""

import hashlib
import os
import posixpath
import random
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from storage_specs.errors import StoreError

T = TypeVar("T")

RETRY_SECONDS = 300.0  # how long a server may be away before a run gives up
_LONGEST_PAUSE = 10.0
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
# Errors of the libraries under fsspec that are no OSError; a library that was not imported cannot have raised one.
_TRANSIENT = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "HTTPClientError"),
    ("botocore.exceptions", "ConnectionError"),
    ("gcsfs.retry", "HttpError"),
)
_REFUSED = (("botocore.exceptions", "BotoCoreError"), ("google.auth.exceptions", "GoogleAuthError"))


def sha256(data: bytes | NDArray[np.uint8]) -> str:
    return hashlib.sha256(data if isinstance(data, bytes) else data.data).hexdigest()


def checked_relative(path: str) -> str:
    """`path` if it stays inside its root, else StoreError: paths in a manifest are another team's input."""
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise StoreError(f"got path {path!r} in a store; expected a plain relative path inside the store")
    return path


def _loaded(names: tuple[tuple[str, str], ...]) -> tuple[type[Exception], ...]:
    return tuple(getattr(sys.modules[module], name) for module, name in names if module in sys.modules)


def _transient() -> tuple[type[Exception], ...]:
    return (OSError, *_loaded(_TRANSIENT))


def _refused() -> tuple[type[Exception], ...]:
    return _loaded(_REFUSED)


class Root:
    """One directory, local or remote, and the files in it by relative path.

    `options` are those of the fsspec file system (`endpoint_url`, `profile`, `anon`, …). What fails for a moment on a
    remote one is tried again for RETRY_SECONDS, then raises StoreError.
    """

    def __init__(self, url: str, options: dict[str, Any] | None = None) -> None:
        self.url = url.rstrip("/") or "/"
        try:
            self.fs, self.path = fsspec.core.url_to_fs(self.url, **(options or {}))
        except (ValueError, ImportError, TypeError) as error:
            raise StoreError(f"cannot open {url!r}: {error}") from error
        self.local = isinstance(self.fs, LocalFileSystem)

    def full(self, path: str) -> str:
        return posixpath.join(self.path, checked_relative(path))

    def _trying(self, path: str, action: Callable[[], T]) -> T:
        """`action()`, again and again with growing pauses while a remote file system is in trouble."""
        if self.local:
            return action()
        deadline, pause = time.monotonic() + RETRY_SECONDS, 0.1
        while True:
            try:
                return action()
            except _FINAL:
                raise
            except _transient() as error:
                if time.monotonic() + pause > deadline:
                    raise StoreError(
                        f"{self.url}/{path}: {error or type(error).__name__}; tried for {RETRY_SECONDS:.0f} s. "
                        "The same command continues once the storage answers"
                    ) from error
                time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  (spreads clients, hides nothing)
                pause = min(2 * pause, _LONGEST_PAUSE)
            except _refused() as error:
                raise StoreError(
                    f"{self.url}: {error}; expected credentials in the environment or a profile, or storage options "
                    "such as anon=true"
                ) from error

    def exists(self, path: str) -> bool:
        self.fs.invalidate_cache()
        return bool(self._trying(path, lambda: self.fs.exists(self.full(path))))

    def names(self, folder: str) -> list[str]:
        """Sorted file names directly in `folder`; empty if there is none."""
        self.fs.invalidate_cache()
        try:
            entries = self._trying(folder, lambda: self.fs.ls(self.full(folder), detail=False))
        except FileNotFoundError:
            return []
        return sorted(posixpath.basename(entry) for entry in entries)

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below the root, by relative path."""
        self.fs.invalidate_cache()
        found = self._trying("", lambda: self.fs.find(self.path, detail=True))
        start = len(self.fs._strip_protocol(self.path).rstrip("/")) + 1
        return {name[start:]: int(entry["size"]) for name, entry in found.items()}

    def size(self, path: str) -> int | None:
        """Bytes of a file, None if there is no such file."""
        self.fs.invalidate_cache()
        try:
            return int(self._trying(path, lambda: self.fs.size(self.full(path))))
        except FileNotFoundError:
            return None

    def read(self, path: str, limit: int) -> bytes:
        """The whole of a file of at most `limit` bytes."""
        size = self.size(path)
        if size is None:
            raise StoreError(f"{self.url}/{path} is missing; the store is incomplete or the URL is wrong")
        if size > limit:
            raise StoreError(f"{self.url}/{path}: got {size} bytes, expected at most {limit}; this is no file of ours")
        return self.read_range(path, None, None)

    def read_range(self, path: str, start: int | None, end: int | None) -> bytes:
        """Bytes start … end of a file."""
        try:
            data = self._trying(path, lambda: self.fs.cat_file(self.full(path), start=start, end=end))
        except FileNotFoundError as error:
            raise StoreError(f"{self.url}/{path} is missing; the store is incomplete or the URL is wrong") from error
        except IsADirectoryError as error:
            raise StoreError(
                f"{self.url}/{path}: got a folder, expected a file (a model is <folder>/model.safetensors)"
            ) from error
        assert isinstance(data, bytes)
        return data

    def write(self, path: str, data: bytes) -> None:
        """Durable and atomic: a reader sees the old file or the new one, also after a crash."""
        full = self.full(path)
        if not self.local:
            self._trying(path, lambda: self.fs.makedirs(posixpath.dirname(full), exist_ok=True))
            # One PUT, or a multipart upload that completes or does not.
            self._trying(path, lambda: self.fs.pipe_file(full, data))
            return
        Path(full).parent.mkdir(parents=True, exist_ok=True)
        temporary = f"{full}.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, full)
        finally:
            Path(temporary).unlink(missing_ok=True)
        directory = os.open(posixpath.dirname(full), os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def delete(self, path: str) -> None:
        self._trying(path, lambda: self.fs.rm_file(self.full(path)))


def mapped(path: str | Path) -> NDArray[np.uint8]:
    """A local file as a read-only byte array that the page cache backs. Raises OSError."""
    if os.stat(path).st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype=np.uint8)
    return np.memmap(path, dtype=np.uint8, mode="r")


def configure(options: dict[str, dict[str, Any]]) -> None:
    """Options of fsspec file systems by protocol (`s3`, `gs`, `http`, …), for every Root of this process."""
    for protocol, values in options.items():
        fsspec.config.conf[protocol] = {**fsspec.config.conf.get(protocol, {}), **values}
