"""The folder of the cache: it belongs to one user and to the cache alone. For a file with the sha256 D it holds

    D         the content, under this name only when it is complete and its sha256 was compared
    D.part    the content while it is downloaded
    D.record  the state of D when its sha256 was compared (see `_describe`); its own time is that of the last use

and MARKER_FILE, without which the folder is not used. Who changes one of the three files holds a lock (flock) on
D.record, which ends with the process at the latest. Files of other names are left alone, and no link is followed.
"""

import errno
import fcntl
import mmap
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nfm.storage_specs.storage.errors import StorageError, StoreError
from nfm.storage_specs.storage.files import RETRY_SECONDS, sha256

MARKER_FILE = "nfm-cache"
# How long another process may keep a file locked without a byte of it arriving; it may be repeating its requests.
LOCK_SECONDS = RETRY_SECONDS + 60.0
_LONGEST_LOCK_PAUSE = 0.05  # seconds between two attempts to lock a file
_MAX_RECORD_BYTES = 128
_BLOCK_BYTES = 4096  # that a file takes at least, on most file systems
ENTRY_BYTES = 2 * _BLOCK_BYTES  # at most, on disk: what the record takes, and the rest of the last block of a content
_NAME = re.compile(r"([0-9a-f]{64})(\.part|\.record)?")
_OTHER_FOLDER = "set NFM_CACHE or storage.cache to another folder"


def claim_folder(folder: Path) -> Path:
    """The real path of a folder for the cache. It is made if there is none, and marked if it is empty.

    Raises StoreError if it holds other files, as the cache deletes files, or if another user owns it or may write to
    it. The folders above it are taken as they are.
    """
    folder = Path(os.path.realpath(folder))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (owner := folder.stat().st_uid) != os.geteuid():
            raise StoreError(
                f"cache {folder}: got a folder of the user with id {owner}, expected your own; {_OTHER_FOLDER}"
            )
        if not _is_marked(folder):
            _mark(folder)
        if folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise StoreError(
                f"cache {folder}: other users may write to it, and may have; "
                f"delete it, or {_OTHER_FOLDER}, which is then made for you alone"
            )
    except OSError as error:
        raise StoreError(f"cache {folder}: {error.strerror}; {_OTHER_FOLDER}") from error
    return folder


def _is_marked(folder: Path) -> bool:
    """Whether the folder has a marker that this user made."""
    try:
        status = os.lstat(folder / MARKER_FILE)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


def _mark(folder: Path) -> None:
    """Make an empty folder private, and mark it. Raises StoreError if it is not empty."""
    _check_empty(folder)
    folder.chmod(0o700)
    _check_empty(folder)  # once more, as nobody else can write any longer
    with suppress(FileExistsError):  # another process was quicker
        (folder / MARKER_FILE).touch(mode=0o600, exist_ok=False)


def _check_empty(folder: Path) -> None:
    """Raise StoreError if the folder holds anything and was not marked meanwhile."""
    names = sorted(os.listdir(folder))
    if names and not _is_marked(folder):
        raise StoreError(
            f"cache {folder}: got a folder that holds other files ({names[0]}), expected a new or an empty one, "
            f"because files in it are deleted; {_OTHER_FOLDER}"
        )


class Part:
    """The content of a file while it is downloaded. Several threads may write it; after `close` none can."""

    def __init__(self, path: Path, size: int) -> None:
        """Make an empty file that is to have `size` bytes, in place of one that a killed process left. Raises
        StorageError."""
        self.path = path
        self.size = size
        self.disk_bytes = 0  # at most; see `grow`
        self._lock = threading.Lock()
        with explain_disk_errors(path):
            _unlink(path)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def grow(self, num_bytes: int) -> None:
        """Say that the file takes so many bytes more: other processes see it by its length. Raises StorageError, also
        if the part is closed."""
        with explain_disk_errors(self.path), self._lock:
            length = min(self.disk_bytes + num_bytes, self.size)
            if os.fstat(self._descriptor).st_size < length:
                os.ftruncate(self._descriptor, length)
            self.disk_bytes += num_bytes

    def write(self, data: bytes, offset: int) -> None:
        """Write all of `data`: a nearly full disk takes less than it was given, without an error. Raises
        StorageError, also if the part is closed."""
        rest = memoryview(data)
        with explain_disk_errors(self.path), self._lock:
            while rest:
                written = os.pwrite(self._descriptor, rest, offset)
                rest, offset = rest[written:], offset + written

    def hash(self) -> str:
        """The sha256 of the file."""
        return _hash_file(self._descriptor)

    def publish(self, content: Path) -> os.stat_result:
        """Give the file its final name, and return its status then. It is complete there even after a crash. Raises
        StorageError."""
        with explain_disk_errors(content):
            os.fdatasync(self._descriptor)
            os.replace(self.path, content)
            return os.fstat(self._descriptor)

    def close(self) -> None:
        """Delete the file, unless it was published. A thread that still downloads cannot write to a file opened since
        with the same descriptor."""
        with self._lock:
            os.close(self._descriptor)
            self._descriptor = -1
        _unlink(self.path)


@dataclass(frozen=True)
class Entry:
    """The three files of a cached file. `bytes`, `last_use` and `is_complete` are known of one that was listed."""

    folder: Path
    digest: str
    bytes: int = 0  # on disk, of all three
    last_use: int = 0  # modification time of the record in ns, 0 if there is none
    is_complete: bool = False  # whether there is a content

    @property
    def content(self) -> Path:
        return self.folder / self.digest

    @property
    def part(self) -> Path:
        return self.folder / f"{self.digest}.part"

    @property
    def record(self) -> Path:
        return self.folder / f"{self.digest}.record"

    def note_use(self, size: int) -> bool:
        """Set the time of last use. Returns False if there is no content of this size whose sha256 was compared."""
        content, record = self.content, self.record
        try:
            status = os.lstat(content)
            with _open_file(record, os.O_RDONLY) as descriptor:
                is_checked = os.read(descriptor, _MAX_RECORD_BYTES) == _describe(status)
            if not is_checked or status.st_size != size:
                return False
            os.utime(record, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def check_content(self, size: int, record: int) -> bool:
        """Compare the sha256 of the content, and note in the open file `record` that it is right. Returns False if it
        is not, or if there is no regular file of this size."""
        try:
            if not stat.S_ISREG(os.lstat(self.content).st_mode):
                return False
        except FileNotFoundError:
            return False
        with _open_file(self.content, os.O_RDONLY) as content, explain_disk_errors(self.content):
            status = os.fstat(content)
            if status.st_size != size or _hash_file(content) != self.digest:
                return False
        self.write_record(record, status)
        return True

    def write_record(self, record: int, status: os.stat_result) -> None:
        """Note in the open file `record` that the sha256 of the content with this status was compared."""
        with explain_disk_errors(self.record):
            os.ftruncate(record, 0)
            os.pwrite(record, _describe(status), 0)  # where the record is cut off, the content is hashed once more

    @contextmanager
    def lock(self, stop: threading.Event) -> Iterator[int]:
        """The open file of the record, with an exclusive lock: no other thread or process changes the three files.

        Raises StorageError if `stop` is set meanwhile, or if whoever has the lock makes no progress for LOCK_SECONDS.
        """
        while True:
            with _open_file(self.record, os.O_RDWR | os.O_CREAT) as descriptor:
                self._wait_for_lock(descriptor, stop)
                if _is_still_at(descriptor, self.record):
                    yield descriptor
                    return
                # Whoever had the lock has deleted the file, and perhaps another process made a new one: open that.

    def _wait_for_lock(self, descriptor: int, stop: threading.Event) -> None:
        pause, arrived, deadline = 0.001, -1, 0.0
        while not _try_lock(descriptor):
            if (part_time := _modified_at(self.part)) != arrived:
                arrived, deadline = part_time, time.monotonic() + LOCK_SECONDS
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{self.record}: another process has locked it for {LOCK_SECONDS:.0f} s, and downloaded nothing; "
                    f"end that process (`fuser` names it), or {_OTHER_FOLDER}"
                )
            if stop.wait(pause):  # in place of a blocking flock, which nothing but a signal could end
                raise StorageError(f"{self.record}: another process has locked it; stopped waiting")
            pause = min(2 * pause, _LONGEST_LOCK_PAUSE)

    def delete(self) -> bool:
        """Delete the three files. Returns False if a process has the lock, or used the file since it was listed."""
        if _modified_at(self.record) != self.last_use:
            return False
        with _open_file(self.record, os.O_RDWR | os.O_CREAT) as descriptor:
            if not _try_lock(descriptor) or not _is_still_at(descriptor, self.record):
                return False
            for path in (self.content, self.part, self.record):
                _unlink(path)
        return True


def list_entries(folder: Path) -> list[Entry]:
    """The entries of the cache. Files that are not its own are left out."""
    bytes_of: dict[str, int] = {}
    last_uses: dict[str, int] = {}
    complete: set[str] = set()
    with os.scandir(folder) as files:
        for file in files:
            name = _NAME.fullmatch(file.name)
            if name is None:
                continue
            try:
                status = file.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # another process deleted it
            if not stat.S_ISREG(status.st_mode):
                continue
            digest, suffix = name.groups()
            # A part has the length of what has arrived, and takes less on disk until that is written.
            bytes_of[digest] = bytes_of.get(digest, 0) + max(status.st_size, status.st_blocks * 512)
            if suffix == ".record":
                last_uses[digest] = status.st_mtime_ns
            elif suffix is None:
                complete.add(digest)
    return [
        Entry(folder, digest, num_bytes, last_uses.get(digest, 0), digest in complete)
        for digest, num_bytes in bytes_of.items()
    ]


@contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Raise StorageError with the path in place of an OSError, but for FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        action = "free space there, set a smaller NFM_CACHE_GB," if is_full else "delete it,"
        raise StorageError(
            f"{path} in the cache of remote files: {error.strerror}; {action} or {_OTHER_FOLDER}"
        ) from error


@contextmanager
def _open_file(path: Path, flags: int) -> Iterator[int]:
    """An open descriptor of a regular file. A link is not followed, and a pipe does not block. Raises StorageError, or
    FileNotFoundError."""
    with explain_disk_errors(path):
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise StorageError(f"{path} in the cache of remote files: got no regular file; delete it")
        if flags & os.O_RDWR and status.st_nlink > 1:
            raise StorageError(f"{path} in the cache of remote files: got a second name of another file; delete it")
        yield descriptor
    finally:
        os.close(descriptor)


def _describe(status: os.stat_result) -> bytes:
    """What changes when a file or its content does."""
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode()


def _hash_file(descriptor: int) -> str:
    """The sha256 of an open file."""
    num_bytes = os.fstat(descriptor).st_size
    if num_bytes == 0:  # cannot be mapped
        return sha256(b"")
    with mmap.mmap(descriptor, num_bytes, prot=mmap.PROT_READ) as content:
        return sha256(np.frombuffer(content, np.uint8))


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _modified_at(path: Path) -> int:
    """The modification time in ns; 0 if there is no such file."""
    try:
        return os.lstat(path).st_mtime_ns
    except FileNotFoundError:
        return 0


def _is_still_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _unlink(path: Path) -> None:
    """Delete a file or a link, if there is one. A folder is not one of ours, and stays."""
    with suppress(FileNotFoundError, IsADirectoryError):
        path.unlink()
