"""Versions of a store by URL: `URL` is the newest, `URL@v3` version 3, and `URL@name` the one with the tag `name`."""

import re
from typing import Any, NamedTuple

from nfm.storage_specs.format.dataset import parse_dataset
from nfm.storage_specs.format.names import (
    COPY_FILE,
    DATASET_FILE,
    EXPORT_FILE,
    MAX_METADATA_BYTES,
    SPEC_FILE,
    TAGS_FOLDER,
    VERSIONS_FOLDER,
    version_file,
)
from nfm.storage_specs.format.schema import Dataset, Tag
from nfm.storage_specs.storage.documents import parse_json
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import Root

_VERSION = re.compile(r"v([1-9][0-9]{0,6})")
TAG_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_TAG_BYTES = 4096


class OpenedDocument(NamedTuple):
    """The document of one version of a store."""

    root: Root
    path: str  # of the document
    data: bytes
    dataset: Dataset


def split_version(url: str) -> tuple[str, str | None]:
    """The URL of a store, and what follows the last @ of its last component, if that can name a version."""
    base, at, reference = url.rstrip("/").rpartition("@")
    if at and base and not base.endswith("/") and TAG_NAME.fullmatch(reference):
        return base, reference
    return url, None


def check_no_version(url: str, options: dict[str, Any] | None = None) -> None:
    """Raise StoreError if a URL to write to names a version, which never changes, or could be taken for a tag of a
    store beside it."""
    base, reference = split_version(url)
    if reference is None:
        return
    if _VERSION.fullmatch(reference) or (
        Root(base, options).exists(DATASET_FILE) and not Root(url, options).exists(SPEC_FILE)
    ):
        raise StoreError(f"{url}: got a version to write to, which never changes; give {base}, or another folder")


def open_document(url: str, options: dict[str, Any] | None) -> OpenedDocument:
    """Read the document of the version that a URL names. A folder whose own name has an @ is found as well.

    Raises StoreError if there is no such store or version, or if its document is damaged.
    """
    base, reference = split_version(url)
    if reference is not None:
        # In http://host:8000@v1, another library would take v1 for the host, and send it what stands before the @.
        is_at_host = "/" not in base.partition("://")[2] and _VERSION.fullmatch(reference)
        if ("://" in base and is_at_host) or not Root(url, options).exists(DATASET_FILE):
            return _open_reference(Root(base, options), reference)
    root = Root(url, options)
    if not root.exists(DATASET_FILE):
        raise _no_store_error(root)
    return _read_document(root, DATASET_FILE)


def _read_document(root: Root, path: str, read: OpenedDocument | None = None) -> OpenedDocument:
    """Read a document; it is parsed unless it is the one that was `read` before."""
    data = root.read(path, MAX_METADATA_BYTES)
    if read is not None and read.data == data:
        return OpenedDocument(root, path, data, read.dataset)
    return OpenedDocument(root, path, data, parse_dataset(data, f"{root.url}/{path}"))


def _open_reference(root: Root, reference: str) -> OpenedDocument:
    """The document of the version with this number or tag."""
    match = _VERSION.fullmatch(reference)
    if match:
        return _open_version(root, int(match[1]))
    if not root.exists(_tag_file(reference)):
        tags = list_tags(root)
        existing = f"it has {', '.join(tags)}" if tags else "it has no tags"
        raise StoreError(f"{root.url}@{reference}: got a tag that the store does not have; {existing}")
    tag = _read_tag(root, reference)
    opened = _open_version(root, tag.version)
    _check_tag(root, reference, tag, opened.dataset.id)
    return opened


def _tag_file(name: str) -> str:
    return f"{TAGS_FOLDER}/{name}.json"


def _read_tag(root: Root, name: str) -> Tag:
    path = _tag_file(name)
    tag = parse_json(Tag, root.read(path, MAX_TAG_BYTES), f"{root.url}/{path}")
    if not root.exists(version_file(tag.version)):
        raise StoreError(f"{root.url}/{path}: got the tag of version {tag.version}, whose document is missing")
    return tag


def _check_tag(root: Root, name: str, tag: Tag, version_id: str) -> None:
    """Raise StoreError unless the version of a tag has its id."""
    if version_id != tag.id:
        path = _tag_file(name)
        raise StoreError(f"{root.url}/{path}: its id is not that of version {tag.version}; the file is damaged")


class Tags:
    """Which versions the tags of a store name. A version whose id is in `ids`, by number, is not read; those that are
    read are added, so that one with many tags is read once."""

    def __init__(self, root: Root, ids: dict[int, str]) -> None:
        self._root = root
        self._ids = ids

    def version_of(self, name: str) -> int:
        """The number of the version with a tag. Raises StoreError if the tag or the document of the version is
        damaged."""
        tag = _read_tag(self._root, name)
        if tag.version not in self._ids:
            self._ids[tag.version] = _open_version(self._root, tag.version).dataset.id
        _check_tag(self._root, name, tag, self._ids[tag.version])
        return tag.version


def _open_version(root: Root, version: int, read: OpenedDocument | None = None) -> OpenedDocument:
    path = version_file(version)
    if not root.exists(path):
        versions = list_versions(root)
        if not versions and root.exists(DATASET_FILE):
            raise StoreError(f"{root.url}@v{version}: a store of schema 1.0 has no versions; give {root.url}")
        newest = versions[-1] if versions else 0
        existing = f"versions 1 to {newest}" if newest > 1 else "version 1" if newest else "none"
        if version < newest:
            raise StoreError(
                f"{root.url}/{path} is missing, while version {newest} is there: put it back from a copy of the store"
            )
        raise StoreError(f"{root.url}@v{version}: got a version that the store does not have; it has {existing}")
    opened = _read_document(root, path, read)
    if opened.dataset.version != version:
        raise StoreError(f"{root.url}/{path}: got version {opened.dataset.version}; the file is damaged")
    return opened


def _no_store_error(root: Root) -> StoreError:
    """The error for a URL without dataset.json. It names the stores in the subfolders "train" and "val"."""
    splits = [name for name in ("train", "val") if root.exists(f"{name}/{DATASET_FILE}")]
    if splits:
        urls = " or ".join(f"{root.url}/{name}" for name in splits)
        return StoreError(f"{root.url}: got a folder of stores, expected one of them: {urls}")
    if root.exists(COPY_FILE):
        return StoreError(f"{root.url}: no dataset.json: its copy was interrupted; run nfm store copy again")
    if root.exists(EXPORT_FILE):
        return StoreError(f"{root.url}: got tuples that were exported for other readers; nfm reads the store itself")
    if root.exists(SPEC_FILE):
        return StoreError(
            f"{root.url}: no dataset.json: the job that writes the store was interrupted, or nfm store repair took the "
            "file away because blocks must be written again: run nfm encode (or prepare, or store convert) again, with "
            "the same arguments"
        )
    return StoreError(f"{root.url}: no dataset.json, and nothing of a store; expected the URL of a complete one")


def list_versions(root: Root) -> list[int]:
    """The numbers of the versions of a store, in order; none in a store of schema 1.0."""
    matches = (re.fullmatch(r"([0-9]{4,7})\.json", name) for name in root.list_names(VERSIONS_FOLDER))
    numbers = {int(match[1]) for match in matches if match and version_file(int(match[1])).endswith(f"/{match.string}")}
    return sorted(numbers - {0})


def list_documents(root: Root, read: OpenedDocument | None = None) -> list[Dataset]:
    """The documents of all versions of a store up to the newest, in order. Raises StoreError if one is damaged. A later
    one, whose publication was interrupted, is no version yet. One that was `read` before is not parsed again."""
    versions = list_versions(root)
    if root.exists(DATASET_FILE):
        read = _read_document(root, DATASET_FILE, read)
        versions = [version for version in versions if version <= read.dataset.version]
    return [_open_version(root, version, read).dataset for version in versions]


def list_tags(root: Root) -> list[str]:
    """The tags of a store, in order."""
    names = (name.removesuffix(".json") for name in root.list_names(TAGS_FOLDER) if name.endswith(".json"))
    return [name for name in names if TAG_NAME.fullmatch(name)]


def find_version(url: str, content_id: str, options: dict[str, Any] | None = None) -> str:
    """The URL of the newest version of a store whose id is `content_id`; `url` itself if it names a version, or if its
    newest version has that id, or if none has it. Raises StoreError as `open_document` does."""
    opened = open_document(url, options)
    if opened.path != DATASET_FILE or opened.dataset.id == content_id:
        return url
    for version in reversed(list_versions(opened.root)):
        if _open_version(opened.root, version).dataset.id == content_id:
            return f"{opened.root.url}@v{version}"
    return url
