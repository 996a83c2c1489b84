"""What a folder that is to be written holds already: a store, a copy or an export that has begun, or none of these."""

from nfm.storage_specs.format.names import COPY_FILE, DATASET_FILE, EXPORT_FILE, MAX_METADATA_BYTES, SPEC_FILE
from nfm.storage_specs.storage.documents import canonical_json
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import Root

_CLAIMS = {
    DATASET_FILE: "a complete store",
    SPEC_FILE: "a store that is being written",
    COPY_FILE: "an unfinished copy of a store",
    EXPORT_FILE: "tuples that were exported from a store",
}


def check_unclaimed(root: Root) -> None:
    """Raise StoreError if a folder holds something of these."""
    for path, description in _CLAIMS.items():
        if root.exists(path):
            raise StoreError(f"{root.url}: holds {description} ({path}); write to another URL, or delete it first")


def claim(root: Root, path: str, store_id: str) -> None:
    """Note in the file `path` that a folder will hold a copy or an export of a store, if an earlier call did not: then
    what else the folder holds came with that. Raises StoreError if it holds anything else, or that of another store."""
    content = canonical_json({"of": store_id})
    if not root.exists(path):
        check_unclaimed(root)
        root.write(path, content)
    elif root.read(path, MAX_METADATA_BYTES) != content:
        raise StoreError(f"{root.url}: holds {_CLAIMS[path]}, another one; write to another URL, or delete it first")
