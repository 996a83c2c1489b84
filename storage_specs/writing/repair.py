"""Repair of a damaged store: documents are written again, and damaged blocks marked for the command that wrote them."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from nfm.storage_specs.format.dataset import is_1_0
from nfm.storage_specs.format.manifest import FileKey
from nfm.storage_specs.format.names import (
    DATASET_FILE,
    LEASE_FILE,
    SPEC_FILE,
    TAGS_FOLDER,
    Z_SCALE_FILE,
)
from nfm.storage_specs.format.schema import Spec, Tag
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.verify import Fault, find_document_faults, find_faults, find_stray_files
from nfm.storage_specs.reading.versions import MAX_TAG_BYTES, list_tags, split_version
from nfm.storage_specs.storage.documents import parse_json
from nfm.storage_specs.storage.errors import StorageError, StoreError, UnsupportedError
from nfm.storage_specs.storage.files import Root
from nfm.storage_specs.storage.lease import Lease
from nfm.storage_specs.storage.messages import count
from nfm.storage_specs.writing import units
from nfm.storage_specs.writing.publish import (
    list_readable_versions,
    read_newest_version,
    restore_cards,
    restore_newest_version,
)
from nfm.storage_specs.writing.units import list_committed_units
from nfm.storage_specs.writing.writer import StoreWriter, read_started_spec

Progress = Callable[[int], None]  # is called with the number of bytes that were just read


class RepairedStore(NamedTuple):
    """What `repair_store` found and did."""

    faults: list[str]  # one sentence each
    damaged_blocks: list[int]  # that must be written again
    is_complete: bool  # whether the store is whole again; else the command that wrote it must run again


def repair_store(url: str, progress: Progress, options: dict[str, Any] | None = None) -> RepairedStore:
    """Mend a damaged store as far as its commit records allow, and prepare the rest for the command that wrote it.

    If only documents are damaged, of any version, they are written again. If files of columns are damaged or missing,
    the commit records of their units are deleted, and dataset.json, so that the command writes exactly these again.
    Damaged tags are deleted. `progress` gets the bytes that were read.

    Raises StoreError if the store cannot be repaired (it has no commit records, its z_scale.npy is damaged, it is of
    schema 1.0, or something is lost that nothing else says) or is being written, and StorageError if storage cannot be
    read.
    """
    if split_version(url)[1] is not None and not Root(url, options).exists(DATASET_FILE):
        raise StoreError(f"{url}: got a version; repair {split_version(url)[0]}, the newest")
    root = Root(url, options)
    store = None
    try:
        store = Store(url, options=options)
        faults = list(find_faults(store, progress))
    except (StorageError, UnsupportedError):
        raise
    except StoreError as error:
        if not root.exists(DATASET_FILE):
            raise
        faults = [Fault(DATASET_FILE, str(error))]
    if not faults:
        return RepairedStore([], [], is_complete=True)
    spec = _check_repairable(root, store, faults, options)
    with Lease(url, LEASE_FILE, options):
        return _repair(root, store, spec, faults, options)


def _check_repairable(root: Root, store: Store | None, faults: list[Fault], options: dict[str, Any] | None) -> Spec:
    """The spec that the store was started with. Raises StoreError if it cannot be repaired."""
    if store is not None and is_1_0(store.dataset):
        raise StoreError(
            f"{_summary(faults)}. A store of schema 1.0 is not repaired: nfm store convert {root.url} NEW --layout … "
            "writes its sound blocks as schema 1.1, and the command that wrote it, with --out NEW, completes them there"
        )
    if not root.exists(SPEC_FILE):
        raise StoreError(
            f"{_summary(faults)}. {root.url} has no commit records, without which it cannot be repaired; "
            "copy it again from its source"
        )
    for fault in faults:
        if fault.file == Z_SCALE_FILE:
            raise StoreError(
                f"{fault.message}. No commit record holds its values, so {root.url} cannot be repaired; "
                "copy it again from its source"
            )
    spec = read_started_spec(root.url, options)
    assert spec is not None
    return spec


def _summary(faults: list[Fault]) -> str:
    """The first fault, and how many there are beside it."""
    rest = len(faults) - 1
    return faults[0].message + (f" (and {count(rest, 'more fault')})" if rest else "")


def _repair(
    root: Root, store: Store | None, spec: Spec, faults: list[Fault], options: dict[str, Any] | None
) -> RepairedStore:
    damaged_files = {fault.file for fault in faults if isinstance(fault.file, FileKey)}
    damaged_blocks = {key.block for key in damaged_files}
    messages = [fault.message for fault in faults]
    contradictions = [] if store is None or damaged_files else _list_contradictions(store, faults)
    # What only commit records name, or name with another sha256 than the manifest, was not compared yet; if the
    # documents are damaged, no file was.
    checked = {key: record.sha256 for key, record in store.files.items()} if store is not None else {}
    for unit in list_committed_units(root, spec):
        other_faults = units.find_faults(root, spec, unit, checked)
        messages += other_faults
        if other_faults or any(unit.contains(key) for key in damaged_files):
            damaged_blocks.add(unit.block)
            with suppress(FileNotFoundError):  # of another repair
                root.delete(unit.commit_file)
    if store is not None:
        restore_newest_version(store)
    messages += _delete_damaged_tags(root)
    newest = read_newest_version(root)
    spec = store.spec if store is not None else spec
    writer = StoreWriter(root.url, spec, options)
    if newest is None or writer.list_missing_units():
        # Deleted last: after an interruption that deleted only dataset.json, the next run would see all units committed
        # and finalize the damaged store.
        root.delete(DATASET_FILE)
        return RepairedStore(messages, sorted(damaged_blocks), is_complete=False)
    if store is not None and not contradictions:
        restore_cards(store)
        writer.check_commits(store)
    writer.finalize(is_repair=True)
    repaired = Store(root.url, options=options)
    if store is None and (faults_of_files := list(find_faults(repaired))):  # their records agree with wrong files
        result = _repair(root, repaired, spec, faults_of_files, options)
        return result._replace(faults=messages + result.faults)
    if contradictions and (remaining := list(find_faults(repaired))):
        raise StoreError(
            f"{_summary(remaining)}. The commit records say the same, so nothing tells which block is wrong; "
            "copy the store again from its source, or write it again to another URL"
        )
    lost = find_document_faults(repaired)
    if lost:
        raise StoreError(
            f"{_summary(lost)}. All else is repaired. Nothing else says what this was: "
            "put the file there from a copy of the store, by hand"
        )
    stray = list(find_stray_files(repaired))
    if stray:
        raise StoreError(f"{_summary(stray)}. Nothing else is wrong any more")
    return RepairedStore(messages, [], is_complete=True)


def _delete_damaged_tags(root: Root) -> list[str]:
    """Delete the tags that name no version any more: those that cannot be read, or whose version has another id. One
    whose version is lost stays. Returns a sentence on each."""
    ids = {dataset.version: dataset.id for dataset in list_readable_versions(root)}
    sentences = []
    for name in list_tags(root):
        path = f"{TAGS_FOLDER}/{name}.json"
        try:
            tag = parse_json(Tag, root.read(path, MAX_TAG_BYTES), f"{root.url}/{path}")
        except StorageError:
            raise
        except StoreError:
            tag = None
        if tag is None or ids.get(tag.version, tag.id) != tag.id:
            root.delete(path)
            sentences.append(f"{root.url}/{path}: the tag named no version and is removed; nfm store tag sets it again")
    return sentences


def _list_contradictions(store: Store, faults: list[Fault]) -> list[Fault]:
    """The faults of files that are as their documents say: values that do not follow from each other."""
    explained = {fault.file for fault in [*find_document_faults(store), *find_stray_files(store)]}
    return [fault for fault in faults if fault.file not in explained]
