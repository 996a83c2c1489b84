"""Local files below a folder. No link below the folder is followed, to read, write, list or delete: a store may come
from a stranger, and a link in it could lead to any file of the user.

Every component of a path is opened by itself, relative to the one before it, and refused if it is a link. The folder
itself is what the user named, and may be one. Hard links are files like others: nothing tells them from the file that
they were made of, who makes one could have copied it, and files are never written in place. What is mounted below the
folder is part of it: only the administrator mounts.
"""

import errno
import mmap
import os
import posixpath
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nfm.storage_specs.storage.errors import StoreError

MAX_DEPTH = 16  # of folders below one another; a store has at most half of it
_TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{32}\.tmp$")
_SEARCH = os.O_DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY)  # enough to open what is in a folder
_LIST = os.O_DIRECTORY | os.O_RDONLY
_LINK_ERRNOS = (errno.ELOOP, errno.ENOTDIR, errno.EMLINK)  # of opening a link that must not be followed


class LocalFile(NamedTuple):
    """A file: `folder`, and its `path` below it, on which no link is followed."""

    folder: str
    path: str

    def __str__(self) -> str:
        return posixpath.join(self.folder, self.path)


class FileState(NamedTuple):
    """What tells that a local file is still the one that was checked."""

    device: int
    inode: int
    bytes: int
    mtime_ns: int


def is_temporary_file(path: str) -> bool:
    """Whether a file has the name of one that a writer had not finished."""
    return _TEMPORARY_NAME.search(path) is not None


def _open(name: str, flags: int, folder: int, file: LocalFile) -> int:
    """Open `name` in an open folder. Raises StoreError if it is a link, and OSError with the whole path of `file`."""
    try:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=folder)
    except OSError as error:
        if error.errno in _LINK_ERRNOS:
            _refuse_link(name, folder, file)
        raise OSError(error.errno, error.strerror, str(file)) from error


def _refuse_link(name: str, folder: int, file: LocalFile) -> None:
    """Raise StoreError if `name` in an open folder is a link."""
    try:
        target = os.readlink(name, dir_fd=folder)
    except OSError:  # it is none
        return
    advice = "put the file itself there"
    if "blobs/" in target:
        advice = "in the cache of Hugging Face's client all files are links, download the store with --local-dir"
    raise StoreError(f"{file}: {name} is a link, and no link below {file.folder} is followed; {advice}")


@contextmanager
def open_folder(folder: str, path: str = "", flags: int = _SEARCH, create: bool = False) -> Iterator[int]:
    """An open descriptor of the folder at `path` below `folder`; with `create`, folders that are missing are made.

    Raises StoreError at a link, and OSError, such as FileNotFoundError, if there is no folder.
    """
    if create:
        Path(folder).mkdir(parents=True, exist_ok=True)
    components = [component for component in path.split("/") if component]
    descriptor = os.open(folder, (_SEARCH if components else flags) | os.O_CLOEXEC)
    try:
        for number, component in enumerate(components, 1):
            place = LocalFile(folder, "/".join(components[:number]))
            component_flags = flags if number == len(components) else _SEARCH
            try:
                child = _open(component, component_flags, descriptor, place)
            except FileNotFoundError:
                if not create:
                    raise
                with suppress(FileExistsError):  # another writer was faster
                    os.mkdir(component, dir_fd=descriptor)
                child = _open(component, component_flags, descriptor, place)
            os.close(descriptor)
            descriptor = child
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def open_regular_file(file: LocalFile) -> Iterator[tuple[int, FileState]]:
    """An open descriptor, for reading, and the state of a file.

    Raises StoreError at a link, and OSError if there is no file or no regular one: in a store of another team, a pipe
    would block for ever and a device never end.
    """
    parent, name = posixpath.split(file.path)
    with open_folder(file.folder, parent) as folder:
        descriptor = _open(name, os.O_RDONLY | os.O_NONBLOCK, folder, file)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(file))
        yield descriptor, FileState(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    finally:
        os.close(descriptor)


def map_file(file: LocalFile) -> NDArray[np.uint8]:
    """The bytes of a file as a read-only memory map, (size,). Raises as `open_regular_file` does."""
    with open_regular_file(file) as (descriptor, state):
        if state.bytes == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype=np.uint8)
        return np.frombuffer(mmap.mmap(descriptor, state.bytes, prot=mmap.PROT_READ), np.uint8)


def read_range(file: LocalFile, start: int, end: int) -> bytes:
    """Bytes `start` (inclusive) to `end` (exclusive) of a file, or fewer where it ends before. Raises as
    `open_regular_file` does."""
    with open_regular_file(file) as (descriptor, state), os.fdopen(descriptor, "rb", closefd=False) as opened:
        opened.seek(start)
        return opened.read(max(0, min(end, state.bytes) - start))


def find_status(file: LocalFile) -> os.stat_result | None:
    """The status of a file or folder; None if there is none. Raises StoreError at a link, and another OSError if the
    file system refuses."""
    parent, name = posixpath.split(file.path)
    try:
        with open_folder(file.folder, parent) as folder:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                _refuse_link(name, folder, file)
            return status
    except (FileNotFoundError, NotADirectoryError):
        return None


def list_folder(folder: str, path: str) -> list[str]:
    """The names of what is directly in a folder. Raises as `open_folder` does."""
    with open_folder(folder, path, _LIST) as descriptor:
        return os.listdir(descriptor)


def list_files(folder: str) -> Iterator[tuple[str, int]]:
    """Path and size in bytes of every regular file below `folder`, without what links lead to, and without what is in
    folders that may not be read; none if there is no such folder. Raises StoreError at one that is nested more than
    MAX_DEPTH deep."""
    remaining = [""]
    while remaining:
        path = remaining.pop()
        if path.count("/") >= MAX_DEPTH:
            raise StoreError(
                f"{folder}: got folders that are nested more than {MAX_DEPTH} deep ({path[:40]}…), which no store has; "
                "move them away"
            )
        refusal = (FileNotFoundError, PermissionError) if path else (FileNotFoundError,)
        with suppress(*refusal), open_folder(folder, path, _LIST) as descriptor, os.scandir(descriptor) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # deleted since it was listed
                    if entry.is_file(follow_symlinks=False):
                        yield posixpath.join(path, entry.name), entry.stat(follow_symlinks=False).st_size
                    elif entry.is_dir(follow_symlinks=False):
                        remaining.append(posixpath.join(path, entry.name))


def write_file(file: LocalFile, data: bytes) -> None:
    """Write and flush a temporary file, give it its final name, and flush its folder; folders that are missing are
    made. A link that has the final name is replaced, and what it leads to stays.

    Raises StoreError at a link to a folder, and OSError with the path of the file, such as when the disk is full; then
    the file is what it was before.
    """
    parent, name = posixpath.split(file.path)
    temporary = f"{name}.{uuid.uuid4().hex}.tmp"
    try:
        with open_folder(file.folder, parent, _LIST, create=True) as folder:
            try:
                descriptor = _open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, folder, file)
                with os.fdopen(descriptor, "wb") as opened:
                    opened.write(data)
                    opened.flush()
                    os.fsync(descriptor)
                os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)
            os.fsync(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


def delete_file(file: LocalFile) -> None:
    """Delete a file, or a link that has its name. Raises FileNotFoundError if there is none, and StoreError at a link
    to a folder."""
    parent, name = posixpath.split(file.path)
    with open_folder(file.folder, parent) as folder:
        try:
            os.unlink(name, dir_fd=folder)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from error
