"""Remote files on the local disk: a content-addressed cache with a size limit, which several processes may share."""

import math
import os
import re
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import cached_property, partial
from pathlib import Path

from nfm.storage_specs.storage.cache_files import ENTRY_BYTES, Entry, Part, claim_folder, list_entries
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import IO_THREADS, Root, expand_home, sha256

DEFAULT_CACHE_GB = 200.0  # unless $NFM_CACHE_GB says otherwise
# Size of one ranged GET. There are IO_THREADS threads for ranges of large files, as many for files that a reader waits
# for, and as many for files fetched ahead: at most 3 · IO_THREADS · RANGE_BYTES are in memory.
RANGE_BYTES = 8 << 20
# Once a process has filled this share of the free space, it lists the folder again, to count what others added.
_SCAN_SHARE = 1 / 16
_DIGEST = re.compile("[0-9a-f]{64}")


def cache_directory() -> Path:
    """The folder of cached files: $NFM_CACHE, or else "nfm/files" in the user's cache folder. Raises StoreError if
    $NFM_CACHE is a URL, or if the home folder is needed and there is none."""
    if named := os.environ.get("NFM_CACHE"):
        if "://" in named:
            raise StoreError(f"got the URL {named} for the cache of remote files; expected a folder on a local disk")
        return Path(expand_home(named))
    caches = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "nfm" / "files"
    except RuntimeError as error:
        raise StoreError("got a user without a home folder; set NFM_CACHE to a folder for remote files") from error


def max_cache_bytes() -> int:
    """The size limit: $NFM_CACHE_GB, or else DEFAULT_CACHE_GB. Raises StoreError if it is no number above 0."""
    text = os.environ.get("NFM_CACHE_GB") or str(DEFAULT_CACHE_GB)
    try:
        num_bytes = float(text) * 1e9
    except ValueError:
        num_bytes = math.nan
    if not 0 < num_bytes < math.inf:
        raise StoreError(f"got NFM_CACHE_GB={text!r}; expected a finite number of GB above 0, such as 50")
    return int(num_bytes)


class Cache:
    """Files by their sha256, in a folder that only this user can change (see cache_files.py).

    The sha256 of a file is compared when it arrives, and again when its inode, size or times are not those that were
    noted then: so once for all processes that share the folder, unless somebody touches the file.

    When the files take more than `max_bytes` (by default `max_cache_bytes()`), those used longest ago are deleted. A
    process that has a deleted file mapped can go on reading it: POSIX frees a file when its last mapping ends.
    """

    def __init__(self, directory: Path | None = None, max_bytes: int | None = None) -> None:
        """Raises StoreError if $NFM_CACHE_GB is needed and no number above 0."""
        self.max_bytes = max_cache_bytes() if max_bytes is None else max_bytes
        self._given_directory = directory
        self._range_pool = ThreadPoolExecutor(IO_THREADS, "nfm-range")
        self._lock = threading.Lock()  # for what follows
        self._used_bytes = 0  # on disk, with what is being downloaded; an estimate between two scans
        self._bytes_until_scan = 0.0
        self._oldest: list[Entry] = []  # complete files when the folder was listed, the one used longest ago at the end

    @cached_property
    def directory(self) -> Path:
        """The folder, which is made when it is first needed: local stores need none. Raises StoreError as
        `claim_folder` does."""
        return claim_folder(self._given_directory or cache_directory())

    def fetch(self, root: Root, path: str, size: int, digest: str) -> Path:
        """The local path of a cached copy of the file `path` below `root`, downloaded if it is not cached yet.

        Raises StoreError if the file is to be larger than the whole cache, or if what is downloaded has another size or
        sha256, and StorageError if the folder or its disk cannot be used, or if another process keeps the file locked
        (see `Entry.lock`).
        """
        if not _DIGEST.fullmatch(digest):
            raise StoreError(f"{root.url}/{path}: got sha256 {digest!r}, expected 64 hexadecimal digits")
        entry = Entry(self.directory, digest)
        if entry.note_use(size):
            return entry.content
        if size > self.max_bytes:
            raise StoreError(
                f"{root.url}/{path}: got a file of {size} bytes for a cache of {self.max_bytes}; "
                "raise storage.cache_gb or NFM_CACHE_GB"
            )
        claim_folder(self.directory)  # again, as it may have been deleted
        with entry.lock(root.stop_retrying) as record:
            # Another process may have brought the file while it had the lock.
            if not entry.note_use(size) and not entry.check_content(size, record):
                part = Part(entry.part, size)
                try:
                    self._reserve(part, ENTRY_BYTES)
                    self._download(root, path, size, digest, part)
                    entry.write_record(record, part.publish(entry.content))
                except BaseException:
                    with self._lock:
                        part.close()  # first, so that no thread reserves anything for it any longer
                        self._used_bytes -= part.disk_bytes
                    raise
                part.close()
        return entry.content

    def _download(self, root: Root, path: str, size: int, digest: str, part: Part) -> None:
        """Write the remote file to `part`, and check its size and sha256."""
        if size <= RANGE_BYTES:
            data = root.read_range(path, 0, size + 1)  # one byte more than expected, to notice a longer file
            received_bytes, received_digest = len(data), sha256(data)
            if (received_bytes, received_digest) == (size, digest):
                self._reserve(part, size)
                part.write(data, 0)
        else:
            download_range = partial(self._download_range, root, path, size, part)
            downloads = [self._range_pool.submit(download_range, start) for start in range(0, size, RANGE_BYTES)]
            try:
                wait(downloads, return_when=FIRST_EXCEPTION)
                received_bytes = sum(download.result() for download in downloads)
            finally:
                for download in downloads:
                    download.cancel()  # those that have not begun
            received_digest = part.hash()
        if (received_bytes, received_digest) != (size, digest):
            raise StoreError(
                f"{root.url}/{path}: got {received_bytes} bytes with sha256 {received_digest[:12]}…, "
                f"expected {size} bytes with {digest[:12]}…; the file is damaged, repair or copy the store"
            )

    def _download_range(self, root: Root, path: str, size: int, part: Part, start: int) -> int:
        """Copy the RANGE_BYTES from `start` of a remote file to the same place of `part`. Returns the number of bytes.
        Raises StoreError if the server sends another number of bytes than was asked for."""
        end = min(start + RANGE_BYTES, size)
        data = root.read_range(path, start, end)
        if len(data) != end - start:
            raise StoreError(
                f"{root.url}/{path}: got {len(data)} bytes for a range of {end - start}; "
                "the file is not the one of the manifest, or its server does not support range requests"
            )
        self._reserve(part, len(data))
        part.write(data, start)
        return len(data)

    def _reserve(self, part: Part, num_bytes: int) -> None:
        """Count bytes of a part, which have arrived, for this process and for others. Files used longest ago are
        deleted if there are more than `max_bytes` then: never on the word of a manifest about bytes to come."""
        with self._lock:
            part.grow(num_bytes)
            self._used_bytes += num_bytes
            self._bytes_until_scan -= num_bytes
            if self._bytes_until_scan <= 0:
                self._scan()
            self._evict()
            if self._used_bytes > self.max_bytes:  # the listed files are gone, or were used since
                self._scan()
                self._evict()

    def _scan(self) -> None:
        """List the folder, and delete what killed processes left."""
        entries = list_entries(self.directory)
        self._used_bytes = sum(entry.bytes for entry in entries)
        for entry in entries:
            if not entry.is_complete and entry.delete():
                self._used_bytes -= entry.bytes
        complete = [entry for entry in entries if entry.is_complete]
        self._oldest = sorted(complete, key=lambda entry: (entry.last_use, entry.digest), reverse=True)
        # Where there is no free space left, every process deletes as much as it adds.
        free_bytes = max(self.max_bytes - self._used_bytes, self.max_bytes * _SCAN_SHARE)
        self._bytes_until_scan = free_bytes * _SCAN_SHARE

    def _evict(self) -> None:
        """Delete the files used longest ago until all take at most `max_bytes`."""
        while self._used_bytes > self.max_bytes and self._oldest:
            entry = self._oldest.pop()
            if entry.delete():
                self._used_bytes -= entry.bytes
