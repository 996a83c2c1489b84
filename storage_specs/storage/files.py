"""Files in one folder of any fsspec file system. Each is written completely or not at all, also in a crash."""

import errno
import hashlib
import os
import posixpath
import random
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Lock
from typing import Any, TypeVar

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from nfm.storage_specs.storage import bounded_http, bounded_s3, local, remote
from nfm.storage_specs.storage.errors import OutageError, StorageError, StoreError
from nfm.storage_specs.storage.local import LocalFile, is_temporary_file
from nfm.storage_specs.storage.text import hide_options, hide_url, shown

T = TypeVar("T")

IO_THREADS = 8  # threads that read or write files of one store at a time
RETRY_SECONDS = 300.0  # how long requests to a server that fails are repeated
_FIRST_PAUSE = 0.1  # seconds between two attempts, doubled each time up to the next
_LONGEST_PAUSE = 10.0
_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")  # more than one letter: others are drives of Windows


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
        if _ONE_SLASH.match(url):
            raise StoreError(f"got {url}, a URL with one slash; expected two, as in s3://bucket/folder")
        self.url = expand_home(url).rstrip("/") or "/"
        options = dict(options or {})
        hide_url(self.url)
        hide_options(fsspec.config.conf | options)  # also those from FSSPEC_S3_SECRET and its like
        try:
            self.fs, self.path = fsspec.core.url_to_fs(self.url, **_own_options(self.url, options))
        except (StoreError, MemoryError):
            raise
        except Exception as error:  # file systems are plugins, and some open a file or a connection here
            raise StoreError(
                f"cannot open {url!r}: {remote.describe(error)}; expected a path, or a URL such as s3://bucket/folder"
            ) from error
        self.local = isinstance(self.fs, LocalFileSystem)
        self.stop_retrying = Event()

    def full_path(self, path: str) -> str:
        """The path in the file system of a file below this folder. Raises StoreError for a path that leaves it."""
        return _join(self.path, check_relative_path(path))

    def local_file(self, path: str) -> LocalFile:
        """A file of this folder, which is a local one, for the functions of local.py. Raises StoreError for a path that
        leaves the folder."""
        assert self.local
        return LocalFile(self.path, check_relative_path(path))

    def _retry(self, path: str, action: Callable[[], T]) -> T:
        """The result of `action()`, a request to a remote file system. It is called again, with growing pauses, until
        it succeeds or fails with an error that does not pass; the first failure is told on stderr.

        Raises FileNotFoundError if there is no such file, OutageError after RETRY_SECONDS or once `stop_retrying` is
        set, and StorageError for every other error, whatever its class: file systems are plugins.
        """
        started_at = time.monotonic()
        pause = _FIRST_PAUSE
        while True:
            try:
                return action()
            except (StoreError, MemoryError):
                raise
            except Exception as error:
                self._raise_unless_passing(path, error)
                elapsed = time.monotonic() - started_at
                if elapsed + pause > RETRY_SECONDS or self.stop_retrying.is_set():
                    raise OutageError(
                        f"{self._name(path)}: {remote.describe(error)}; tried for {elapsed:.1f} s. "
                        "The same command continues once the storage answers"
                    ) from error
                _announce_retries(self.url, f"{self._name(path)}: {remote.describe(error)}")
                spread = random.uniform(0.5, 1.0)  # noqa: S311  (so that many clients do not all come back at once)
                self.stop_retrying.wait(pause * spread)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _raise_unless_passing(self, path: str, error: Exception) -> None:
        """Raise the error of this project for an error of a file system that another attempt would not change."""
        name = self._name(path)
        if remote.is_missing(error):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from error
        if isinstance(error, (IsADirectoryError, NotADirectoryError, FileExistsError)):
            raise StoreError(f"{name}: {remote.describe(error)}; expected a file") from error
        if not remote.is_passing(error):
            raise StorageError(f"{name}: {remote.describe(error)}; {remote.advice(error)}") from error

    def _name(self, path: str) -> str:
        """The URL of a file, for messages."""
        return _join(self.url, path) if path else self.url

    @contextmanager
    def _local_errors(self, path: str) -> Iterator[None]:
        """Turns errors of the local file system inside the block, but for FileNotFoundError, into StoreError with the
        URL of a file."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(f"{self._name(path)}: {error.strerror}; expected a file or folder to read") from error

    def exists(self, path: str) -> bool:
        """Whether there is a file or a folder at `path`. Raises StorageError if storage does not tell."""
        if self.local:
            with self._local_errors(path):
                return local.find_status(self.local_file(path)) is not None
        self.fs.invalidate_cache()
        try:
            # Not `exists` of the file system, which says no whatever the error is.
            self._retry(path, lambda: self.fs.info(self.full_path(path)))
        except FileNotFoundError:
            return False
        return True

    def list_names(self, folder: str) -> list[str]:
        """Sorted names of what is directly in `folder`, or with "" in this folder; empty if there is no such folder."""
        full_path = self.full_path(folder) if folder else self.path
        try:
            if self.local:
                with self._local_errors(folder):
                    return sorted(local.list_folder(self.path, folder))
            self.fs.invalidate_cache()
            entries = self._retry(folder, lambda: self.fs.ls(full_path, detail=False))
        except FileNotFoundError:
            return []
        names = {posixpath.basename(entry.rstrip("/")) for entry in entries if entry.rstrip("/") != full_path}
        return sorted(names)

    def list_file_sizes(self) -> dict[str, int]:
        """The size in bytes of every file in this folder and its subfolders, by relative path."""
        if self.local:
            return dict(local.list_files(self.path))
        self.fs.invalidate_cache()
        try:
            self._retry("", lambda: self.fs.info(self.path))  # `find` lists nothing, whatever the error is
        except FileNotFoundError:
            return {}
        entries = self._retry("", lambda: self.fs.find(self.path, detail=True))
        prefix_length = len(self.fs._strip_protocol(self.path).rstrip("/")) + 1
        return {name[prefix_length:]: int(entry["size"]) for name, entry in entries.items()}

    def size(self, path: str) -> int | None:
        """The size of a file in bytes; None if there is no such file."""
        if self.local:
            with self._local_errors(path):
                status = local.find_status(self.local_file(path))
            return None if status is None else status.st_size
        self.fs.invalidate_cache()
        try:
            size = self._retry(path, lambda: self.fs.size(self.full_path(path)))
        except FileNotFoundError:
            return None
        if size is None:
            raise StoreError(f"{self._name(path)}: the server reports no file size")
        return int(size)

    def view(self, path: str, max_bytes: int) -> NDArray[np.uint8]:
        """The content of a file, (size,), read-only: of a local one a memory map, which takes no memory. Raises as
        `read` does."""
        if not self.local:
            return np.frombuffer(self.read(path, max_bytes), np.uint8)
        try:
            with self._local_errors(path):
                data = local.map_file(self.local_file(path))
        except FileNotFoundError as error:
            raise self._missing_error(path) from error
        self._check_size(path, len(data), max_bytes)
        return data

    def read(self, path: str, max_bytes: int) -> bytes:
        """The content of a file. Raises StoreError if it is missing, no regular file, or larger than `max_bytes`, and
        StorageError if storage does not give it."""
        if self.local:
            return self._read_local(path, max_bytes)
        size = self.size(path)
        if size is None:
            raise self._missing_error(path)
        self._check_size(path, size, max_bytes)
        return self.read_range(path, 0, size) if size else b""

    def _read_local(self, path: str, max_bytes: int) -> bytes:
        """`read` of a local file; not by a memory map, as a file that is truncated meanwhile would end the process."""
        try:
            with self._local_errors(path), local.open_regular_file(self.local_file(path)) as (descriptor, state):
                self._check_size(path, state.bytes, max_bytes)
                with os.fdopen(descriptor, "rb", closefd=False) as file:
                    return file.read(state.bytes)
        except FileNotFoundError as error:
            raise self._missing_error(path) from error

    def _missing_error(self, path: str) -> StoreError:
        return StoreError(f"{self._name(path)} is missing; repair or copy the store, or give another URL")

    def _check_size(self, path: str, size: int, max_bytes: int) -> None:
        if size > max_bytes:
            raise StoreError(
                f"{self._name(path)}: got {size} bytes, expected at most {max_bytes}; "
                "the file is larger than any such file that nfm writes"
            )

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes `start` (inclusive) to `end` (exclusive) of a file, or fewer where it ends before. Raises StoreError if
        the file is missing, and StorageError if storage does not give it."""
        try:
            if self.local:
                with self._local_errors(path):
                    return local.read_range(self.local_file(path), start, end)
            data = self._retry(path, lambda: self._request_range(self.full_path(path), start, end))
        except FileNotFoundError as error:
            raise self._missing_error(path) from error
        if len(data) > end - start:
            raise StoreError(
                f"{self._name(path)}: got {len(data)} bytes for a range of {end - start}; the storage does not support "
                "ranges"
            )
        return data

    def _request_range(self, full_path: str, start: int, end: int) -> bytes:
        if bounded_s3.is_s3(self.fs):
            return bounded_s3.read_range(self.fs, full_path, start, end)
        return bytes(self.fs.cat_file(full_path, start=start, end=end))

    def write(self, path: str, data: bytes) -> None:
        """Write a file so that it is durable when this returns, and that a reader sees the old file or the new one at
        any time, also after a crash. Makes missing folders.

        Raises OSError with the path if the local file system refuses, StoreError at a link to a folder, StorageError if
        remote storage cannot be reached or refuses access."""
        if self.local:
            local.write_file(self.local_file(path), data)
            return
        full_path = self.full_path(path)
        has_folders = not any(name in self.fs.protocol for name in ("s3", "gs"))  # these have buckets alone
        try:
            if has_folders:
                self._retry(path, lambda: self.fs.makedirs(posixpath.dirname(full_path), exist_ok=True))
            # One PUT, or a multipart upload, which takes effect as a whole.
            self._retry(path, lambda: self.fs.pipe_file(full_path, data))
        except FileNotFoundError as error:
            reason = remote.describe(error.__cause__ or error)
            raise StorageError(f"{self._name(path)}: {reason}; expected a bucket or a folder that exists") from error

    def check_writable(self) -> None:
        """Write an empty file and delete it, before the work whose result is to be written here. Makes missing folders.

        Raises StoreError with the URL if a local folder cannot be written to, and StorageError as `write` does."""
        path = f".{uuid.uuid4().hex}.tmp"
        try:
            self.write(path, b"")
            self.delete(path)
        except OSError as error:
            raise StoreError(f"{self.url}: {error.strerror}; expected a folder to write to, or a new one") from error

    def delete_temporary_files(self, keep: str) -> None:
        """Delete the temporary files that killed writers left behind. Those of the file `keep` stay, because it may be
        in the middle of a write. On object stores there are none."""
        if not self.local:
            return
        for path, _ in local.list_files(self.path):
            if is_temporary_file(path) and not path.startswith(keep):
                with suppress(FileNotFoundError):
                    local.delete_file(self.local_file(path))

    def delete(self, path: str) -> None:
        """Delete a file. Raises FileNotFoundError if there is none."""
        if self.local:
            local.delete_file(self.local_file(path))
            return
        self._retry(path, lambda: self.fs.rm_file(self.full_path(path)))


def _join(url: str, path: str) -> str:
    """The path or URL of a file in a folder. The query of a web URL, such as a signature, stays at the end."""
    query = ""
    if url.startswith(("http://", "https://")):
        url, mark, query = url.partition("?")
        query = mark + query
    return posixpath.join(url, path) + query


def _own_options(url: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a file system, with what this project needs of it."""
    if url.startswith(("http://", "https://")):
        return options | {"get_client": bounded_http.open_session}
    if url.startswith("s3://") and "config_kwargs" not in fsspec.config.conf.get("s3", {}) | options:
        return options | {"config_kwargs": {"retries": {"max_attempts": 0}}}  # `Root` repeats, and says so
    return options


_last_announced: dict[str, float] = {}  # by URL of a folder: when it was said that requests to it are repeated
_announcing = Lock()


def _announce_retries(url: str, failure: str) -> None:
    """Say on stderr, once in RETRY_SECONDS for a folder, that a request failed and is repeated."""
    with _announcing:
        now = time.monotonic()
        if url in _last_announced and now - _last_announced[url] < RETRY_SECONDS:
            return
        _last_announced[url] = now
    line = f"{failure}; trying again for up to {RETRY_SECONDS:.0f} s"
    print(shown(line), file=sys.stderr, flush=True)


def expand_home(url: str) -> str:
    """A path that begins with ~ with the home folder in its place, as a shell does it, but not behind a = as in
    `--out=~/folder`; any other path or URL as it is."""
    return os.path.expanduser(url) if url.startswith("~") else url


def absolute_url(url: str) -> str:
    """A path made absolute, for a process with another working directory; a URL as it is."""
    expanded = expand_home(url)
    return expanded if "://" in expanded else os.path.abspath(expanded)


def split_url(url: str, follow: bool = True) -> tuple[Root, str]:
    """The folder and the name of the file at a URL. A link that a user names is followed; without `follow` the file is
    one that we name in a folder of the user, where a link is refused like everywhere."""
    url = expand_home(url)
    if follow and os.path.islink(url):
        url = os.path.realpath(url)
    folder, slash, name = url.rpartition("/")
    return Root(folder or slash or "."), name


def check_file_size(name: str | Path, actual_bytes: int, expected_bytes: int) -> None:
    """Raise StoreError with the file's `name` unless it has the size that the manifest gives."""
    if actual_bytes != expected_bytes:
        raise StoreError(
            f"{name}: got {actual_bytes} bytes, expected {expected_bytes}; "
            "the file is truncated or overlong, repair or copy it again"
        )


def set_file_system_options(options: dict[str, dict[str, Any]]) -> None:
    """Set options of fsspec file systems by protocol (`s3`, `gs`, `http`, …), for every `Root` made afterwards in this
    process."""
    for protocol, values in options.items():
        fsspec.config.conf[protocol] = {**fsspec.config.conf.get(protocol, {}), **values}
