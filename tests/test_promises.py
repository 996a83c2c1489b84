"""A store is what it says: changed documents, files and scales are noticed by every reader and command."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfm.storage_specs.format.attribution import Attribution
from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.reading import rows as rows_module
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream
from nfm.storage_specs.reading.verify import find_faults
from nfm.storage_specs.storage.documents import canonical_json, sealed_json
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import Root, sha256
from nfm.storage_specs.storage.npy import npy_bytes
from nfm.storage_specs.writing.publish import annotate_store, tag_version
from nfm.storage_specs.writing.repair import repair_store
from nfm.storage_specs.writing.transfer import convert_store, copy_store
from nfm.storage_specs.writing.tuples import export_tuples
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.random_couplings import random_coupling_spec, write_random_couplings
from tests.tools.stores import (
    LAYOUT_NAMES,
    block_of,
    change_document,
    damage,
    edit,
    flip,
    ignore_progress,
    reseal,
    sample_spec,
    tree,
)

SHAPE = (1, 4, 4)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_random_couplings(f"{tmp_path}/store", "webdataset", SHAPE, rows=70, draws=2)
    return tmp_path / "store"


USERS: dict[str, Callable[[str, str], object]] = {
    "open": lambda url, out: Store(url),
    "stream": lambda url, out: next(CouplingStream(url, 8, seed=0)),
    "verify": lambda url, out: list(find_faults(Store(url))),
    "convert": lambda url, out: convert_store(Store(url), out, "zarr", ignore_progress, None),
    "copy": lambda url, out: copy_store(Store(url), out, ignore_progress, None),
    "export": lambda url, out: export_tuples(Store(url), out, ignore_progress, None),
    "annotate": lambda url, out: annotate_store(Store(url), Attribution(notes="x")),
    "tag": lambda url, out: tag_version(Store(url), "x"),
    "encode": lambda url, out: StoreWriter(url, random_coupling_spec("webdataset", SHAPE, 70, 2)).is_complete(),
    "add draws": lambda url, out: StoreWriter(url, random_coupling_spec("webdataset", SHAPE, 70, 4)).is_complete(),
}
CHANGES: dict[str, dict[str, Any]] = {
    "class names": {"spec__class_names": ["a", "b", "d"]},
    "η": {"spec__coupling__eta": 0.2},
    "source": {"spec__coupling__source": "1" * 64},
    "teacher": {"spec__coupling__teacher__sha256": "1" * 64},
    "seed": {"spec__coupling__noise__seed": 1},
    "preprocessing": {"spec__preprocessing": {"resize": "other"}},
    "σ_f": {"documents__sigma_f__sha256": "1" * 64},
    "sums": {"documents__z_sums__sha256": "1" * 64},
    "label counts": {"totals__label_counts": {"0": 70}},
    "bytes": {"totals__bytes": 1},
    "rounding error": {"totals__z_rms_error": 0.0},
}


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_document_with_the_old_id_is_refused(store: Path, tmp_path: Path, user: str, change: str) -> None:
    change_document(store, **CHANGES[change])
    with pytest.raises(StoreError, match="its id is not that of its spec and files|its totals are not those"):
        USERS[user](str(store), f"{tmp_path}/out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_a_file_that_is_not_in_the_manifest_is_a_fault_where_readers_would_take_it(
    tmp_path: Path, layout: LayoutName
) -> None:
    """`datasets` reads all of x/*.tar. Zarr asks for the shards of the shape."""
    url = f"{tmp_path}/store"
    write_random_couplings(url, layout, SHAPE, rows=70, draws=2)
    record = next(iter(Store(url).files.values()))
    file = tmp_path / "store" / record.path
    stray = file.with_name("000077" + file.suffix)
    shutil.copy(file, stray)
    shutil.copy(file, f"{file}.{'0' * 32}.tmp")  # of a writer that was killed
    faults = [fault.message for fault in find_faults(Store(url))]
    if layout == "zarr":
        assert faults == []
        return
    assert faults == [f"{url}/x/000077.tar: it is not in the manifest, and stock readers would read it; delete it"]
    with pytest.raises(StoreError, match="not in the manifest.*Nothing else is wrong"):
        repair_store(url, ignore_progress)
    copy_store(Store(url), f"{tmp_path}/copy", ignore_progress, None)
    assert list(find_faults(Store(f"{tmp_path}/copy"))) == []
    stray.unlink()
    assert list(find_faults(Store(url))) == []


def test_every_derived_file_is_computed_again(store: Path) -> None:
    """Hashes and id agree, but the values are not those of z."""
    url, version = str(store), store / "versions/0001"
    changes: tuple[tuple[str, Callable[[Any], Any]], ...] = (
        ("sigma_f.npy", lambda values: values * np.float32(1000)),
        ("sigma_f.npy", lambda values: values * np.float32(1.001)),
        ("z_sums.npy", lambda values: values * 1.001),
        ("z_sums.npy", lambda values: values[::-1]),
        ("z_class_sums.npy", lambda values: values[::-1]),
    )
    for name, change in changes:
        original = (version / name).read_bytes()
        (version / name).write_bytes(npy_bytes(np.ascontiguousarray(change(np.load(version / name)))))
        reseal(store)
        faults = list(find_faults(Store(url)))
        assert [fault.file for fault in faults] == [f"versions/0001/{name}"]
        assert "the store is not what it says" in faults[0].message
        (version / name).write_bytes(original)
        reseal(store)
        assert list(find_faults(Store(url))) == []


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("harm", ["deleted", "flipped"])
def test_a_resumed_conversion_reads_back_what_it_wrote_before(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: LayoutName, harm: str
) -> None:
    if layout == "webdataset":
        convert_store(Store(str(store)), f"{tmp_path}/zarr", "zarr", ignore_progress, None)
        store = tmp_path / "zarr"
    out = tmp_path / "out"
    original = StoreWriter.finalize

    def interrupt(*arguments: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(StoreWriter, "finalize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_store(Store(str(store)), str(out), layout, ignore_progress, None)
    monkeypatch.setattr(StoreWriter, "finalize", original)
    path = "z/k001/000001.tar" if layout == "webdataset" else "columns.zarr/z/c/1/1/0/0/0"
    if harm == "deleted":
        (out / path).unlink()
    else:
        damage(out, path, flip(900))
    convert_store(Store(str(store)), str(out), layout, ignore_progress, None)
    assert list(find_faults(Store(str(out)))) == []


@pytest.mark.parametrize("harm", ["deleted", "flipped", "truncated"])
def test_a_resumed_export_reads_back_what_it_wrote_before(store: Path, tmp_path: Path, harm: str) -> None:
    out = tmp_path / "out"
    export_tuples(Store(str(store)), str(out), ignore_progress, None)
    complete = tree(str(out))
    (out / "README.md").unlink()
    path = "k001/000001.tar"
    if harm == "deleted":
        (out / path).unlink()
    else:
        damage(out, path, flip(900) if harm == "flipped" else lambda data: data[:-512])
    export_tuples(Store(str(store)), str(out), ignore_progress, None)
    assert tree(str(out)) == complete


def test_storage_that_loses_what_is_written_is_not_trusted(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Root.write

    def write(root: Root, path: str, data: bytes) -> None:
        original(root, path, data[:-1] + b"x" if path.endswith(("k001/000001.tar", "/1/1/0/0/0")) else data)

    monkeypatch.setattr(Root, "write", write)
    with pytest.raises(StoreError, match="the storage is not to be trusted"):
        export_tuples(Store(str(store)), f"{tmp_path}/tuples", ignore_progress, None)
    with pytest.raises(StoreError, match="the storage is not to be trusted"):
        copy_store(Store(str(store)), f"{tmp_path}/copy", ignore_progress, None)
    with pytest.raises(StoreError, match="the storage is not to be trusted"):
        convert_store(Store(str(store)), f"{tmp_path}/zarr", "zarr", ignore_progress, None)


def test_a_conversion_of_another_store_with_the_same_spec_is_refused(tmp_path: Path) -> None:
    """Else its blocks would be mixed with those of the first."""
    for seed in (0, 1):
        write_random_couplings(f"{tmp_path}/{seed}", "webdataset", SHAPE, rows=70, draws=2, seed=seed)
    first, second = Store(f"{tmp_path}/0"), Store(f"{tmp_path}/1")
    assert first.spec == second.spec
    convert_store(first, f"{tmp_path}/out", "zarr", ignore_progress, None)
    before = tree(f"{tmp_path}/out")
    with pytest.raises(StoreError, match=f"not one that was converted from {second.dataset.id[:12]}"):
        convert_store(second, f"{tmp_path}/out", "zarr", ignore_progress, None)
    (tmp_path / "out/dataset.json").unlink()
    (tmp_path / "out/commits/000001.k000-002.json").unlink()
    with pytest.raises(StoreError, match="not one that was converted from"):
        convert_store(second, f"{tmp_path}/out", "zarr", ignore_progress, None)
    convert_store(first, f"{tmp_path}/out", "zarr", ignore_progress, None)
    assert tree(f"{tmp_path}/out") == before


@pytest.mark.parametrize("harm", ["deleted", "flipped"])
def test_a_finished_conversion_is_read_back_too(store: Path, tmp_path: Path, harm: str) -> None:
    out = tmp_path / "out"
    convert_store(Store(str(store)), str(out), "zarr", ignore_progress, None)
    before = tree(str(out))
    path = "columns.zarr/z/c/1/1/0/0/0"
    if harm == "deleted":
        (out / path).unlink()
    else:
        damage(out, path, flip(900))
    convert_store(Store(str(store)), str(out), "zarr", ignore_progress, None)
    assert tree(str(out)) == before


def test_a_file_with_the_name_of_a_version_switches_no_check_off(store: Path) -> None:
    convert_store(Store(str(store)), f"{store}-zarr", "zarr", ignore_progress, None)
    zarr = Path(f"{store}-zarr")
    (zarr / "versions/0002.json").write_bytes(b"")
    damage(zarr, "columns.zarr/z/zarr.json", lambda data: data.replace(b"float16", b"int16"))
    damage(zarr, "README.md", flip(200))
    faults = {fault.file for fault in find_faults(Store(str(zarr)))}
    assert faults == {"README.md", "columns.zarr/z/zarr.json"}


def test_metadata_of_zarr_may_be_spelt_otherwise(store: Path) -> None:
    """Versions of zarr-python write other bytes of the same meaning."""
    convert_store(Store(str(store)), f"{store}-zarr", "zarr", ignore_progress, None)

    def respell(data: bytes) -> bytes:
        return json.dumps(json.loads(data) | {"consolidated_metadata": None}, indent=4).encode()

    for path in Path(f"{store}-zarr").glob("columns.zarr/**/zarr.json"):
        damage(path.parent, path.name, respell)
    assert list(find_faults(Store(f"{store}-zarr"))) == []


def add_draws(url: str) -> None:
    """Add a third draw to a store of two."""
    spec = Store(url).spec
    writer = StoreWriter(url, spec.model_copy(update={"coupling": spec.nfm.model_copy(update={"draws": 3})}))
    writer.initialize()
    for unit in writer.list_missing_units():
        unit_writer = writer.unit_writer(unit, Store(url).column("label", unit.block))
        for draw in unit.draws:
            z = np.random.default_rng(unit.block).standard_normal((spec.rows_of(unit.block), *SHAPE), np.float32)
            unit_writer.write_draw(draw, z, None)
        unit_writer.commit()
    writer.finalize()


def forge_records(store: Path, what: str) -> None:
    """Change the commit record of block 1, hashes and all, and for "sums" what it names."""
    record = store / "commits/000001.k000-002.json"
    document = json.loads(record.read_bytes())
    del document["sha256"]
    for file in document["files"]:
        if what == "sums" and file["column"] == "z_sums":
            sums = np.load(store / file["path"]) * 1e6
            (store / file["path"]).write_bytes(npy_bytes(sums))
            file["sha256"] = sha256((store / file["path"]).read_bytes())
        if what == "file" and file["column"] == "z":
            file["sha256"] = "0" * 64
    if what == "counts":
        document["label_counts"] = {"0": document["rows"]}
    record.write_bytes(sealed_json(document))


@pytest.mark.parametrize("what", ["sums", "counts", "file"])
def test_commit_records_that_a_version_was_not_made_of_are_refused(store: Path, what: str) -> None:
    """Somebody changed them before draws were added."""
    forge_records(store, what)
    with pytest.raises(StoreError, match="its commit records are not those that version 1 was made of"):
        add_draws(str(store))
    assert Store(str(store)).dataset.version == 1


@pytest.mark.parametrize("what", ["sums", "counts"])
def test_repair_of_a_card_publishes_nothing_that_forged_records_say(store: Path, what: str) -> None:
    before = tree(str(store))
    forge_records(store, what)
    damage(store, "README.md", lambda data: b"")
    with pytest.raises(StoreError, match="its commit records are not those that version 1 was made of"):
        repair_store(str(store), ignore_progress)
    assert {path: data for path, data in tree(str(store)).items() if not path.startswith(("commits/", "sums/"))} == {
        path: data for path, data in before.items() if not path.startswith(("commits/", "sums/"))
    }, "the card is whole again"


def test_forged_sums_are_not_published_after_a_repair(store: Path) -> None:
    """The block that is written again has other bytes, as another machine writes them, so the version is a new one."""
    forge_records(store, "sums")
    damage(store, "z/k000/000000.tar", flip(700))
    assert repair_store(str(store), ignore_progress).damaged_blocks == [0]
    writer = StoreWriter(str(store), random_coupling_spec("webdataset", SHAPE, 70, 2))
    (unit,) = writer.list_missing_units()
    columns = block_of(writer.spec, unit.block)
    unit_writer = writer.unit_writer(unit, columns["label"])
    unit_writer.write_base({"x": columns["x"]})
    for draw in unit.draws:
        unit_writer.write_draw(draw, np.ones((writer.spec.rows_of(unit.block), *SHAPE), np.float32), None)
    unit_writer.commit()
    for _ in range(2):
        with pytest.raises(StoreError, match="not the root mean square of z.*write the store again to another URL"):
            writer.finalize()
        with pytest.raises(StoreError, match="no dataset.json"):
            Store(str(store))


def test_repair_looks_into_files_whose_commit_record_agrees_with_them(store: Path) -> None:
    """Somebody changed a file and its record, hashes and all, and dataset.json is damaged as well."""
    damage(store, "z/k001/000001.tar", flip(3))  # in the name of a member
    record = store / "commits/000001.k000-002.json"
    document = json.loads(record.read_bytes())
    del document["sha256"]
    for file in document["files"]:
        if file["path"] == "z/k001/000001.tar":
            file["sha256"] = sha256((store / file["path"]).read_bytes())
    record.write_bytes(sealed_json(document))
    damage(store, "dataset.json", lambda data: data[:100])
    faults, blocks, is_complete = repair_store(str(store), ignore_progress)
    assert (blocks, is_complete) == ([1], False)
    assert any("z/k001/000001.tar" in fault for fault in faults)


def test_a_repair_that_was_interrupted_is_not_complete(store: Path) -> None:
    """The commit record of a damaged unit is gone, and dataset.json is still there."""
    spec = Store(str(store)).spec
    (store / "commits/000001.k000-002.json").unlink()
    assert not StoreWriter(str(store), spec).is_complete()


def test_repair_keeps_the_document_of_a_version(store: Path) -> None:
    before = (store / "versions/0001.json").read_bytes()
    damage(store, "dataset.json", edit(attribution__licence="MIT"))
    repair_store(str(store), ignore_progress)
    assert (store / "versions/0001.json").read_bytes() == before


def test_nan_is_no_json(store: Path) -> None:
    for path in ("dataset.json", "versions/0001.json"):
        damage(store, path, lambda data: data.replace(b'"preprocessing": {}', b'"preprocessing": {"a": NaN}'))
    with pytest.raises(StoreError, match="got NaN, which is no JSON"):
        Store(str(store))


def test_an_empty_url_is_no_folder() -> None:
    with pytest.raises(StoreError, match="got an empty URL"):
        Root("")


@pytest.mark.parametrize("url", ["s3:/bucket/x", "https:/host/x", "memory:/x"])
def test_a_url_with_one_slash_is_no_folder(url: str) -> None:
    with pytest.raises(StoreError, match="expected two, as in s3://bucket/folder"):
        Root(url)


OCCUPANTS: dict[str, Callable[[Path, Path], object]] = {
    "a complete store": lambda store, out: write_random_couplings(str(out), "webdataset", SHAPE, 40, 1, seed=1),
    "a store that is being written": lambda store, out: StoreWriter(str(out), sample_spec()).initialize(),
    "an unfinished copy": lambda store, out: Root(str(out)).write("copy.json", canonical_json({"of": "0" * 64})),
    "tuples": lambda store, out: Root(str(out)).write("export.json", canonical_json({"of": "0" * 64})),
}


def write_samples(url: str) -> None:
    """Start a store of samples."""
    StoreWriter(url, sample_spec(rows=30)).initialize()


@pytest.mark.parametrize("occupant", OCCUPANTS)
@pytest.mark.parametrize("command", ["convert", "copy", "export", "write"])
def test_a_folder_of_something_else_is_refused(store: Path, tmp_path: Path, occupant: str, command: str) -> None:
    out = tmp_path / "out"
    OCCUPANTS[occupant](store, out)
    before = tree(str(out))
    commands = USERS | {"write": lambda store, out: write_samples(out)}
    with pytest.raises(StoreError, match=r"out: holds .*(write to another URL|expected nothing|Write to another URL)"):
        commands[command](str(store), str(out))
    assert tree(str(out)) == before


@pytest.mark.parametrize("fast", [True, False])
def test_files_replaced_after_their_check_are_checked_again(
    store: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    """Many files make the reader unmap some; when they are mapped again, they may be other files."""
    monkeypatch.setattr(rows_module, "MAX_MAPPED_FILES", 2)
    if not fast:
        monkeypatch.setattr("nfm.storage_specs.reading.column.supports_region", lambda placement: False)
    stream = CouplingStream(str(store), batch_size=10, seed=0, window_blocks=1)
    for _ in range(14):  # two epochs: every file of some draw was checked
        next(stream)
    for path in store.glob("z/*/*.tar"):
        changed = bytearray(path.read_bytes())
        changed[700] ^= 1
        replacement = path.with_suffix(".new")
        replacement.write_bytes(changed)
        replacement.replace(path)
    with pytest.raises(StoreError, match="its sha256 is not the one in the manifest"):
        list(itertools.islice(stream, 28))
    stream.close()
