"""Files of a fuzzed folder: kept in memory while they are changed, written to a disk, and compared with what is there
afterwards."""

import os
import shutil
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

OUTSIDE = "OUTSIDE"  # first part of the target of a link: the folder beside the fuzzed one, which nobody may touch
SECRET = b"a secret that lies outside of every store"
MAX_SEARCHED_BYTES = 1 << 20  # of a file in which the secret is searched; sparse ones are larger


@dataclass(frozen=True)
class Link:
    """A symbolic link, to a path below OUTSIDE, or to any other target as it is."""

    target: str


@dataclass(frozen=True)
class HardLink:
    """A second name of a file below OUTSIDE."""

    target: str


@dataclass(frozen=True)
class Sparse:
    """A file of zeros that takes no room on the disk."""

    size: int


@dataclass(frozen=True)
class Special:
    """A "pipe", a "socket" or a "folder"."""

    kind: str


Entry = bytes | Link | HardLink | Sparse | Special
Files = dict[str, Entry]  # by path
Snapshot = dict[str, tuple[int, ...]]


def read_files(root: Path) -> Files:
    """All files of a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def write_files(files: Files, root: Path, outside: Path) -> None:
    """Write files to a new folder. What lies below the path of a link or a file cannot be written and is left out."""
    root.mkdir()
    for path, entry in sorted(files.items()):
        place = root / path
        if any(isinstance(files.get(str(parent)), bytes | Link | HardLink | Sparse) for parent in Path(path).parents):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir():  # its files were written before
            continue
        _write_entry(entry, place, outside)


def _write_entry(entry: Entry, place: Path, outside: Path) -> None:
    if isinstance(entry, bytes):
        place.write_bytes(entry)
    elif isinstance(entry, Link):
        place.symlink_to(entry.target.replace(OUTSIDE, str(outside), 1))
    elif isinstance(entry, HardLink):
        target = outside / entry.target.removeprefix(f"{OUTSIDE}/")
        place.hardlink_to(target if target.is_file() else outside / "secret")
    elif isinstance(entry, Sparse):
        place.touch()
        os.truncate(place, entry.size)
    elif entry.kind == "pipe":
        os.mkfifo(place)
    elif entry.kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            folder = os.open(place.parent, os.O_RDONLY)  # the address of a socket must be short
            try:
                listener.bind(f"/proc/self/fd/{folder}/{place.name}")
            finally:
                os.close(folder)
    else:
        place.mkdir()


def change_files(root: Path, before: Files, after: Files, outside: Path) -> None:
    """Make a folder that holds the files `before` hold those `after`, and leave all others as they are."""
    for path in before.keys() - after.keys():
        (root / path).unlink()
    for path, entry in sorted(after.items()):
        if before.get(path) == entry:
            continue
        place = root / path
        place.unlink(missing_ok=True)
        if place.is_dir():  # an emptied folder, in whose place something else lies
            shutil.rmtree(place)
        if place.parent.is_dir() and not place.parent.is_symlink():
            _write_entry(entry, place, outside)


def write_outside(outside: Path, files: Files) -> None:
    """Write what lies beside a fuzzed folder: a secret, and the files of the sound folder, to which links may lead."""
    write_files({path: data for path, data in files.items() if isinstance(data, bytes)}, outside, outside)
    (outside / "secret").write_bytes(SECRET)


def snapshot(root: Path) -> Snapshot:
    """What every path in a folder is: its type and mode, inode, size, and time of the last change. No link is
    followed."""
    found: Snapshot = {}
    waiting = [str(root)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                is_folder = stat.S_ISDIR(status.st_mode)
                changed = (0, 0) if is_folder else (status.st_size, status.st_mtime_ns)
                found[entry.path] = (status.st_mode, status.st_ino, *changed)
                if is_folder:
                    waiting.append(entry.path)
    return found


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """The paths at which two snapshots differ."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def files_with_secret(root: Path) -> list[str]:
    """The files of a folder that hold the secret; those behind links and second names do not count."""
    found = []
    for folder, _, names in os.walk(root):
        for path in (Path(folder, name) for name in names):
            status = path.lstat()
            is_own = stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size <= MAX_SEARCHED_BYTES
            if is_own and SECRET in path.read_bytes():
                found.append(str(path.relative_to(root)))
    return found
