"""Publishing versions of a store. A version never changes once its document, `versions/000N.json`, is written; what
stands in the folder of the store itself are copies of the newest one's documents."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from nfm.storage_specs.format import schema
from nfm.storage_specs.format.attribution import Attribution
from nfm.storage_specs.format.card import make_cards
from nfm.storage_specs.format.dataset import is_1_0, layout_of, parse_dataset
from nfm.storage_specs.format.image_names import encode_names, hash_rows, max_names_bytes, parse_names
from nfm.storage_specs.format.manifest import (
    FILE_SCHEMA,
    max_manifest_bytes,
    parse_file_records,
    parse_label_counts,
    parse_manifest,
)
from nfm.storage_specs.format.names import (
    CROISSANT_FILE,
    DATASET_FILE,
    LEASE_FILE,
    MANIFEST_NAME,
    MAX_CARD_BYTES,
    MAX_DOCUMENT_BYTES,
    MAX_METADATA_BYTES,
    MAX_VERSION,
    NAMES_NAME,
    README_FILE,
    SIGMA_F_NAME,
    TAGS_FOLDER,
    Z_CLASS_SUMS_NAME,
    Z_SUMS_NAME,
    version_file,
    version_folder,
)
from nfm.storage_specs.format.schema import (
    SCHEMA_VERSION,
    Dataset,
    DocumentFile,
    Documents,
    FileRecord,
    NamesFile,
    Spec,
    Tag,
)
from nfm.storage_specs.reading.store import Store, sum_totals
from nfm.storage_specs.reading.versions import TAG_NAME, list_versions
from nfm.storage_specs.storage.documents import canonical_json, parse_json
from nfm.storage_specs.storage.errors import StorageError, StoreError, UnsupportedError
from nfm.storage_specs.storage.files import Root, sha256
from nfm.storage_specs.storage.lease import Lease

_NO_FILE = DocumentFile(path="", sha256="0" * 64)  # in place of a card while the cards are made


@dataclass(frozen=True)
class Content:
    """What a version consists of beside its number and attribution. The files are as bytes; None where the spec has no
    such file."""

    spec: Spec
    files: list[FileRecord]  # in the order of the manifest
    label_counts: list[dict[int, int]]  # of each block
    manifest: bytes
    names: pa.Table | None
    sigma_f: bytes | None
    z_sums: bytes | None
    z_class_sums: bytes | None

    def id(self) -> str:
        """The content id."""
        files = {"sigma_f": self.sigma_f, "z_sums": self.z_sums, "z_class_sums": self.z_class_sums}
        derived = {name: sha256(data) for name, data in files.items() if data is not None}
        if self.names is not None:
            derived["names"] = hash_rows(self.names)
        return schema.content_id(self.spec, self.files, self.label_counts, derived)


def publish(
    root: Root, spec: Spec, content_of: Callable[[Spec], Content], attribution: Attribution, inherited: Attribution
) -> Dataset:
    """Make a version with this spec the newest, and return its document. It is the existing newest version if that has
    the same content and attribution and its files are intact; else one with the next number.

    `content_of` gives the content for the spec, or for that of an earlier version, which has fewer draws. Damaged
    documents of earlier versions are written again. The attribution of the version is that of the one before, or for
    the first version `inherited`, with every field that `attribution` gives.
    """
    content = content_of(spec)
    previous = read_newest_version(root)
    attribution = (previous.attribution if previous else inherited).updated(attribution)
    content_id = content.id()
    is_same = previous is not None and (previous.id, previous.attribution) == (content_id, attribution)
    if previous is not None:
        _restore_earlier_versions(root, previous.version, content_of, spec.lineage)
    if previous is not None and is_same:
        previous = _restore_version(root, previous, content)
        _restore_documents(root, previous, content)
        if _is_intact(root, previous) and _holds(root, previous, content):
            return _publish_documents(root, previous)
    number = _next_number(root, previous) if previous else 1
    for unreadable in list_versions(root):
        if unreadable > number:
            root.delete(version_file(unreadable))
    folder = version_folder(number)

    def write(name: str, data: bytes | None) -> DocumentFile | None:
        if data is None:
            return None
        root.write(f"{folder}/{name}", data)
        return DocumentFile(path=f"{folder}/{name}", sha256=sha256(data))

    manifest = write(MANIFEST_NAME, content.manifest)
    assert manifest is not None
    names = None
    if content.names is not None:
        rows_sha256 = hash_rows(content.names)
        names = previous.documents.names if previous else None
        if names is None or not (_has_sha256(root, names) and _holds_names(root, names, content)):
            file = write(NAMES_NAME, encode_names(content.names))
            assert file is not None
            names = NamesFile(path=file.path, sha256=file.sha256, rows_sha256=rows_sha256)
    documents = Documents(
        manifest=manifest,
        readme=_NO_FILE,
        croissant=_NO_FILE,
        names=names,
        sigma_f=write(SIGMA_F_NAME, content.sigma_f),
        z_sums=write(Z_SUMS_NAME, content.z_sums),
        z_class_sums=write(Z_CLASS_SUMS_NAME, content.z_class_sums),
    )
    dataset = Dataset(
        schema_version=SCHEMA_VERSION,
        id=content_id,
        version=number,
        parent=previous.id if previous else None,
        spec=content.spec,
        totals=sum_totals(content.spec, content.files, content.label_counts),
        records={},
        documents=documents,
        attribution=attribution,
    )
    dataset = dataset.model_copy(update={"records": layout_of(dataset).describe_records(content.spec)})
    return _publish_documents(root, _write_version(root, dataset))


def restore_cards(store: Store) -> None:
    """Write the damaged cards of the newest version again, and their copies in the folder of the store, if they are
    what this nfm writes."""
    cards = make_cards(store.dataset)
    files = {"readme": store.dataset.documents.readme, "croissant": store.dataset.documents.croissant}
    if all(sha256(cards[name]) == file.sha256 for name, file in files.items()):
        for name, file in files.items():
            if not _has_sha256(store.root, file):
                store.root.write(file.path, cards[name])
        _publish_documents(store.root, store.dataset)


def _next_number(root: Root, newest: Dataset) -> int:
    """The number of the version after the newest. Raises StoreError if there is none."""
    if newest.version == MAX_VERSION:
        raise StoreError(
            f"{root.url}: got version {newest.version}, the last that a store can have; "
            "nfm store convert writes it to another URL, as version 1"
        )
    return newest.version + 1


def restore_newest_version(store: Store) -> None:
    """Write the document of the newest version, as which `store` was opened, from dataset.json if it cannot be read
    itself. Nothing else holds its attribution."""
    path = version_file(store.dataset.version)
    try:
        parse_dataset(store.root.read(path, MAX_METADATA_BYTES), f"{store.url}/{path}")
    except StorageError:
        raise
    except StoreError:
        store.root.write(path, store.document)


def read_newest_version(root: Root) -> Dataset | None:
    """The newest version whose document can be read, whether dataset.json is a copy of it yet or not. The number of a
    damaged one is used again."""
    return next(_readable_versions(root, reversed(list_versions(root))), None)


def list_readable_versions(root: Root) -> list[Dataset]:
    """The versions whose documents can be read, in order."""
    return list(_readable_versions(root, list_versions(root)))


def _readable_versions(root: Root, versions: Iterable[int]) -> Iterator[Dataset]:
    for version in versions:
        path = version_file(version)
        try:
            yield parse_dataset(root.read(path, MAX_METADATA_BYTES), f"{root.url}/{path}")
        except (StorageError, UnsupportedError):
            raise
        except StoreError:
            continue


def _restore_earlier_versions(root: Root, newest: int, content_of: Callable[[Spec], Content], lineage: str) -> None:
    """Write the damaged or missing documents of the versions before the newest again, as far as that is possible."""
    for version in list_versions(root):
        if version >= newest:
            break
        path = version_file(version)
        try:
            dataset = parse_dataset(root.read(path, MAX_METADATA_BYTES), f"{root.url}/{path}")
        except StorageError:
            raise
        except StoreError:
            continue  # `verify` tells; nothing says what the document was
        if dataset.spec.lineage == lineage and not _is_intact(root, dataset):
            _restore_documents(root, dataset, content_of(dataset.spec))


def _restore_version(root: Root, dataset: Dataset, content: Content) -> Dataset:
    """The document of a version of this content. It is written again if fields that follow from the content, which the
    id alone does not protect, are others in it."""
    computed = dataset.model_copy(
        update={
            "spec": content.spec,
            "totals": sum_totals(content.spec, content.files, content.label_counts),
            "records": layout_of(dataset).describe_records(content.spec),
        }
    )
    if computed != dataset:
        root.write(version_file(dataset.version), canonical_json(computed.model_dump(mode="json")))
    return computed


def _holds(root: Root, dataset: Dataset, content: Content) -> bool:
    """Whether manifest and names of a version, whose sha256 were compared, say what the content does. Their bytes
    differ between versions of the library that writes Parquet."""
    path, spec, layout = dataset.documents.manifest.path, content.spec, layout_of(dataset)
    try:
        data = root.read(path, max_manifest_bytes(spec, layout))
        table = parse_manifest(data, spec, layout, FILE_SCHEMA, path)
        files = list(parse_file_records(table, spec, layout, path).values())
        label_counts = parse_label_counts(table, spec, path)
    except StorageError:
        raise
    except StoreError:
        return False
    names = dataset.documents.names
    return (files, label_counts) == (content.files, content.label_counts) and (
        names is None or _holds_names(root, names, content)
    )


def _holds_names(root: Root, file: NamesFile, content: Content) -> bool:
    """Whether a file of names, whose sha256 was compared, has the rows of the content."""
    assert content.names is not None
    try:
        data = root.read(file.path, max_names_bytes(content.spec.rows))
        rows_sha256 = hash_rows(parse_names(data, 0, content.spec.rows, file.path))
    except StorageError:
        raise
    except StoreError:
        return False
    return rows_sha256 == file.rows_sha256 == hash_rows(content.names)


def _restore_documents(root: Root, dataset: Dataset, content: Content) -> None:
    """Write the damaged or missing documents of a version again, where what is computed now has the sha256 that its
    document names."""
    computed = {
        "manifest": content.manifest,
        "names": None if content.names is None else encode_names(content.names),
        "sigma_f": content.sigma_f,
        "z_sums": content.z_sums,
        "z_class_sums": content.z_class_sums,
        **make_cards(dataset),
    }
    for name, file in dataset.documents.by_name().items():
        data = computed[name]
        if data is not None and sha256(data) == file.sha256 and not _has_sha256(root, file):
            root.write(file.path, data)


def _is_intact(root: Root, dataset: Dataset) -> bool:
    """Whether all files of a version beside those of columns have their sha256."""
    return all(_has_sha256(root, file) for file in dataset.documents.by_name().values())


def _has_sha256(root: Root, file: DocumentFile) -> bool:
    """Whether a file is there with its sha256. Raises StorageError if storage cannot be read."""
    try:
        return sha256(root.view(file.path, MAX_DOCUMENT_BYTES)) == file.sha256
    except StorageError:
        raise
    except StoreError:
        return False


def _write_version(root: Root, dataset: Dataset) -> Dataset:
    """Write the cards and then the document of a new version, whose other files are written. Returns the document with
    the cards."""
    folder = version_folder(dataset.version)
    cards: dict[str, DocumentFile] = {}
    file_names = {"readme": README_FILE, "croissant": CROISSANT_FILE}
    for name, data in make_cards(dataset).items():
        path = f"{folder}/{file_names[name]}"
        root.write(path, data)
        cards[name] = DocumentFile(path=path, sha256=sha256(data))
    documents = dataset.documents.model_copy(update=cards)
    dataset = dataset.model_copy(update={"documents": documents})
    root.write(version_file(dataset.version), canonical_json(dataset.model_dump(mode="json")))
    return dataset


def _publish_documents(root: Root, dataset: Dataset) -> Dataset:
    """Make an existing version the newest: write the metadata of the layout, and copy its cards and, last, its document
    to the folder of the store."""
    for path, data in layout_of(dataset).metadata_files(dataset.spec).items():
        root.write(path, data)
    for path, card in ((README_FILE, dataset.documents.readme), (CROISSANT_FILE, dataset.documents.croissant)):
        root.write(path, root.read(card.path, MAX_CARD_BYTES))
    root.write(DATASET_FILE, root.read(version_file(dataset.version), MAX_METADATA_BYTES))
    return dataset


def annotate_store(store: Store, attribution: Attribution, removed: Iterable[str] = ()) -> Dataset:
    """Publish a version with the fields that `attribution` gives and without the fields `removed`, which shares all
    files of columns. Returns its document; if nothing changes, that of the newest version.

    Raises StoreError for a store of schema 1.0, for a version that is not the newest, and while the store is being
    written.
    """
    if is_1_0(store.dataset):
        raise StoreError(
            f"{store.url}: got a store of schema 1.0, which has no attribution; nfm store convert it first"
        )
    with Lease(store.url, LEASE_FILE, store.options):
        if Store(store.url, options=store.options).dataset != store.dataset:
            raise StoreError(f"{store.version_url}: got an older version; annotate {store.url}, the newest")
        restore_newest_version(store)
        newest = read_newest_version(store.root)  # later than dataset.json if a publication was interrupted
        if newest is None or newest.id != store.dataset.id:
            raise StoreError(
                f"{store.url}: the job that writes it was interrupted; run the same command again, and then annotate"
            )
        newest = Store(f"{store.url}@v{newest.version}", options=store.options).dataset  # whose documents agree
        updated = newest.attribution.without(removed).updated(attribution)
        if updated == newest.attribution:
            return _publish_documents(store.root, newest)
        number = _next_number(store.root, newest)
        version = newest.model_copy(update={"attribution": updated, "version": number, "parent": newest.id})
        return _publish_documents(store.root, _write_version(store.root, version))


def tag_version(store: Store, name: str) -> None:
    """Give the version of `store` a name. Raises StoreError if another version has it, if it is no name for a tag, or
    for a store of schema 1.0."""
    if is_1_0(store.dataset):
        raise StoreError(f"{store.url}: got a store of schema 1.0, which has no versions; nfm store convert it first")
    if not TAG_NAME.fullmatch(name) or (name[0] == "v" and name[1:].isdecimal()):
        raise StoreError(
            f"got tag {name!r}; expected at most 64 letters, digits, '.', '_' and '-', and not the name of a version"
        )
    path = f"{TAGS_FOLDER}/{name}.json"
    tag = Tag(version=store.dataset.version, id=store.dataset.id)
    if store.root.exists(path):
        existing = parse_json(Tag, store.root.read(path, MAX_METADATA_BYTES), f"{store.url}/{path}")
        if existing != tag:
            raise StoreError(f"{store.url}: tag {name} is version {existing.version}; a tag stays, choose another name")
        return
    store.root.write(path, canonical_json(tag.model_dump(mode="json")))
