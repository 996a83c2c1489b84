"""What a folder that is to be written holds already: a store, a copy or an export that has begun, or none of these."""

from pathlib import Path

from nfm.storage_specs.format.names import (
    COMMITS_FOLDER,
    COPY_FILE,
    DATASET_FILE,
    EXPORT_FILE,
    LEASE_FILE,
    MAX_METADATA_BYTES,
    SPEC_FILE,
    Z_SCALE_FILE,
)
from nfm.storage_specs.storage.documents import canonical_json
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import Root
from nfm.storage_specs.storage.local import is_temporary_file

_CLAIMS = {
    DATASET_FILE: "a complete store",
    SPEC_FILE: "a store that is being written",
    COPY_FILE: "an unfinished copy of a store",
    EXPORT_FILE: "tuples that were exported from a store",
}
_BEFORE_A_CLAIM = {Z_SCALE_FILE, LEASE_FILE}  # what a writer that is killed at its start may leave


def check_unclaimed(root: Root) -> None:
    """Raise StoreError if a folder holds something of these, or any other file that is not hidden, or if on a local
    disk it lies inside a store: what is written there could not be told from what was there before."""
    for path, description in _CLAIMS.items():
        if root.exists(path):
            raise StoreError(f"{root.url}: holds {description} ({path}); write to another URL, or delete it first")
    names = set(root.list_names("")) - {COMMITS_FOLDER}
    names |= {f"{COMMITS_FOLDER}/{name}" for name in root.list_names(COMMITS_FOLDER)}
    foreign = sorted(name for name in names - _BEFORE_A_CLAIM if not (name.startswith(".") or is_temporary_file(name)))
    if foreign:
        listed = foreign[0] if len(foreign) == 1 else f"{foreign[0]} and {len(foreign) - 1} more"
        raise StoreError(f"{root.url}: holds {listed}; expected an empty folder, or none: write to another URL")
    if root.local:
        for folder in Path(root.path).resolve().parents:
            if any((folder / path).exists() for path in _CLAIMS):
                raise StoreError(f"{root.url}: lies inside {folder}, which holds a store; write to another URL")


def check_output(root: Root) -> None:
    """Raise StoreError if a folder holds something else than a store, complete or not."""
    if not (root.exists(DATASET_FILE) or root.exists(SPEC_FILE)):
        check_unclaimed(root)


def claim(root: Root, path: str, store_id: str) -> None:
    """Note in the file `path` that a folder will hold a copy or an export of a store, if an earlier call did not: then
    what else the folder holds came with that. Raises StoreError if it holds anything else, or that of another store."""
    content = canonical_json({"of": store_id})
    if not root.exists(path):
        check_unclaimed(root)
        root.write(path, content)
    elif root.read(path, MAX_METADATA_BYTES) != content:
        raise StoreError(f"{root.url}: holds {_CLAIMS[path]}, another one; write to another URL, or delete it first")
