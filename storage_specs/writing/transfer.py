"""Whole stores from one place or layout to another: convert, copy, repair, and the export of classic tuples."""

import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from nfm.storage_specs.format.card import tuples_readme
from nfm.storage_specs.format.manifest import FileKey
from nfm.storage_specs.format.names import MAX_METADATA_BYTES, SPEC_FILE, Z_SCALE_FILE
from nfm.storage_specs.format.schema import Dataset, LayoutName
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.documents import canonical_json
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import IO_THREADS, Root, sha256
from nfm.storage_specs.storage.npy import npy_bytes
from nfm.storage_specs.writing.units import list_committed_units
from nfm.storage_specs.writing.writer import StoreWriter

Progress = Callable[[int], None]  # told how many bytes or rows were just done
MAX_DOCUMENT_BYTES = 1 << 30
_EXPORT_FILE = "export.json"
_COPY_FILE = "copy.json"  # whose copy this will be; gone when it is one


def convert_store(
    store: Store, out: str, layout: LayoutName, progress: Progress, options: dict[str, Any] | None
) -> Dataset:
    """The same store in another layout: same values, totals and times, so that converting back gives the same bytes.
    Every source file's sha256 is checked. The same call again continues."""
    if layout == store.spec.layout:
        raise StoreError(f"{store.url}: got a store in the {layout} layout already; nfm store copy copies it as it is")
    spec = store.spec.model_copy(update={"layout": layout})
    writer = StoreWriter(out, spec, options)
    writer.initialize(store.z_scale if spec.coupling else None)
    if writer.is_complete():
        return Store(out, options=options).dataset
    todo = writer.list_missing_units()
    progress(spec.rows - sum(spec.rows_of(unit.block) for unit in todo))
    for unit in todo:
        writing = writer.unit_writer(unit)
        writing.write_base({name: store.column(name, unit.block) for name in ("x", "label")})
        for draw in unit.draws:
            planes = {name: store.column(name, unit.block, draw) for name in spec.planes}
            error = store.files[FileKey("z", unit.block, draw)].squared_error
            assert error is not None
            writing.write_stored_draw(draw, np.ascontiguousarray(planes["z"]), planes.get("noise"), error)
        writing.commit()
        progress(spec.rows_of(unit.block))
    return writer.finalize(store.cost)


def export_tuples(store: Store, out: str, progress: Progress, options: dict[str, Any] | None) -> int:
    """Classic WebDataset shards, k<draw>/<block>.tar, whose every sample has x.npy, z.npy, noise.npy and cls; returns
    their number. bfloat16 and int8 z are written as the float32 they stand for. The same call again continues."""
    spec, root = store.spec, Root(out, options)
    if spec.coupling is None:
        raise StoreError(f"{store.url}: got a store of samples, expected one of couplings")
    claim = canonical_json({"tuples of": store.dataset.id})
    if root.exists(_EXPORT_FILE):
        if root.read(_EXPORT_FILE, len(claim) + 1) != claim:
            raise StoreError(f"{out}: holds tuples of another store; write to another URL, or delete it first")
    else:
        root.write(_EXPORT_FILE, claim)
    there = root.list_file_sizes()
    for block in range(spec.blocks):
        for draw in range(spec.draws):
            path = f"k{draw:03d}/{block:06d}.tar"
            if path not in there:  # a file is there whole or not at all
                root.write(path, b"".join(_tuples(store, block, draw)))
        progress(spec.rows_of(block))
    root.write("sigma_f.npy", npy_bytes(store.sigma_f))
    root.write("README.md", tuples_readme(store.dataset).encode())
    return spec.blocks * spec.draws


def _tuples(store: Store, block: int, draw: int) -> Iterator[bytes]:
    """The tar of one block and draw, piece by piece."""
    assert store.spec.coupling is not None
    exact = store.spec.coupling.z_dtype in ("float32", "float16")
    z = store.column("z", block, draw) if exact else store.z(block, draw)
    columns = (store.column("x", block), z, store.column("noise", block, draw), store.column("label", block))
    for index, *values, label in zip(store.spec.indices(block).tolist(), *columns, strict=True):
        members = dict(
            zip(("x.npy", "z.npy", "noise.npy"), (npy_bytes(np.asarray(value)) for value in values), strict=True)
        )
        for suffix, data in (members | {"cls": str(label).encode()}).items():
            info = tarfile.TarInfo(f"{index:012d}_k{draw:03d}.{suffix}")
            info.size = len(data)
            yield info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def copy_store(store: Store, out: str, progress: Progress, options: dict[str, Any] | None) -> int:
    """The same bytes at another URL, several files at a time, with their commit records; returns how many files were
    written. What is there already with the right size is kept, and at the end everything is read back and checked:
    commit records and dataset.json, which make others trust the files, are written only then. Raises StoreError where
    the source is damaged."""
    faults = store.find_document_faults()
    if faults:
        raise StoreError(f"{faults[0]} (nothing was copied)")
    target = Root(out, options)
    _claim(store, target, options)
    there = target.list_file_sizes()
    missing = [key for key, record in store.files.items() if there.get(record.path) != record.bytes]

    def put(key: FileKey) -> None:
        record = store.files[key]
        data = store.root.read(record.path, record.bytes)
        if sha256(data) != record.sha256:
            raise StoreError(f"{store.url}/{record.path}: its sha256 is not the one in the manifest; repair it first")
        target.write(record.path, data)
        progress(record.bytes)

    def put_document(name: str) -> None:
        data = store.root.read(name, MAX_DOCUMENT_BYTES)
        target.write(name, data)
        if target.read(name, len(data)) != data:
            raise StoreError(f"{out}/{name}: got other bytes than were written; the storage is not to be trusted")

    with ThreadPoolExecutor(IO_THREADS, "nfm-copy") as pool:
        list(pool.map(put, missing))
        damaged = _bad_copies(store, target, list(store.files), progress, pool)  # the right size and the wrong bytes
        list(pool.map(put, damaged))
        still = _bad_copies(store, target, damaged, progress, pool)
        if still:
            raise StoreError(
                f"{out}/{store.files[still[0]].path}: got other bytes than were written; the storage is not to be "
                "trusted"
            )
        commits = _commit_files(store)
        if commits:
            target.write(SPEC_FILE, store.spec.canonical())
        list(
            pool.map(
                put_document, [*store.layout.metadata_files(store.spec), "manifest.parquet", *_extras(store), *commits]
            )
        )
    put_document("dataset.json")
    if target.exists(_COPY_FILE):
        target.delete(_COPY_FILE)
    return len(missing) + len(damaged)


def _bad_copies(
    store: Store, target: Root, keys: list[FileKey], progress: Progress, pool: ThreadPoolExecutor
) -> list[FileKey]:
    def sound(key: FileKey) -> bool:
        record = store.files[key]
        data = target.read(record.path, record.bytes)
        progress(record.bytes)
        return sha256(data) == record.sha256

    return [key for key, good in zip(keys, pool.map(sound, keys), strict=True) if not good]


def _commit_files(store: Store) -> list[str]:
    """What the writer keeps beside the store; a copy of a copy may have none."""
    if not store.root.exists(SPEC_FILE):
        return []
    there = sorted(list_committed_units(store.root))  # also of draws that are being added
    done = [unit for unit in there if unit.block < store.spec.blocks and unit.stop <= store.spec.draws]
    sums = [unit.sum_z2_file for unit in done if unit.draws]
    return [*sums, *(unit.commit_file for unit in done)]


def _extras(store: Store) -> list[str]:
    names = ["README.md", "croissant.json"]
    if store.spec.coupling:
        names.append("sigma_f.npy")
        if store.spec.coupling.z_scale_sha256:
            names.append(Z_SCALE_FILE)
        if store.cost:
            names.append("cost.json")
    return names


def _claim(store: Store, target: Root, options: dict[str, Any] | None) -> None:
    """Raise StoreError unless `target` is empty, or holds this store or a part of it."""
    if target.exists("dataset.json"):
        there = Store(target.url, options=options).dataset.id
        if there != store.dataset.id:
            raise StoreError(f"{target.url}: holds store {there[:12]}, expected nothing or {store.dataset.id[:12]}")
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
    """Make the store incomplete where it is bad: takes away the commit records of blocks with bad or missing files, and
    dataset.json, so that the command that wrote the store writes exactly those blocks again. Returns the faults and the
    blocks."""
    try:
        found = list(store.find_faults(progress))
    except StoreError as error:  # the manifest itself: the commit records give it back
        found = [(None, str(error))]
    blocks = sorted({key.block for key, _ in found if key is not None})
    if found:
        lost = not store.root.exists(SPEC_FILE)
        if lost or any(Z_SCALE_FILE in fault for _, fault in found):
            what = (
                "has no commit records to repair it by" if lost else f"needs {Z_SCALE_FILE}, which no record gives back"
            )
            raise StoreError(f"{found[0][1]}. {store.url} {what}; copy it again from its source")
        for unit in list_committed_units(store.root):
            if any(unit.contains(key) for key, _ in found if key is not None):
                store.root.delete(unit.commit_file)
        store.root.delete("dataset.json")  # last: without it, and with all records, the store could be called complete
    return [fault for _, fault in found], blocks
