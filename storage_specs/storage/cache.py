"""Remote files on the local disk: a content-addressed cache with a size limit, which several processes may share."""

import fcntl
import mmap
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import IO_THREADS, Root, sha256

DEFAULT_CACHE_GB = 200.0  # unless $NFM_CACHE_GB says otherwise
# Size of one ranged GET. There are IO_THREADS threads for parts of large files, as many for files that a reader waits
# for, and as many for files fetched ahead: at most 3 · IO_THREADS · PART_BYTES are in memory.
PART_BYTES = 8 << 20
_SCAN_EVERY = 16  # downloads between two looks at what other processes added
_ABANDONED_SECONDS = 86_400.0  # after which a part is taken to be of a process that was killed


def cache_directory() -> Path:
    """Where remote files are kept: $NFM_CACHE, or nfm under the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nfm"
    return Path(os.environ.get("NFM_CACHE", default))


class Cache:
    """Files by their sha256, which is checked once, when a file arrives. A file is visible under its name only whole.

    Beyond `limit` bytes the files that were not asked for longest go. Whoever has one mapped keeps it: POSIX frees a
    file when its last mapping ends.
    """

    def __init__(self, directory: Path | None = None, max_bytes: int | None = None) -> None:
        self.directory = directory or cache_directory()
        try:
            gigabytes = float(os.environ.get("NFM_CACHE_GB", DEFAULT_CACHE_GB))
        except ValueError as error:
            raise StoreError(f"got NFM_CACHE_GB={os.environ['NFM_CACHE_GB']!r}; expected a number") from error
        self.max_bytes = int(gigabytes * 1e9) if max_bytes is None else max_bytes
        self._parts = ThreadPoolExecutor(IO_THREADS, "nfm-part")
        self._lock = threading.Lock()
        self._bytes, self._arriving, self._until_scan = 0, 0, 0

    def path(self, digest: str) -> Path:
        return self.directory / digest[:2] / digest

    def fetch(self, root: Root, path: str, size: int, digest: str) -> Path:
        """A local path holding the file. Raises StoreError if what arrives has another size or sha256."""
        final = self.path(digest)
        if _here(final, size):
            return final
        final.parent.mkdir(parents=True, exist_ok=True)
        with _sole_writer(final.with_suffix(".part"), final) as descriptor:
            if not _here(final, size):  # it may have arrived while another process had the lock
                self._make_room(size)
                try:
                    self._download(root, path, size, digest, descriptor)
                    os.replace(final.with_suffix(".part"), final)
                finally:
                    with self._lock:
                        self._arriving -= size
        return final

    def _download(self, root: Root, path: str, size: int, digest: str, descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        if size <= PART_BYTES:
            data = root.read_range(path, 0, size + 1)
            got, found = len(data), sha256(data)
            if (got, found) == (size, digest):
                os.pwrite(descriptor, data, 0)
        else:
            part = partial(_part, root, path, size, descriptor)
            parts = [self._parts.submit(part, start) for start in range(0, size, PART_BYTES)]
            wait(parts)  # also after a failure: none may still write when the descriptor is closed
            got = sum(done.result() for done in parts)
            with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as content:
                found = sha256(np.frombuffer(content, np.uint8))
        if (got, found) != (size, digest):
            raise StoreError(
                f"{root.url}/{path}: got {got} bytes with sha256 {found[:12]}…, expected {size} bytes with "
                f"{digest[:12]}…; the file is damaged, repair or copy the store"
            )
        os.fdatasync(descriptor)  # what survives a crash under the final name is whole

    def _make_room(self, size: int) -> None:
        """Account for `size` more bytes, and delete the least recently used files beyond the limit."""
        with self._lock:
            self._arriving += size
            self._bytes += size
            self._until_scan -= 1
            if self._bytes <= self.max_bytes and self._until_scan > 0:
                return
            self._until_scan = _SCAN_EVERY
            for part in self.directory.glob("??/*.part"):
                if part.exists() and time.time() - part.stat().st_mtime > _ABANDONED_SECONDS:
                    part.unlink(missing_ok=True)
            files = sorted(_files(self.directory))
            self._bytes = self._arriving + sum(entry[1] for entry in files)
            for used, held, path in files:
                if self._bytes <= self.max_bytes:
                    break
                if path.exists() and path.stat().st_mtime == used:  # not asked for since it was listed
                    path.unlink(missing_ok=True)
                    self._bytes -= held


def _part(root: Root, path: str, size: int, descriptor: int, start: int) -> int:
    """One ranged GET into its place in the file; the bytes it brought."""
    end = min(start + PART_BYTES, size)
    data = root.read_range(path, start, end)
    if len(data) != end - start:
        raise StoreError(
            f"{root.url}/{path}: got {len(data)} bytes for a range of {end - start}; the file is not the one of the "
            "manifest, or its server knows no ranges"
        )
    return os.pwrite(descriptor, data, start)


def _here(path: Path, size: int) -> bool:
    """Whether the file is there; notes that it is in use."""
    try:
        if path.stat().st_size != size:
            return False
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _files(directory: Path) -> Iterator[tuple[float, int, Path]]:
    """(last use, bytes, path) of each cached file."""
    for folder in directory.glob("??"):
        for path in folder.iterdir():
            if path.suffix != ".part":
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue  # another process evicted it
                yield status.st_mtime, status.st_blocks * 512, path


@contextmanager
def _sole_writer(part: Path, final: Path) -> Iterator[int]:
    """A descriptor of `part` that no other process or thread has locked."""
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                ours = os.fstat(descriptor).st_ino == part.stat().st_ino
            except FileNotFoundError:
                ours = False  # whoever had it finished, and renamed it
            if ours:
                yield descriptor
                if final.exists():
                    part.unlink(missing_ok=True)
                return
        finally:
            os.close(descriptor)
