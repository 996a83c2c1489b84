"""Whole stores to another place or layout: convert and copy. The export of tuples is in tuples.py."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from nfm.storage_specs.format.dataset import is_1_0, max_document_bytes, parse_dataset
from nfm.storage_specs.format.manifest import FileKey
from nfm.storage_specs.format.names import (
    COPY_FILE,
    COST_FILE,
    CROISSANT_FILE,
    DATASET_FILE,
    LEASE_FILE,
    MAX_METADATA_BYTES,
    README_FILE,
    SIGMA_F_NAME,
    SPEC_FILE,
    TAGS_FOLDER,
    Z_SCALE_FILE,
    version_file,
)
from nfm.storage_specs.format.schema import Dataset, LayoutName
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.verify import find_document_faults
from nfm.storage_specs.reading.versions import MAX_TAG_BYTES, Tags, check_no_version, list_tags
from nfm.storage_specs.storage.documents import canonical_json
from nfm.storage_specs.storage.errors import StorageError, StoreError
from nfm.storage_specs.storage.files import IO_THREADS, Root, sha256
from nfm.storage_specs.storage.lease import Lease
from nfm.storage_specs.storage.messages import list_numbers
from nfm.storage_specs.writing import units
from nfm.storage_specs.writing.claims import check_unclaimed, claim
from nfm.storage_specs.writing.units import Unit, list_committed_units
from nfm.storage_specs.writing.writer import StoreWriter, read_started

Progress = Callable[[int], None]  # is called with the number of bytes or rows that were just completed
MAX_CHECKS = 3  # of what was written; if files are damaged at each, the storage seems to lose written data


def convert_store(
    store: Store, out: str, layout: LayoutName, progress: Progress, options: dict[str, Any] | None
) -> Dataset:
    """Write the values of `store` in another layout to the URL `out`, in the newest schema.

    Totals and cost stay the same, so converting back gives the same bytes. The sha256 of every source file is checked,
    and everything that was written, by this call or before, is read back. If it was interrupted, the same call
    continues. `progress` gets the rows that are written, and again those that are read back. Raises StoreError if
    layout and schema are the same, if the source is damaged (sound blocks are written all the same), if `out` holds
    another store, or if the storage loses what was written.
    """
    if layout == store.spec.layout and not is_1_0(store.dataset):
        raise StoreError(f"{store.url}: the store already has layout {layout}; to duplicate it, use `nfm store copy`")
    spec = store.spec.model_copy(update={"layout": layout})
    writer = StoreWriter(out, spec, options)
    if writer.root.path == store.root.path:
        raise StoreError(f"{out}: got the store itself as output; expected another URL")
    if read_started(writer.root) is None:
        check_unclaimed(writer.root)  # before the lease, which makes a folder
    with Lease(out, LEASE_FILE, options):
        writer.initialize(store.z_scale if spec.coupling else None, converted_from=store.dataset.id)
        missing_units = writer.list_missing_units()
        progress(spec.rows - sum(spec.rows_of(unit.block) for unit in missing_units))
        for _ in range(MAX_CHECKS):
            _convert_units(store, writer, missing_units, progress)
            missing_units = writer.read_back(progress)
            if not missing_units:
                return writer.finalize(store.cost, inherited=store.dataset.attribution)
        raise _untrusted_storage_error(out)


def _convert_units(store: Store, writer: StoreWriter, missing_units: list[Unit], progress: Progress) -> None:
    """Write units from the values of `store`. Raises StoreError at the end if some could not be read."""
    spec = writer.spec
    damaged: dict[int, StoreError] = {}
    for unit in missing_units:
        try:
            _convert_unit(store, writer, unit)
        except StorageError:
            raise
        except StoreError as error:
            damaged[unit.block] = error
        progress(spec.rows_of(unit.block))
    if damaged:
        raise StoreError(
            f"{next(iter(damaged.values()))} (damaged blocks: {list_numbers(damaged)}; all others are written. "
            f"To complete the store, run the command that wrote the source with --layout {spec.layout} --out "
            f"{writer.root.url})"
        )


def _convert_unit(store: Store, writer: StoreWriter, unit: Unit) -> None:
    spec = writer.spec
    base = {name: store.column(name, unit.block) for name in (*spec.image_columns, "label")}
    store.column("index", unit.block)  # is written by its rows; a damaged file of it is refused like all others
    unit_writer = writer.unit_writer(unit, base.pop("label"))
    unit_writer.write_base(base, store.image_names_of(unit.block))
    for draw in unit.draws:
        z = np.ascontiguousarray(store.column("z", unit.block, draw))
        noise = store.column("noise", unit.block, draw) if "noise" in spec.draw_columns else None
        squared_error = store.files[FileKey("z", unit.block, draw)].squared_error
        assert squared_error is not None
        unit_writer.write_stored_draw(draw, z, noise, squared_error)
    unit_writer.commit()


def copy_store(store: Store, out: str, progress: Progress, options: dict[str, Any] | None) -> int:
    """Copy all files of a version of a store to the URL `out`, with its commit records, and the documents and tags of
    the versions up to it. Returns how many files of columns were written.

    The copy is the version that was opened, also if the source gets a newer one meanwhile. Files that exist there with
    the right size are kept at first; at the end all files are read back, and those with wrong bytes are written again.
    Only then commit records and dataset.json are written, as they tell others that the files can be trusted. If it was
    interrupted, the same call continues. `progress` gets the bytes of each file of a column twice: when it is in `out`,
    written by this call or before, and when it was read back. Raises StoreError if the source is damaged, if `out`
    holds something else, or if the storage returns other bytes than were written.
    """
    check_no_version(out, options)
    faults = find_document_faults(store)
    if faults:
        raise StoreError(f"{faults[0].message} (nothing was copied; nfm store repair mends it, or says what does)")
    target = Root(out, options)
    _claim_copy(store, target, options)

    def copy_file(key: FileKey) -> None:
        record = store.files[key]
        data = store.root.read(record.path, record.bytes)
        if sha256(data) != record.sha256:
            raise StoreError(f"{store.url}/{record.path}: its sha256 is not the one in the manifest; repair it first")
        target.write(record.path, data)

    def copy_missing_file(key: FileKey) -> None:
        copy_file(key)
        progress(store.files[key].bytes)

    def write_document(path: str, data: bytes) -> None:
        target.write(path, data)
        if target.read(path, len(data)) != data:
            raise _untrusted_storage_error(f"{out}/{path}")

    existing = target.list_file_sizes()
    missing = [key for key, record in store.files.items() if existing.get(record.path) != record.bytes]
    progress(store.dataset.totals.bytes - sum(store.files[key].bytes for key in missing))
    with ThreadPoolExecutor(IO_THREADS, "nfm-copy") as pool:
        list(pool.map(copy_missing_file, missing))
        damaged = _list_bad_copies(store, target, list(store.files), progress, pool)
        list(pool.map(copy_file, damaged))
        still_damaged = _list_bad_copies(store, target, damaged, lambda _bytes: None, pool)
        if still_damaged:
            raise _untrusted_storage_error(f"{out}/{store.files[still_damaged[0]].path}")
        for path, data in _read_documents(store):
            write_document(path, data)
    write_document(DATASET_FILE, store.document)
    if target.exists(COPY_FILE):
        target.delete(COPY_FILE)
    target.delete_temporary_files(keep=LEASE_FILE)
    return len(missing) + len(damaged)


def _untrusted_storage_error(path: str) -> StoreError:
    return StoreError(f"{path}: got other bytes than were written; the storage is not to be trusted")


def _list_bad_copies(
    store: Store, target: Root, keys: list[FileKey], progress: Progress, pool: ThreadPoolExecutor
) -> list[FileKey]:
    """Those of the files `keys` whose sha256 in `target` is not the one in the manifest; all of them are read."""

    def is_intact(key: FileKey) -> bool:
        record = store.files[key]
        data = target.read(record.path, record.bytes)
        progress(record.bytes)
        return sha256(data) == record.sha256

    return [key for key, intact in zip(keys, pool.map(is_intact, keys), strict=True) if not intact]


def _read_documents(store: Store) -> Iterator[tuple[str, bytes]]:
    """Path and content of every file of a store that is to be copied, beside those of columns and dataset.json. What
    has a hash is checked against it, as the source may have changed since it was opened."""
    yield from store.layout.metadata_files(store.spec).items()
    scale_bytes = max_document_bytes(store.dataset)["sigma_f"]
    if store.spec.coupling is not None:
        if store.spec.nfm.z_scale_sha256:
            yield Z_SCALE_FILE, store.read_document(Z_SCALE_FILE, store.spec.nfm.z_scale_sha256, scale_bytes)
        if store.cost:
            yield COST_FILE, canonical_json(store.cost.model_dump(mode="json"))
    if is_1_0(store.dataset):
        yield store.dataset.documents.manifest.path, store.manifest
        if store.dataset.documents.sigma_f is not None:
            digest = store.dataset.documents.sigma_f.sha256
            yield SIGMA_F_NAME, store.read_document(SIGMA_F_NAME, digest, scale_bytes)
        for path in (README_FILE, CROISSANT_FILE):
            yield path, store.root.read(path, MAX_METADATA_BYTES)
        return
    yield from _read_commits(store)
    copied: set[str] = set()
    for version in range(1, store.dataset.version + 1):
        path = version_file(version)
        is_opened = version == store.dataset.version
        data = store.document if is_opened else store.root.read(path, MAX_METADATA_BYTES)
        dataset = parse_dataset(data, f"{store.url}/{path}")
        max_bytes = max_document_bytes(dataset)
        for name, file in dataset.documents.by_name().items():
            if file.path not in copied:
                copied.add(file.path)
                yield file.path, store.read_document(file.path, file.sha256, max_bytes[name])
            if is_opened and name in ("readme", "croissant"):
                root_path = README_FILE if name == "readme" else CROISSANT_FILE
                yield root_path, store.read_document(file.path, file.sha256, max_bytes[name])
        yield path, data
    version_of = Tags(store.root, {store.dataset.version: store.dataset.id}).version_of
    for tag in list_tags(store.root):
        path = f"{TAGS_FOLDER}/{tag}.json"
        if version_of(tag) <= store.dataset.version:
            yield path, store.root.read(path, MAX_TAG_BYTES)


def _read_commits(store: Store) -> Iterator[tuple[str, bytes]]:
    """spec.json, and the files of the commit records of a store, the records last; nothing if the store itself was
    copied without them."""
    if not store.root.exists(SPEC_FILE):
        return
    started = read_started(store.root)
    assert started is not None
    started = started.model_copy(update={"spec": store.spec})  # a driver may be adding draws
    yield SPEC_FILE, canonical_json(started.model_dump(mode="json"))
    for unit in list_committed_units(store.root, store.spec):
        commit = units.read_commit(store.root, store.spec, unit)
        for record in commit.files:
            copied = store.files.get(FileKey(record.column, record.block, record.draw))
            if copied is not None and copied.sha256 != record.sha256:
                raise StoreError(
                    f"{store.url}/{unit.commit_file}: it is not of version {store.dataset.version}; the store was "
                    "repaired meanwhile, run the same command again"
                )
            if copied is None:
                yield record.path, store.read_document(record.path, record.sha256, record.bytes)
        yield unit.commit_file, store.root.read(unit.commit_file, units.MAX_COMMIT_BYTES)


def _claim_copy(store: Store, target: Root, options: dict[str, Any] | None) -> None:
    """Note in `target` that it will be a copy of `store`. Raises StoreError if it holds anything else; a complete copy
    of the same version may be checked again, and one of an earlier version brought up to date."""
    if target.exists(DATASET_FILE):
        existing = Store(target.url, options=options)
        if existing.document != store.document and not _is_earlier_version(existing, store):
            raise StoreError(
                f"{target.url}: holds store {existing.dataset.id[:12]}, version {existing.dataset.version}; expected "
                f"nothing, or version {store.dataset.version} of {store.dataset.id[:12]}"
            )
        return
    claim(target, COPY_FILE, sha256(store.document))


def _is_earlier_version(copy: Store, store: Store) -> bool:
    """Whether a copy is an earlier version of `store`."""
    version = copy.dataset.version
    if is_1_0(store.dataset) or version >= store.dataset.version:
        return False
    return store.root.read(version_file(version), MAX_METADATA_BYTES) == copy.document
