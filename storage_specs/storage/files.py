"""Files in one folder of any fsspec file system. Each is written completely or not at all, also in a crash."""

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
from typing import Any, NamedTuple, TypeVar

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from nfm.storage_specs.storage.errors import OutageError, StorageError, StoreError
from nfm.storage_specs.storage.text import hide_options, hide_url

T = TypeVar("T")

IO_THREADS = 8  # threads that read or write files of one store at a time
RETRY_SECONDS = 300.0  # how long requests to a server that fails are repeated
_FIRST_PAUSE = 0.1  # seconds between two attempts, doubled each time up to the next
_LONGEST_PAUSE = 10.0
_TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{32}\.tmp$")
# Errors that another attempt would not change.
_PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
# Errors of the libraries under fsspec that are no OSError, as (module, class). They are looked up in `sys.modules`: a
# library that was not imported cannot have raised one.
_LIBRARY_TRANSIENT_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "HTTPClientError"),
    ("botocore.exceptions", "ConnectionError"),
    ("gcsfs.retry", "HttpError"),
)
_LIBRARY_CREDENTIAL_ERRORS = (("botocore.exceptions", "BotoCoreError"), ("google.auth.exceptions", "GoogleAuthError"))


def is_temporary_file(path: str) -> bool:
    """Whether a file has the name of one that a writer had not finished."""
    return _TEMPORARY_NAME.search(path) is not None


def sha256(data: bytes | NDArray[np.uint8]) -> str:
    """The SHA-256 of bytes or of a contiguous byte array, as 64 hexadecimal digits."""
    return hashlib.sha256(data if isinstance(data, bytes) else data.data).hexdigest()


def check_relative_path(path: str) -> str:
    """Return `path`. Raises StoreError unless it is a plain relative path that stays inside the folder it is joined to:
    the paths in a manifest may come from another team."""
    parts = path.split("/")
    has_bad_character = "\\" in path or "\0" in path
    has_bad_part = any(part in ("", ".", "..") for part in parts)
    if not path or has_bad_character or has_bad_part:
        raise StoreError(f"got path {path!r} in a store; expected a plain relative path inside the store")
    return path


def _imported_classes(names: tuple[tuple[str, str], ...]) -> tuple[type[Exception], ...]:
    """The exception classes among these (module, class) names whose module is imported."""
    return tuple(getattr(sys.modules[module], name) for module, name in names if module in sys.modules)


def _transient_errors() -> tuple[type[Exception], ...]:
    """Errors of a file system that another attempt may not meet."""
    return (OSError, *_imported_classes(_LIBRARY_TRANSIENT_ERRORS))


def _credential_errors() -> tuple[type[Exception], ...]:
    """Errors of a file system about credentials or profiles."""
    return _imported_classes(_LIBRARY_CREDENTIAL_ERRORS)


class Root:
    """A folder, local or remote, and the files in it by relative path.

    `options` are those of the fsspec file system (`endpoint_url`, `profile`, `anon`, …). A request to a remote file
    system that fails is repeated for RETRY_SECONDS; then OutageError is raised, a StoreError. Setting `stop_retrying`
    ends the repetitions at once, when nobody needs the result any more.
    """

    def __init__(self, url: str, options: dict[str, Any] | None = None) -> None:
        """Raises StoreError if there is no file system for the URL, or if it is empty."""
        if not url.strip():
            raise StoreError("got an empty URL; expected a path or a URL")
        self.url = url.rstrip("/") or "/"
        hide_url(self.url)
        hide_options(options or {})
        try:
            self.fs, self.path = fsspec.core.url_to_fs(self.url, **(options or {}))
        except (ValueError, ImportError, TypeError) as error:
            raise StoreError(f"cannot open {url!r}: {error}") from error
        self.local = isinstance(self.fs, LocalFileSystem)
        self.stop_retrying = Event()

    def full_path(self, path: str) -> str:
        """The path in the file system of a file below this folder. Raises StoreError for a path that leaves it."""
        return posixpath.join(self.path, check_relative_path(path))

    def _retry(self, path: str, action: Callable[[], T]) -> T:
        """The result of `action()`. On a remote file system it is called again, with growing pauses, until it succeeds.

        Raises OutageError after RETRY_SECONDS or once `stop_retrying` is set, and StorageError if the server refuses
        access. An error that another attempt would not change, such as FileNotFoundError, is raised as it is.
        """
        if self.local:
            return action()
        started_at = time.monotonic()
        pause = _FIRST_PAUSE
        while True:
            try:
                return action()
            except _PERMANENT_ERRORS:
                raise
            except _transient_errors() as error:
                http_status = getattr(error, "status", None)
                if isinstance(http_status, int) and 400 <= http_status < 500 and http_status not in (408, 429):
                    raise StorageError(
                        f"{self.url}/{path}: {error}; the server refuses the request, check URL and credentials"
                    ) from error
                elapsed = time.monotonic() - started_at
                if elapsed + pause > RETRY_SECONDS or self.stop_retrying.is_set():
                    raise OutageError(
                        f"{self.url}/{path}: {error or type(error).__name__}; tried for {elapsed:.1f} s. "
                        "The same command continues once the storage answers"
                    ) from error
                spread = random.uniform(0.5, 1.0)  # noqa: S311  (so that many clients do not all come back at once)
                self.stop_retrying.wait(pause * spread)
                pause = min(2 * pause, _LONGEST_PAUSE)
            except _credential_errors() as error:
                raise StorageError(
                    f"{self.url}: {error}; expected credentials in the environment or a profile, "
                    "or storage options such as anon=true"
                ) from error

    def exists(self, path: str) -> bool:
        """Whether there is a file or a folder at `path`."""
        self.fs.invalidate_cache()
        return bool(self._retry(path, lambda: self.fs.exists(self.full_path(path))))

    def list_names(self, folder: str) -> list[str]:
        """Sorted names of what is directly in `folder`, or with "" in this folder; empty if there is no such folder."""
        full_path = self.full_path(folder) if folder else self.path
        self.fs.invalidate_cache()
        try:
            entries = self._retry(folder, lambda: self.fs.ls(full_path, detail=False))
        except FileNotFoundError:
            return []
        names = {posixpath.basename(entry.rstrip("/")) for entry in entries if entry.rstrip("/") != full_path}
        return sorted(names)

    def list_file_sizes(self) -> dict[str, int]:
        """The size in bytes of every file in this folder and its subfolders, by relative path."""
        self.fs.invalidate_cache()
        entries = self._retry("", lambda: self.fs.find(self.path, detail=True))
        prefix_length = len(self.fs._strip_protocol(self.path).rstrip("/")) + 1
        return {name[prefix_length:]: int(entry["size"]) for name, entry in entries.items()}

    def size(self, path: str) -> int | None:
        """The size of a file in bytes; None if there is no such file."""
        self.fs.invalidate_cache()
        try:
            size = self._retry(path, lambda: self.fs.size(self.full_path(path)))
        except FileNotFoundError:
            return None
        if size is None:
            raise StoreError(f"{self.url}/{path}: the server reports no file size")
        return int(size)

    def read(self, path: str, max_bytes: int) -> bytes:
        """The content of a file. Raises StoreError if it is missing, no regular file, or larger than `max_bytes`."""
        if self.local:
            return self._read_local(path, max_bytes)
        size = self.size(path)
        if size is None:
            raise self._missing_error(path)
        if size > max_bytes:
            raise self._too_large_error(path, size, max_bytes)
        return self.read_range(path, 0, size) if size else b""

    def _read_local(self, path: str, max_bytes: int) -> bytes:
        """`read` of a local file, which must be a regular one."""
        try:
            with open_regular_file(self.full_path(path)) as (descriptor, state):
                if state.bytes > max_bytes:
                    raise self._too_large_error(path, state.bytes, max_bytes)
                with os.fdopen(descriptor, "rb", closefd=False) as file:
                    return file.read(state.bytes)
        except FileNotFoundError as error:
            raise self._missing_error(path) from error
        except OSError as error:
            raise StoreError(f"{self.url}/{path}: {error.strerror}; expected a file") from error

    def _missing_error(self, path: str) -> StoreError:
        return StoreError(f"{self.url}/{path} is missing; the URL is wrong, or what writes it has not finished")

    def _too_large_error(self, path: str, size: int, max_bytes: int) -> StoreError:
        return StoreError(
            f"{self.url}/{path}: got {size} bytes, expected at most {max_bytes}; "
            "the file is larger than any such file that nfm writes"
        )

    def read_range(self, path: str, start: int | None, end: int | None) -> bytes:
        """Bytes `start` (inclusive) to `end` (exclusive) of a file; None stands for its beginning or its end. Raises
        StoreError if the file is missing."""
        try:
            data = self._retry(path, lambda: self.fs.cat_file(self.full_path(path), start=start, end=end))
        except FileNotFoundError as error:
            raise self._missing_error(path) from error
        assert isinstance(data, bytes)
        return data

    def write(self, path: str, data: bytes) -> None:
        """Write a file so that it is durable when this returns, and that a reader sees the old file or the new one at
        any time, also after a crash. Makes missing folders.

        Raises OSError if the local file system refuses, StorageError if a remote one cannot be reached or refuses
        access."""
        if self.local:
            self._write_local(self.full_path(path), data)
            return
        full_path = self.full_path(path)
        has_folders = not any(name in self.fs.protocol for name in ("s3", "gs"))  # these have buckets alone
        if has_folders:
            self._retry(path, lambda: self.fs.makedirs(posixpath.dirname(full_path), exist_ok=True))
        # One PUT, or a multipart upload, which takes effect as a whole.
        self._retry(path, lambda: self.fs.pipe_file(full_path, data))

    def _write_local(self, full_path: str, data: bytes) -> None:
        """Write and flush a temporary file, give it its final name, and flush the folder."""
        Path(full_path).parent.mkdir(parents=True, exist_ok=True)
        temporary = f"{full_path}.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, full_path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        directory = os.open(posixpath.dirname(full_path), os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def delete_temporary_files(self, keep: str) -> None:
        """Delete the temporary files that killed writers left behind. Those of the file `keep` stay, because it may be
        in the middle of a write. On object stores there are none."""
        if not self.local:
            return
        for path in Path(self.path).rglob("*.tmp"):
            belongs_to_keep = str(path).startswith(self.full_path(keep))
            if _TEMPORARY_NAME.search(path.name) and not belongs_to_keep:
                path.unlink(missing_ok=True)

    def delete(self, path: str) -> None:
        """Delete a file. Raises FileNotFoundError if there is none."""
        self._retry(path, lambda: self.fs.rm_file(self.full_path(path)))


def split_url(url: str) -> tuple[Root, str]:
    """The folder and the name of the file at a URL."""
    folder, slash, name = url.rpartition("/")
    return Root(folder or slash or "."), name


class FileState(NamedTuple):
    """What tells that a local file is still the one that was checked."""

    device: int
    inode: int
    bytes: int
    mtime_ns: int

    def is_same_file(self, other: "FileState") -> bool:
        """Whether device, inode and size are those of `other`. A file in the cache keeps these, but not its time."""
        return self[:3] == other[:3]


@contextmanager
def open_regular_file(path: str | Path) -> Iterator[tuple[int, FileState]]:
    """An open descriptor, for reading, and the state of a local file.

    Raises OSError if there is no file or no regular one: in a store of another team, a pipe would block for ever and a
    device never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield descriptor, FileState(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    finally:
        os.close(descriptor)


def check_file_size(name: str | Path, actual_bytes: int, expected_bytes: int) -> None:
    """Raise StoreError with the file's `name` unless it has the size that the manifest gives."""
    if actual_bytes != expected_bytes:
        raise StoreError(
            f"{name}: got {actual_bytes} bytes, expected {expected_bytes}; "
            "the file is truncated or overlong, repair or copy it again"
        )


def map_file(path: str | Path) -> NDArray[np.uint8]:
    """The bytes of a local file as a read-only memory map, (size,). Raises OSError if it cannot be read."""
    with open_regular_file(path) as (descriptor, state):
        if state.bytes == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype=np.uint8)
        return np.frombuffer(mmap.mmap(descriptor, state.bytes, prot=mmap.PROT_READ), np.uint8)


def set_file_system_options(options: dict[str, dict[str, Any]]) -> None:
    """Set options of fsspec file systems by protocol (`s3`, `gs`, `http`, …), for every `Root` made afterwards in this
    process."""
    hide_options(options)
    for protocol, values in options.items():
        fsspec.config.conf[protocol] = {**fsspec.config.conf.get(protocol, {}), **values}
