"""Checking that a store is what its documents say: every file is read, and what follows from the files is computed
again."""

import json
import posixpath
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nfm.storage_specs.format import codecs
from nfm.storage_specs.format.card import list_code, make_cards
from nfm.storage_specs.format.dataset import is_1_0, max_document_bytes, parse_dataset
from nfm.storage_specs.format.layouts import Columns
from nfm.storage_specs.format.manifest import FileKey
from nfm.storage_specs.format.names import (
    COST_FILE,
    CROISSANT_FILE,
    DATASET_FILE,
    MAX_CARD_BYTES,
    MAX_METADATA_BYTES,
    README_FILE,
    TAGS_FOLDER,
    Z_SCALE_FILE,
    version_file,
)
from nfm.storage_specs.format.noise import standard_normal
from nfm.storage_specs.format.schema import Dataset, DocumentFile
from nfm.storage_specs.format.sums import NUM_POWERS, ZSums, sigma_f, sum_z
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.versions import Tags, list_tags
from nfm.storage_specs.storage.documents import load_json
from nfm.storage_specs.storage.errors import StorageError, StoreError
from nfm.storage_specs.storage.files import IO_THREADS, sha256
from nfm.storage_specs.storage.local import is_temporary_file, map_file

SUM_TOLERANCE = 1e-9  # of sums in float64, relative to the sum of the magnitudes
SIGMA_F_TOLERANCE = 1e-6  # relative


class Fault(NamedTuple):
    """Something that is wrong with a store."""

    file: FileKey | str  # the file of a column that is damaged or missing, or the name of another file of the store
    message: str  # one sentence, with the URL of the file


class ExaminedFile(NamedTuple):
    """What was found in one file of a column."""

    key: FileKey
    fault: str  # a sentence on what is wrong with it, or ""
    labels: NDArray[np.int64] | None = None  # (rows,), of a file that holds them
    sums: ZSums | None = None  # of a file of z


def find_faults(store: Store, progress: Callable[[int], None] = lambda _bytes: None) -> Iterator[Fault]:
    """Everything that is wrong with a store.

    Reads all files from where they are (not from the cache) and checks size, sha256, structure, labels and their
    counts, that all numbers are finite, and in each file of noise that its first row is that of the noise law. σ_f and
    the sums over z are computed again. `progress` gets the number of bytes of each file that was read. Raises
    StorageError if storage cannot be read.
    """
    faults_of_documents = find_document_faults(store)
    yield from faults_of_documents
    yield from find_stray_files(store)
    # Nothing is allocated by what the spec says alone: these grow with the files that are found.
    labels: dict[int, NDArray[np.int64]] = {}  # by block
    sums: ZSums | None = None
    is_sound = not faults_of_documents
    with ThreadPoolExecutor(IO_THREADS, "nfm-verify") as pool:
        base_keys = [key for key in store.files if key.draw < 0]
        draw_keys = [key for key in store.files if key.draw >= 0]
        for keys in (base_keys, draw_keys):  # labels are known before the z that are added up by label
            for examined in pool.map(lambda key: _examine_file(store, key, labels), keys):
                key = examined.key
                progress(store.files[key].bytes)
                fault = examined.fault
                if examined.labels is not None:
                    fault = fault or _compare_labels(store, key, examined.labels, labels.get(key.block))
                    labels[key.block] = examined.labels.copy()
                if examined.sums is not None and sums is not None:
                    sums.add(examined.sums)
                elif examined.sums is not None:
                    sums = examined.sums
                if fault:
                    is_sound = False
                    yield Fault(key, fault)
    if is_sound and sums is not None:
        yield from compare_sums(store, sums)


def _examine_file(store: Store, key: FileKey, labels: dict[int, NDArray[np.int64]]) -> ExaminedFile:
    """Read one file of a column. `labels` are those of each block, (rows,), for a file of z."""
    record, spec = store.files[key], store.spec
    try:
        if store.root.local:
            data = store.use_local_file(key, map_file)
        else:
            data = np.frombuffer(store.root.read(record.path, record.bytes), np.uint8)
        columns = store.parse_columns(key, data, sha256_checked=False)
        if key.column == "noise":
            _check_noise(store, key, columns)
    except StorageError:
        raise
    except StoreError as error:
        return ExaminedFile(key, str(error))
    if key.column != "z":
        return ExaminedFile(key, "", labels=columns.get("label"))
    try:
        z = codecs.decode_z(columns["z"], spec.nfm.z_dtype, store.z_scale)
    except StoreError:  # a damaged scale is a fault of a document
        return ExaminedFile(key, "")
    if spec.has_labels and key.block not in labels:  # the file that holds them is damaged
        return ExaminedFile(key, "")
    labels_of_block = labels.get(key.block, np.full(len(z), -1, dtype=np.int64))
    return ExaminedFile(key, "", sums=sum_z(spec, z, labels_of_block))


def _check_noise(store: Store, key: FileKey, columns: Columns) -> None:
    """Raise StoreError unless the first row of a file of noise is that of the law."""
    spec = store.spec
    index = spec.indices(key.block)[:1]
    expected = standard_normal(spec.nfm.noise.seed, index, key.draw, spec.shape).astype(spec.dtype("noise"))
    if columns["noise"][:1].tobytes() != expected.tobytes():
        raise StoreError(
            f"{store.url}/{store.files[key].path}: the noise of image {index[0]} is not that of law "
            f"{spec.nfm.noise.law} with seed {spec.nfm.noise.seed}; the store is not what its spec says"
        )


def _compare_labels(
    store: Store, key: FileKey, labels: NDArray[np.int64], known_labels: NDArray[np.int64] | None
) -> str:
    """A sentence if the labels in a file are not those of the manifest, or not the known ones of another file of the
    same rows; else ""."""
    path = f"{store.url}/{store.files[key].path}"
    values, counts = np.unique(labels, return_counts=True)
    if store.label_counts[key.block] != dict(zip(values.tolist(), counts.tolist(), strict=True)):
        return f"{store.url}/{store.dataset.documents.manifest.path}: its label counts are not those of {path}"
    if known_labels is not None and not np.array_equal(known_labels, labels):
        return f"{path}: its labels are not those of the plain view; the store is not what it says"
    return ""


def compare_sums(store: Store, sums: ZSums) -> Iterator[Fault]:
    """Faults of σ_f and of the sums over z of a coupling store, against `sums` over z in its files."""
    spec, documents = store.spec, store.dataset.documents
    assert documents.sigma_f is not None
    if not np.allclose(store.sigma_f, sigma_f(spec, sums), rtol=SIGMA_F_TOLERANCE, atol=0):
        path = documents.sigma_f.path
        yield Fault(path, f"{store.url}/{path}: it is not the root mean square of z; the store is not what it says")
    stored = store.z_sums
    if stored is None:
        return
    num_pairs = spec.rows * spec.num_draws
    rms = np.sqrt(sums.by_dimension[1] / num_pairs)
    powers = np.arange(1, NUM_POWERS + 1)
    scale = num_pairs * rms ** powers[:, None, None, None]
    assert documents.z_sums is not None
    if (np.abs(stored.by_dimension - sums.by_dimension) > SUM_TOLERANCE * scale).any():
        path = documents.z_sums.path
        yield Fault(path, f"{store.url}/{path}: they are not the sums over z; the store is not what it says")
    scale_of_class = num_pairs * spec.dim * rms.max() ** powers
    if (np.abs(stored.by_class - sums.by_class) > SUM_TOLERANCE * scale_of_class).any():
        assert documents.z_class_sums is not None
        path = documents.z_class_sums.path
        yield Fault(path, f"{store.url}/{path}: they are not the sums over z by class; the store is not what it says")


def find_document_faults(store: Store) -> list[Fault]:
    """What is wrong with the files beside those of columns, and beside those without which no Store can be opened.
    Raises StorageError if storage cannot be read."""
    faults: list[Fault] = []
    for path, check in _list_document_checks(store):
        try:
            check()
        except StorageError:
            raise
        except StoreError as error:
            faults.append(Fault(path, str(error)))
    return faults


def _list_document_checks(store: Store) -> Iterator[tuple[str, Callable[[], object]]]:
    """The path of each file to check, and what raises StoreError if something is wrong with it."""
    documents = store.dataset.documents
    if documents.sigma_f is not None:
        yield documents.sigma_f.path, lambda: store.sigma_f
        yield Z_SCALE_FILE, lambda: store.z_scale
        yield COST_FILE, lambda: store.cost  # has no hash: whether it can be read
    if documents.z_sums is not None:
        yield documents.z_sums.path, lambda: store.z_sums
    if documents.names is not None:
        yield documents.names.path, lambda: store.image_names
    is_newest = _is_newest(store)
    if not is_1_0(store.dataset):
        version = version_file(store.dataset.version)
        for card, path in ((documents.readme, README_FILE), (documents.croissant, CROISSANT_FILE)):
            yield path, partial(_check_card, store, card, path if is_newest else None)
        if is_newest:
            yield version, partial(_compare, store, version, store.document, f"{DATASET_FILE} of the same version")
        history = _History(store)
        for earlier in reversed(range(1, store.dataset.version)):
            yield version_file(earlier), partial(history.check, earlier)
            if not store.root.exists(version_file(earlier)):
                break  # a version that exists has all before it: those before a gap would be as many as a number says
        for tag in list_tags(store.root):
            yield f"{TAGS_FOLDER}/{tag}.json", partial(history.tags.version_of, tag)
    else:  # 1.0 has no hashes of its cards: whether they can be read, as copies need them
        for path in (README_FILE, CROISSANT_FILE):
            yield path, partial(store.root.read, path, MAX_METADATA_BYTES)
    if is_newest:  # the metadata files of Zarr are those of the newest version
        for path, expected in store.layout.metadata_files(store.spec).items():
            yield path, partial(_compare_metadata, store, path, expected)


def find_stray_files(store: Store) -> Iterator[Fault]:
    """The files in the folders of columns that are not in the manifest. Stock readers of WebDataset take all files of a
    folder; those of Zarr look for the shards of the shape alone."""
    if store.spec.layout != "webdataset":
        return
    known = {record.path for record in store.files.values()}
    for folder in sorted({posixpath.dirname(path) for path in known}):
        for name in store.root.list_names(folder):
            path = f"{folder}/{name}"
            if path not in known and not is_temporary_file(path):
                yield Fault(
                    path, f"{store.url}/{path}: it is not in the manifest, and stock readers would read it; delete it"
                )


def _is_newest(store: Store) -> bool:
    """Whether the version that was opened is the newest."""
    if not store.root.exists(DATASET_FILE):
        return False
    size = len(store.document)
    return store.root.size(DATASET_FILE) == size and store.root.read(DATASET_FILE, size) == store.document


def _compare(store: Store, path: str, expected: bytes, what: str) -> None:
    """Raise StoreError unless a file has the expected content, which is `what`."""
    if store.root.read(path, max(len(expected), MAX_METADATA_BYTES)) != expected:
        raise StoreError(f"{store.url}/{path}: it is not {what}; repair or copy the store")


def _compare_metadata(store: Store, path: str, expected: bytes) -> None:
    """Raise StoreError unless a metadata file of Zarr says what it must. Versions of zarr-python spell it differently,
    and leave out or write what is empty."""
    data = store.root.read(path, MAX_METADATA_BYTES)
    if _without_empty(load_json(data, f"{store.url}/{path}")) != _without_empty(json.loads(expected)):
        raise StoreError(f"{store.url}/{path}: it is not the metadata of this spec; repair or copy the store")


def _without_empty(value: Any) -> Any:
    """A JSON value without the members of objects that are null or empty."""
    if not isinstance(value, dict):
        return value
    members = {name: _without_empty(member) for name, member in value.items()}
    return {name: member for name, member in members.items() if member not in (None, {}, [])}


def _check_card(store: Store, card: DocumentFile, copied_to: str | None) -> None:
    """Raise StoreError if a card is damaged, or its copy in the folder of the store, where there is one."""
    data = store.read_document(card.path, card.sha256, MAX_CARD_BYTES)
    if copied_to is not None:
        _compare(store, copied_to, data, f"{card.path}, the card of the newest version")


class _History:
    """The versions before the one that was opened, of which each document is read once, the newest first."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._child: Dataset | None = store.dataset  # the version after the one to check; None if it is damaged
        self._ids = {store.dataset.version: store.dataset.id}
        self.tags = Tags(store.root, self._ids)

    def check(self, version: int) -> None:
        """Raise StoreError unless a version is the parent of the next, and its documents have their sha256."""
        root, child = self._store.root, self._child
        self._child = None
        path = version_file(version)
        name = f"{root.url}/{path}"
        earlier = parse_dataset(root.read(path, MAX_METADATA_BYTES), name)
        self._child = earlier
        if earlier.version != version or (child is not None and earlier.id != child.parent):
            raise StoreError(f"{name}: it is not the parent that version {version + 1} names; the file is damaged")
        self._ids[version] = earlier.id
        max_bytes = max_document_bytes(earlier)
        for kind, file in earlier.documents.by_name().items():
            if sha256(root.view(file.path, max_bytes[kind])) != file.sha256:
                raise StoreError(f"{root.url}/{file.path}: its sha256 is not the one in {name}; the file is damaged")


def describe_weak_promises(store: Store) -> Iterable[str]:
    """What a store says and nothing proves, one sentence each: in schema 1.0 what has no hash, and in any schema cards
    by which programs read something else than by those of this nfm. Raises StoreError if a card cannot be read."""
    if is_1_0(store.dataset):
        yield (
            f"{store.url}: schema 1.0: its id does not cover σ_f, label counts and rounding errors, so whoever changed "
            f"them could keep the id. They were compared with the files as far as they follow from them. {README_FILE} "
            f"and {CROISSANT_FILE} have no hash, and were not compared with anything. "
            "nfm store convert writes the store as schema 1.1, with cards of its own"
        )
        return
    documents, expected = store.dataset.documents, make_cards(store.dataset)
    for name, card in (("readme", documents.readme), ("croissant", documents.croissant)):
        data = store.read_document(card.path, card.sha256, MAX_CARD_BYTES)
        # The prose of README.md differs between versions of nfm.
        is_same = data == expected[name] or (name == "readme" and list_code(data) == list_code(expected[name]))
        if not is_same:
            yield (
                f"{store.url}/{card.path}: what programs go by in it is not what this nfm writes of this store: "
                "another nfm wrote it, or somebody changed it. Look at its files, addresses and code before use"
            )
