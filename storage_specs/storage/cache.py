"""Remote files on the local disk: a content-addressed cache with a size limit, which several processes may share."""

import fcntl
import mmap
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import IO_THREADS, Root, sha256

DEFAULT_CACHE_GB = 200.0  # unless $NFM_CACHE_GB says otherwise
# Size of one ranged GET. There are IO_THREADS threads for ranges of large files, as many for files that a reader waits
# for, and as many for files fetched ahead: at most 3 · IO_THREADS · RANGE_BYTES are in memory.
RANGE_BYTES = 8 << 20
_DOWNLOADS_PER_SCAN = 16  # downloads after which the folder is listed again, to count what other processes added
_ABANDONED_SECONDS = 86_400.0  # a partial file that was not written to for so long belongs to a killed process


def cache_directory() -> Path:
    """The folder of cached files: $NFM_CACHE, or else "nfm" in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nfm"
    return Path(os.environ.get("NFM_CACHE", default))


class Cache:
    """Files by their sha256, which is checked once, when a file arrives. A file has its final name only when complete.

    When the files take more than `max_bytes` (by default $NFM_CACHE_GB, or DEFAULT_CACHE_GB), those used longest ago
    are deleted. A process that has a deleted file mapped can go on reading it: POSIX frees a file when its last mapping
    ends.
    """

    def __init__(self, directory: Path | None = None, max_bytes: int | None = None) -> None:
        """Raises StoreError if $NFM_CACHE_GB is no number."""
        self.directory = directory or cache_directory()
        try:
            gigabytes = float(os.environ.get("NFM_CACHE_GB", DEFAULT_CACHE_GB))
        except ValueError as error:
            raise StoreError(f"got NFM_CACHE_GB={os.environ['NFM_CACHE_GB']!r}; expected a number") from error
        self.max_bytes = int(gigabytes * 1e9) if max_bytes is None else max_bytes
        self._range_pool = ThreadPoolExecutor(IO_THREADS, "nfm-range")
        self._lock = threading.Lock()  # for the three counters
        self._used_bytes = 0  # on disk, with what is being downloaded; an estimate between two scans
        self._downloading_bytes = 0
        self._downloads_until_scan = 0

    def _final_path(self, digest: str) -> Path:
        """The path of the file with this sha256 once it is cached, whether it is or not."""
        return self.directory / digest[:2] / digest

    def fetch(self, root: Root, path: str, size: int, digest: str) -> Path:
        """The local path of a cached copy of the file `path` below `root`, downloaded if it is not cached yet.

        Raises StoreError if the downloaded file has another size or sha256.
        """
        final = self._final_path(digest)
        if _mark_used(final, size):
            return final
        final.parent.mkdir(parents=True, exist_ok=True)
        partial_file = final.with_suffix(".part")
        with _open_locked(partial_file, final) as descriptor:
            if not _mark_used(final, size):  # another process may have downloaded it while it had the lock
                self._reserve_space(size)
                try:
                    self._download(root, path, size, digest, descriptor)
                    os.replace(partial_file, final)
                finally:
                    with self._lock:
                        self._downloading_bytes -= size
        return final

    def _download(self, root: Root, path: str, size: int, digest: str, descriptor: int) -> None:
        """Write the remote file to the open file `descriptor` and check its size and sha256."""
        os.ftruncate(descriptor, 0)
        if size <= RANGE_BYTES:
            data = root.read_range(path, 0, size + 1)  # one byte more than expected, to notice a longer file
            received_bytes, received_digest = len(data), sha256(data)
            if (received_bytes, received_digest) == (size, digest):
                os.pwrite(descriptor, data, 0)
        else:
            download_range = partial(_download_range, root, path, size, descriptor)
            downloads = [self._range_pool.submit(download_range, start) for start in range(0, size, RANGE_BYTES)]
            wait(downloads)  # also after a failure: no thread may still write when the descriptor is closed
            received_bytes = sum(download.result() for download in downloads)
            with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as content:
                received_digest = sha256(np.frombuffer(content, np.uint8))
        if (received_bytes, received_digest) != (size, digest):
            raise StoreError(
                f"{root.url}/{path}: got {received_bytes} bytes with sha256 {received_digest[:12]}…, "
                f"expected {size} bytes with {digest[:12]}…; the file is damaged, repair or copy the store"
            )
        os.fdatasync(descriptor)  # before the file gets its final name, so that it is complete even after a crash

    def _reserve_space(self, size: int) -> None:
        """Count `size` more bytes, and delete the files used longest ago if there are more than `max_bytes` then."""
        with self._lock:
            self._downloading_bytes += size
            self._used_bytes += size
            self._downloads_until_scan -= 1
            if self._used_bytes <= self.max_bytes and self._downloads_until_scan > 0:
                return
            self._downloads_until_scan = _DOWNLOADS_PER_SCAN
            self._delete_abandoned_parts()
            self._delete_least_recently_used()

    def _delete_abandoned_parts(self) -> None:
        """Delete partial files that no process can be writing any more."""
        for part in self.directory.glob("??/*.part"):
            if part.exists() and time.time() - part.stat().st_mtime > _ABANDONED_SECONDS:
                part.unlink(missing_ok=True)

    def _delete_least_recently_used(self) -> None:
        """Count the bytes in the folder, and delete files until they are at most `max_bytes`."""
        files = sorted(_list_files(self.directory), key=lambda file: (file.last_use, file.disk_bytes, file.path))
        self._used_bytes = self._downloading_bytes + sum(file.disk_bytes for file in files)
        for file in files:
            if self._used_bytes <= self.max_bytes:
                break
            if file.path.exists() and file.path.stat().st_mtime == file.last_use:  # not used since it was listed
                file.path.unlink(missing_ok=True)
                self._used_bytes -= file.disk_bytes


@dataclass(frozen=True)
class CachedFile:
    """A complete file in the cache."""

    path: Path
    last_use: float  # modification time, which `_mark_used` sets
    disk_bytes: int


def _download_range(root: Root, path: str, size: int, descriptor: int, start: int) -> int:
    """Copy the RANGE_BYTES from `start` of a remote file to the same place of the open file `descriptor`. Returns the
    number of bytes. Raises StoreError if the server sends another number of bytes than was asked for."""
    end = min(start + RANGE_BYTES, size)
    data = root.read_range(path, start, end)
    if len(data) != end - start:
        raise StoreError(
            f"{root.url}/{path}: got {len(data)} bytes for a range of {end - start}; "
            "the file is not the one of the manifest, or its server does not support range requests"
        )
    return os.pwrite(descriptor, data, start)


def _mark_used(path: Path, size: int) -> bool:
    """Set the time of last use of a cached file. Returns False if there is no such file of this size."""
    try:
        if path.stat().st_size != size:
            return False
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _list_files(directory: Path) -> Iterator[CachedFile]:
    """The complete files of the cache."""
    for folder in directory.glob("??"):
        for path in folder.iterdir():
            if path.suffix == ".part":
                continue
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another process deleted it
            yield CachedFile(path, status.st_mtime, status.st_blocks * 512)


@contextmanager
def _open_locked(partial_file: Path, final: Path) -> Iterator[int]:
    """An open descriptor of `partial_file` with an exclusive lock: no other thread or process writes the file.

    Afterwards the partial file is deleted if the complete file, `final`, exists.
    """
    while True:
        descriptor = os.open(partial_file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_still_at(descriptor, partial_file):
                yield descriptor
                if final.exists():
                    partial_file.unlink(missing_ok=True)
                return
            # Whoever held the lock has renamed the file, and perhaps another process made a new one: open that.
        finally:
            os.close(descriptor)


def _is_still_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
