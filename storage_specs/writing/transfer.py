"""Whole stores to another place or layout: convert, copy, repair, and the export of classic WebDataset tuples."""

import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from nfm.storage_specs.format.card import tuples_readme
from nfm.storage_specs.format.manifest import FileKey
from nfm.storage_specs.format.names import (
    COST_FILE,
    CROISSANT_FILE,
    DATASET_FILE,
    MANIFEST_FILE,
    MAX_METADATA_BYTES,
    README_FILE,
    SIGMA_F_FILE,
    SPEC_FILE,
    Z_SCALE_FILE,
)
from nfm.storage_specs.format.schema import Dataset, LayoutName
from nfm.storage_specs.reading.store import Fault, Store
from nfm.storage_specs.storage.documents import canonical_json
from nfm.storage_specs.storage.errors import StorageError, StoreError
from nfm.storage_specs.storage.files import IO_THREADS, Root, sha256
from nfm.storage_specs.storage.npy import npy_bytes
from nfm.storage_specs.writing.units import list_committed_units
from nfm.storage_specs.writing.writer import StoreWriter

Progress = Callable[[int], None]  # is called with the number of bytes or rows that were just completed
MAX_DOCUMENT_BYTES = 1 << 30  # of a file beside those of columns; a larger one is damaged or hostile
_EXPORT_FILE = "export.json"  # in a folder of tuples: which store they are from
_COPY_FILE = "copy.json"  # in an unfinished copy: which store it is of


def convert_store(
    store: Store, out: str, layout: LayoutName, progress: Progress, options: dict[str, Any] | None
) -> Dataset:
    """Write the values of `store` in another layout to the URL `out`.

    Totals and cost stay the same, so converting back gives the same bytes. The sha256 of every source file is checked.
    If it was interrupted, the same call continues. `progress` gets rows. Raises StoreError if the layout is the same,
    the source is damaged, or `out` holds another store.
    """
    if layout == store.spec.layout:
        raise StoreError(f"{store.url}: the store already has layout {layout}; to duplicate it, use `nfm store copy`")
    spec = store.spec.model_copy(update={"layout": layout})
    writer = StoreWriter(out, spec, options)
    writer.initialize(store.z_scale if spec.coupling else None)
    if writer.is_complete():
        return Store(out, options=options).dataset
    missing_units = writer.list_missing_units()
    missing_rows = sum(spec.rows_of(unit.block) for unit in missing_units)
    progress(spec.rows - missing_rows)
    for unit in missing_units:
        unit_writer = writer.unit_writer(unit)
        unit_writer.write_base({name: store.column(name, unit.block) for name in ("x", "label")})
        for draw in unit.draws:
            z = np.ascontiguousarray(store.column("z", unit.block, draw))
            noise = store.column("noise", unit.block, draw) if "noise" in spec.planes else None
            squared_error = store.files[FileKey("z", unit.block, draw)].squared_error
            assert squared_error is not None
            unit_writer.write_stored_draw(draw, z, noise, squared_error)
        unit_writer.commit()
        progress(spec.rows_of(unit.block))
    return writer.finalize(store.cost)


def export_tuples(store: Store, out: str, progress: Progress, options: dict[str, Any] | None) -> int:
    """Write the pairs of a coupling store as classic WebDataset files, k<draw>/<block>.tar, in which every sample has
    x.npy, z.npy, noise.npy and cls. Returns the number of files.

    z that is stored as bfloat16 or int8 is written as the float32 it stands for. If it was interrupted, the same call
    continues. `progress` gets rows. Raises StoreError for a store of samples, or if `out` holds tuples of another
    store.
    """
    spec, root = store.spec, Root(out, options)
    if spec.coupling is None:
        raise StoreError(f"{store.url}: got a store of samples, expected one of couplings")
    _claim_export(store, root)
    existing = root.list_file_sizes()
    for block in range(spec.blocks):
        for draw in range(spec.draws):
            path = f"k{draw:03d}/{block:06d}.tar"
            if path not in existing:  # an existing file is complete, as files are written completely or not at all
                root.write(path, b"".join(_tuples_tar(store, block, draw)))
        progress(spec.rows_of(block))
    root.write(SIGMA_F_FILE, npy_bytes(store.sigma_f))
    root.write(README_FILE, tuples_readme(store.dataset).encode())
    return spec.blocks * spec.draws


def _claim_export(store: Store, target: Root) -> None:
    """Write into `target` that it holds tuples of `store`. Raises StoreError if it holds those of another store."""
    claim = canonical_json({"tuples of": store.dataset.id})
    if not target.exists(_EXPORT_FILE):
        target.write(_EXPORT_FILE, claim)
    elif target.read(_EXPORT_FILE, len(claim) + 1) != claim:
        raise StoreError(f"{target.url}: holds tuples of another store; write to another URL, or delete it first")


def _tuples_tar(store: Store, block: int, draw: int) -> Iterator[bytes]:
    """The tar with the tuples of one block and draw, in pieces: one for each member, and the end."""
    assert store.spec.coupling is not None
    if store.spec.coupling.z_dtype in ("float32", "float16"):
        z = store.column("z", block, draw)
    else:
        z = store.z(block, draw)
    x, noise, label = store.column("x", block), store.column("noise", block, draw), store.column("label", block)
    for row, index in enumerate(store.spec.indices(block).tolist()):
        members = {
            "x.npy": npy_bytes(np.asarray(x[row])),
            "z.npy": npy_bytes(np.asarray(z[row])),
            "noise.npy": npy_bytes(np.asarray(noise[row])),
            "cls": str(label[row]).encode(),
        }
        for suffix, data in members.items():
            info = tarfile.TarInfo(f"{index:012d}_k{draw:03d}.{suffix}")
            info.size = len(data)
            padding = bytes(-len(data) % tarfile.BLOCKSIZE)
            yield info.tobuf(tarfile.USTAR_FORMAT) + data + padding
    yield bytes(2 * tarfile.BLOCKSIZE)


def copy_store(store: Store, out: str, progress: Progress, options: dict[str, Any] | None) -> int:
    """Copy all files of `store`, with its commit records, to the URL `out`. Returns how many files of columns were
    written.

    Files that exist there with the right size are kept at first; at the end all files are read back, and those with
    wrong bytes are written again. Only then commit records and dataset.json are written, as they tell others that the
    files can be trusted. If it was interrupted, the same call continues. `progress` gets the bytes of each file of a
    column twice: when it is in `out`, written by this call or before, and when it was read back. Raises
    StoreError if the source is damaged, if `out` holds another store, or if the storage returns other bytes than were
    written.
    """
    faults = store.find_document_faults()
    if faults:
        raise StoreError(f"{faults[0].message} (nothing was copied)")
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

    def copy_document(path: str) -> None:
        data = store.root.read(path, MAX_DOCUMENT_BYTES)
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
        commit_files = _list_commit_files(store)
        if commit_files:
            # With spec.json and the commit records, the copy can be repaired. The file of the source is not copied,
            # since it may name draws that are being added.
            target.write(SPEC_FILE, store.spec.to_json())
        metadata_files = store.layout.metadata_files(store.spec)
        list(pool.map(copy_document, [*metadata_files, MANIFEST_FILE, *_list_documents(store), *commit_files]))
    copy_document(DATASET_FILE)
    if target.exists(_COPY_FILE):
        target.delete(_COPY_FILE)
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


def _list_commit_files(store: Store) -> list[str]:
    """The files of Σ z² and the commit records of the units of a store; none if the store itself was copied without
    them."""
    if not store.root.exists(SPEC_FILE):
        return []
    units = []
    for unit in sorted(list_committed_units(store.root)):
        is_of_dataset = unit.block < store.spec.blocks and unit.stop <= store.spec.draws
        if is_of_dataset:  # others are of draws that are being added
            units.append(unit)
    sum_z2_files = [unit.sum_z2_file for unit in units if unit.draws]
    return [*sum_z2_files, *(unit.commit_file for unit in units)]


def _list_documents(store: Store) -> list[str]:
    """The files beside dataset.json and the manifest that lie in the folder of a store."""
    names = [README_FILE, CROISSANT_FILE]
    if store.spec.coupling:
        names.append(SIGMA_F_FILE)
        if store.spec.coupling.z_scale_sha256:
            names.append(Z_SCALE_FILE)
        if store.cost:
            names.append(COST_FILE)
    return names


def _claim_copy(store: Store, target: Root, options: dict[str, Any] | None) -> None:
    """Write into `target` that it will be a copy of `store`. Raises StoreError if it holds another store, or a part of
    one."""
    if target.exists(DATASET_FILE):
        existing_id = Store(target.url, options=options).dataset.id
        if existing_id != store.dataset.id:
            raise StoreError(
                f"{target.url}: holds store {existing_id[:12]}, expected nothing or {store.dataset.id[:12]}"
            )
        return
    claim = canonical_json({"copy of": store.dataset.id})
    if target.exists(_COPY_FILE):
        if target.read(_COPY_FILE, MAX_METADATA_BYTES) != claim:
            raise StoreError(f"{target.url}: holds a part of another store; copy to another URL, or delete it first")
    elif target.exists(SPEC_FILE):
        raise StoreError(f"{target.url}: holds a store that is being written; copy to another URL, or delete it first")
    else:
        target.write(_COPY_FILE, claim)


def repair_store(store: Store, progress: Progress) -> tuple[list[str], list[int]]:
    """Prepare a damaged store for the command that wrote it, so that it writes exactly the damaged blocks again.

    Deletes the commit records of the units with damaged or missing files, and dataset.json. `progress` gets the bytes
    that were read. Returns the faults, one sentence each, and the damaged blocks; both are empty for a sound store.
    Raises StoreError if the store cannot be repaired, as it has no commit records or its z_scale.npy is damaged, and
    StorageError if storage cannot be read.
    """
    try:
        faults = list(store.find_faults(progress))
    except StorageError:
        raise
    except StoreError as error:  # a damaged manifest is rebuilt from the commit records
        faults = [Fault(MANIFEST_FILE, str(error))]
    if not faults:
        return [], []
    if not store.root.exists(SPEC_FILE):
        raise StoreError(
            f"{faults[0].message}. {store.url} has no commit records, without which it cannot be repaired; "
            "copy it again from its source"
        )
    for fault in faults:
        if fault.file == Z_SCALE_FILE:
            raise StoreError(
                f"{fault.message}. No commit record holds its values, so {store.url} cannot be repaired; "
                "copy it again from its source"
            )
    damaged_files = [fault.file for fault in faults if isinstance(fault.file, FileKey)]
    for unit in list_committed_units(store.root):
        if any(unit.contains(key) for key in damaged_files):
            store.root.delete(unit.commit_file)
    # Deleted last: after an interruption that deleted only dataset.json, the next run would see all units committed and
    # finalize the damaged store.
    store.root.delete(DATASET_FILE)
    return [fault.message for fault in faults], sorted({key.block for key in damaged_files})
