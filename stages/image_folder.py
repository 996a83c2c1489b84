"""A user's image folder: the images in `<class>/`, and what lies beside them and is none."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from nfm.stages.errors import StageError
from nfm.stages.image_files import SUFFIXES
from nfm.stages.progress import Progress, print_line
from nfm.storage_specs.format.image_names import MAX_NAME_BYTES

MAX_NAMED = 20  # classes that an error message names
# What operating systems write into folders. Names that begin with a dot are hidden, as those of the companions
# `._name.jpg` that macOS writes.
_SYSTEM_NAMES = {
    "__MACOSX",
    "@eaDir",
    "lost+found",
    "$RECYCLE.BIN",
    "System Volume Information",
    "Thumbs.db",
    "desktop.ini",
}
_HIDDEN = "hidden, or written by the system"
_OUTSIDE = "files outside class folders"
_SUFFIX = f"files not named {', '.join(SUFFIXES)}"
_EXPECTED = f"{', '.join(SUFFIXES)} files directly in it"
_NESTED = "folders inside class folders"
_SPECIAL = "links to nothing, pipes, devices"


class ImageFile(NamedTuple):
    """A file that should be an image."""

    path: Path
    name: str  # <class>/<file>
    label: int
    bytes: int


class ImageFolder(NamedTuple):
    """The names of classes, in the order of labels, and the files, in the order of labels and names."""

    class_names: list[str]
    files: list[ImageFile]


class _Ignored:
    """What is left out of a listing: the number and the first name of each kind."""

    def __init__(self) -> None:
        self.kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, name: str) -> None:
        count, first = self.kinds.get(kind, (0, name))
        self.kinds[kind] = (count + 1, first)

    def print(self, path: Path) -> None:
        """Print what was ignored, if anything was, as one line on stderr."""
        parts = [
            f"{kind}: {count} ({first}{', …' if count > 1 else ''})" for kind, (count, first) in self.kinds.items()
        ]
        if parts:
            print_line(f"note: ignored in {path}: {'; '.join(parts)}")


def list_images(path: Path) -> ImageFolder:
    """The images in a folder that has one folder for each class. What else it holds is counted on stderr.

    Names are as in `utf8_name`. Raises StageError if the folder is missing, has no classes, one without images, or two
    of one name.
    """
    if not path.is_dir():
        raise StageError(f"{path}: no such folder; expected one folder per class in it, with images")
    ignored = _Ignored()
    files: list[ImageFile] = []
    with Progress(f"list {path}") as progress:
        folders = []
        for entry in _scan(path, lambda entry: entry.name, ignored):
            kind = _kind(entry)
            if kind == "folder":
                folders.append(entry)
            else:
                ignored.add(_OUTSIDE if kind == "file" else _SPECIAL, entry.name)
        class_names = [utf8_name(folder.name) for folder in folders]
        for label, (folder, class_name) in enumerate(zip(folders, class_names, strict=True)):
            files += _list_class(Path(folder.path), class_name, label, ignored)
            progress.set_note(f"{len(files)} images")
    ignored.print(path)
    _check_listing(path, class_names, files)
    return ImageFolder(class_names, files)


def _scan(folder: Path, name_of: Callable[[os.DirEntry[str]], str], ignored: _Ignored) -> list[os.DirEntry[str]]:
    """What lies in a folder and is not hidden, in the order of names."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    visible = []
    for entry in found:
        if entry.name.startswith(".") or entry.name in _SYSTEM_NAMES:
            ignored.add(_HIDDEN, name_of(entry))
        else:
            visible.append(entry)
    return visible


def _kind(entry: os.DirEntry[str]) -> Literal["folder", "file", "special"]:
    """What an entry is, or what the link leads to that it is."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "special"
    except OSError:  # a link that leads to itself
        return "special"


def _list_class(folder: Path, class_name: str, label: int, ignored: _Ignored) -> list[ImageFile]:
    """The images directly in the folder of a class."""

    def name_of(entry: os.DirEntry[str]) -> str:
        return f"{class_name}/{utf8_name(entry.name)}"

    files = []
    for entry in _scan(folder, name_of, ignored):
        name, kind = name_of(entry), _kind(entry)
        if kind == "folder":
            ignored.add(_NESTED, name)
        elif kind == "special":
            ignored.add(_SPECIAL, name)
        elif not entry.name.lower().endswith(SUFFIXES):
            ignored.add(_SUFFIX, name)
        elif len(name.encode()) > MAX_NAME_BYTES:
            raise StageError(f"{name}: got a name of {len(name.encode())} bytes; expected at most {MAX_NAME_BYTES}")
        else:
            files.append(ImageFile(Path(entry.path), name, label, entry.stat().st_size))
    return files


def _check_listing(path: Path, class_names: list[str], files: list[ImageFile]) -> None:
    """Raise StageError if there are no classes, one without images, or two of one name."""
    if not class_names:
        raise StageError(f"{path}: got no class folders; expected one for each class, with {_EXPECTED}")
    check_classes_have_images(path, class_names, (file.label for file in files))
    for names in (class_names, [file.name for file in files]):
        name, count = Counter(names).most_common(1)[0]
        if count > 1:
            raise StageError(f"{path}: got {count} names that read {name!r} as UTF-8; rename all but one")


def check_classes_have_images(path: Path, class_names: list[str], labels: Iterable[int]) -> None:
    """Raise StageError unless each class has an image: one that has none could be sampled, and was never trained."""
    used = set(labels)
    empty = [name for label, name in enumerate(class_names) if label not in used]
    if empty:
        named = ", ".join(empty[:MAX_NAMED]) + (f" and {len(empty) - MAX_NAMED} more" if len(empty) > MAX_NAMED else "")
        raise StageError(
            f"{path}: got no images in {len(empty)} of {len(class_names)} classes ({named}); "
            f"expected {_EXPECTED}: remove the folder of a class that has none"
        )


def print_unused(path: Path, used: Collection[str]) -> None:
    """Print, as one line on stderr, what lies in a folder beside the entries that are `used`, if anything."""
    ignored = _Ignored()
    others = [entry for entry in _scan(path, lambda entry: entry.name, ignored) if entry.name not in used]
    for entry in others:
        ignored.add("beside " + " and ".join(used), entry.name)
    ignored.print(path)


def utf8_name(name: str) -> str:
    """A file name as the operating system gives it, with `\\xNN` in place of bytes that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")
