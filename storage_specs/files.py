"""Files under one root, on any fsspec file system, written so that a crash leaves either nothing or all of a file."""

import hashlib
import os
import posixpath
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from storage_specs.errors import StoreError


def sha256(data: bytes | NDArray[np.uint8]) -> str:
    return hashlib.sha256(data if isinstance(data, bytes) else data.data).hexdigest()


def checked_relative(path: str) -> str:
    """`path` if it stays inside its root, else StoreError: paths in a manifest are another team's input."""
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise StoreError(f"got path {path!r} in a store; expected a plain relative path inside the store")
    return path


class Root:
    """One directory, local or remote, and the files in it by relative path."""

    def __init__(self, url: str, options: dict[str, Any] | None = None) -> None:
        self.url = url
        try:
            self.fs, self.path = fsspec.core.url_to_fs(url, **(options or {}))
        except (ValueError, ImportError) as error:
            raise StoreError(f"cannot open {url!r}: {error}") from error
        self.local = isinstance(self.fs, LocalFileSystem)

    def full(self, path: str) -> str:
        return posixpath.join(self.path, checked_relative(path))

    def exists(self, path: str) -> bool:
        return bool(self.fs.exists(self.full(path)))

    def names(self, folder: str) -> list[str]:
        """Sorted file names directly in `folder`; empty if there is none."""
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.full(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(posixpath.basename(entry) for entry in entries)

    def read(self, path: str, limit: int) -> bytes:
        """The whole of a file of at most `limit` bytes."""
        try:
            size = int(self.fs.size(self.full(path)))
            if size > limit:
                raise StoreError(
                    f"{self.url}/{path}: got {size} bytes, expected at most {limit}; this is no file of ours"
                )
            data = self.fs.cat_file(self.full(path))
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
            self.fs.makedirs(posixpath.dirname(full), exist_ok=True)
            self.fs.pipe_file(full, data)  # one PUT, or a multipart upload that completes or does not
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
        self.fs.rm_file(self.full(path))


def mapped(path: str | Path) -> NDArray[np.uint8]:
    """A local file as a read-only byte array that the page cache backs."""
    try:
        return np.memmap(path, dtype=np.uint8, mode="r")
    except (FileNotFoundError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise StoreError(f"{path} is missing or empty; the store is incomplete") from error


def cache_directory() -> Path:
    """Where remote files are kept: $NFM_CACHE, or nfm under the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nfm"
    return Path(os.environ.get("NFM_CACHE", default))


def local_file(root: Root, path: str, size: int, digest: str) -> Path:
    """A local path holding the file: itself, or a copy in a content-addressed cache, whose sha256 was checked when it
    arrived. Several processes may share the cache: a partial file is never visible under its final name."""
    if root.local:
        return Path(root.full(path))
    cached = cache_directory() / digest[:2] / digest
    if cached.exists() and cached.stat().st_size == size:
        return cached
    data = root.read(path, limit=size)
    if len(data) != size or sha256(data) != digest:
        raise StoreError(
            f"{root.url}/{path}: got {len(data)} bytes with sha256 {sha256(data)[:12]}…, expected {size} bytes with "
            f"{digest[:12]}…; the file is damaged, copy or encode it again"
        )
    Root(str(cached.parent)).write(digest, data)
    return cached
