"""Files under one root, on any fsspec file system, written so that a crash leaves either nothing or all of a file."""

import errno
import hashlib
import mmap
import os
import posixpath
import random
import re
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from nfm.storage_specs.storage.errors import OutageError, StorageError, StoreError

T = TypeVar("T")

IO_THREADS = 8  # that read or write files of one store at a time
RETRY_SECONDS = 300.0  # how long a server may be away before a run gives up
_LONGEST_PAUSE = 10.0
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp$")
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


def check_relative_path(path: str) -> str:
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
        self.stop_retrying = Event()  # set when nobody waits any more: trying again ends

    def full_path(self, path: str) -> str:
        return posixpath.join(self.path, check_relative_path(path))

    def _retry(self, path: str, action: Callable[[], T]) -> T:
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
                status = getattr(error, "status", None)  # of HTTP
                if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
                    raise StorageError(
                        f"{self.url}/{path}: {error}; expected a server that gives access to it"
                    ) from error
                if time.monotonic() + pause > deadline or self.stop_retrying.is_set():
                    raise OutageError(
                        f"{self.url}/{path}: {error or type(error).__name__}; tried for {RETRY_SECONDS:.0f} s. "
                        "The same command continues once the storage answers"
                    ) from error
                self.stop_retrying.wait(pause * random.uniform(0.5, 1.0))  # noqa: S311  (spreads clients, hides nothing)
                pause = min(2 * pause, _LONGEST_PAUSE)
            except _refused() as error:
                raise StorageError(
                    f"{self.url}: {error}; expected credentials in the environment or a profile, or storage options "
                    "such as anon=true"
                ) from error

    def exists(self, path: str) -> bool:
        self.fs.invalidate_cache()
        return bool(self._retry(path, lambda: self.fs.exists(self.full_path(path))))

    def list_names(self, folder: str) -> list[str]:
        """Sorted file names directly in `folder`; empty if there is none."""
        self.fs.invalidate_cache()
        try:
            entries = self._retry(folder, lambda: self.fs.ls(self.full_path(folder), detail=False))
        except FileNotFoundError:
            return []
        return sorted(posixpath.basename(entry) for entry in entries)

    def list_file_sizes(self) -> dict[str, int]:
        """Bytes of every file below the root, by relative path."""
        self.fs.invalidate_cache()
        found = self._retry("", lambda: self.fs.find(self.path, detail=True))
        start = len(self.fs._strip_protocol(self.path).rstrip("/")) + 1
        return {name[start:]: int(entry["size"]) for name, entry in found.items()}

    def size(self, path: str) -> int | None:
        """Bytes of a file, None if there is no such file."""
        self.fs.invalidate_cache()
        try:
            size = self._retry(path, lambda: self.fs.size(self.full_path(path)))
        except FileNotFoundError:
            return None
        if size is None:
            raise StoreError(f"{self.url}/{path}: got no size from the server, expected one that says it")
        return int(size)

    def read(self, path: str, limit: int) -> bytes:
        """The whole of a file of at most `limit` bytes."""
        if self.local:
            return self._read_local(path, limit)
        size = self.size(path)
        if size is None:
            raise StoreError(f"{self.url}/{path} is missing; the store is incomplete or the URL is wrong")
        if size > limit:
            raise StoreError(f"{self.url}/{path}: got {size} bytes, expected at most {limit}; this is no file of ours")
        return self.read_range(path, 0, size) if size else b""

    def _read_local(self, path: str, limit: int) -> bytes:
        name = f"{self.url}/{path}"
        try:
            with (
                open_regular_file(self.full_path(path)) as (descriptor, size),
                os.fdopen(descriptor, "rb", closefd=False) as file,
            ):
                if size > limit:
                    raise StoreError(f"{name}: got {size} bytes, expected at most {limit}; this is no file of ours")
                return file.read(size)
        except FileNotFoundError as error:
            raise StoreError(f"{name} is missing; the store is incomplete or the URL is wrong") from error
        except OSError as error:
            raise StoreError(
                f"{name}: {error.strerror}; expected a file (a model is <folder>/model.safetensors)"
            ) from error

    def read_range(self, path: str, start: int | None, end: int | None) -> bytes:
        """Bytes start … end of a file."""
        try:
            data = self._retry(path, lambda: self.fs.cat_file(self.full_path(path), start=start, end=end))
        except FileNotFoundError as error:
            raise StoreError(f"{self.url}/{path} is missing; the store is incomplete or the URL is wrong") from error
        assert isinstance(data, bytes)
        return data

    def write(self, path: str, data: bytes) -> None:
        """Durable and atomic: a reader sees the old file or the new one, also after a crash."""
        full = self.full_path(path)
        if not self.local:
            if not any(name in self.fs.protocol for name in ("s3", "gs")):  # which have no folders, only buckets
                self._retry(path, lambda: self.fs.makedirs(posixpath.dirname(full), exist_ok=True))
            # One PUT, or a multipart upload that completes or does not.
            self._retry(path, lambda: self.fs.pipe_file(full, data))
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

    def delete_temporary_files(self, keep: str) -> None:
        """Delete the temporary files of writers that were killed, but for those of the file `keep`, which lives. Object
        stores show none."""
        if self.local:
            for path in Path(self.path).rglob("*.tmp"):
                if _TEMPORARY.search(path.name) and not str(path).startswith(self.full_path(keep)):
                    path.unlink(missing_ok=True)

    def delete(self, path: str) -> None:
        self._retry(path, lambda: self.fs.rm_file(self.full_path(path)))


@contextmanager
def open_regular_file(path: str | Path) -> Iterator[tuple[int, int]]:
    """Descriptor and size of a local file. Raises OSError, also for what is no regular file: of other teams' stores,
    a pipe would hang and a device never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def map_file(path: str | Path) -> NDArray[np.uint8]:
    """A local file as a read-only byte array that the page cache backs. Raises OSError."""
    with open_regular_file(path) as (descriptor, size):
        if size == 0:  # which cannot be mapped
            return np.empty(0, dtype=np.uint8)
        return np.frombuffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ), np.uint8)


def set_file_system_options(options: dict[str, dict[str, Any]]) -> None:
    """Options of fsspec file systems by protocol (`s3`, `gs`, `http`, …), for every Root of this process."""
    for protocol, values in options.items():
        fsspec.config.conf[protocol] = {**fsspec.config.conf.get(protocol, {}), **values}
