"""Versions of a store: numbered, immutable, each the parent of the next; what was begun on one goes on with it."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nfm.stages.train_student import train_student
from nfm.stages.training import Trainer
from nfm.storage_specs.format.names import LEASE_FILE
from nfm.storage_specs.format.schema import Attribution, Spec
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream, StreamState
from nfm.storage_specs.reading.verify import find_document_faults, find_faults
from nfm.storage_specs.reading.versions import find_version, list_tags, list_versions
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import Root
from nfm.storage_specs.storage.lease import Lease
from nfm.storage_specs.writing.publish import annotate_store, tag_version
from nfm.storage_specs.writing.transfer import copy_store, repair_store
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.kinds import KINDS
from tests.tools.make_fixtures import write_store
from tests.tools.random_couplings import random_coupling_spec
from tests.tools.small_run import Run, encode_in_process
from tests.tools.stores import block_of, damage, edit, flip, ignore_progress, tree

SHAPE = (1, 4, 4)


def spec_with(draws: int) -> Spec:
    return random_coupling_spec("webdataset", SHAPE, rows=70, draws=draws)


def encode(url: str, draws: int) -> None:
    """Write a store with so many draws, or add them; z is a function of block and draw."""
    spec = spec_with(draws)
    writer = StoreWriter(url, spec)
    writer.initialize()
    for unit in writer.list_missing_units():
        columns = block_of(spec, unit.block)
        unit_writer = writer.unit_writer(unit, columns["label"])
        unit_writer.write_base({"x": columns["x"]})
        for draw in unit.draws:
            rng = np.random.default_rng([unit.block, draw])
            z = rng.standard_normal((spec.rows_of(unit.block), *SHAPE), dtype=np.float32)
            unit_writer.write_draw(draw, z, None)
        unit_writer.commit()
    writer.finalize()


def grown(folder: Path) -> str:
    """A store with three versions: two draws, four draws, and a licence."""
    url = f"{folder}/store"
    encode(url, 2)
    encode(url, 4)
    annotate_store(Store(url), Attribution(licence="CC-BY-4.0"))
    return url


def test_each_change_is_a_version_that_shares_files(tmp_path: Path) -> None:
    url = grown(tmp_path)
    versions = [Store(f"{url}@v{number}").dataset for number in (1, 2, 3)]
    assert [(dataset.version, dataset.spec.num_draws) for dataset in versions] == [(1, 2), (2, 4), (3, 4)]
    assert [dataset.parent for dataset in versions] == [None, versions[0].id, versions[1].id]
    assert versions[1].id == versions[2].id, "attribution is outside the id"
    assert versions[0].id != versions[1].id
    assert Store(url).dataset == versions[2] and versions[2].attribution.licence == "CC-BY-4.0"
    assert versions[1].documents.manifest == versions[2].documents.manifest
    for number in (1, 2, 3):
        assert list(find_faults(Store(f"{url}@v{number}"))) == []
    assert (tmp_path / "store" / "dataset.json").read_bytes() == (tmp_path / "store/versions/0003.json").read_bytes()


def test_a_version_never_changes(tmp_path: Path) -> None:
    url = f"{tmp_path}/store"
    encode(url, 2)
    before = tree(url)
    encode(url, 4)
    after = tree(url)
    changed = {path for path, data in before.items() if after[path] != data}
    assert changed - {"cost.json"} == {"dataset.json", "README.md", "croissant.json", "commits/spec.json"}
    encode(url, 4)
    assert tree(url) == after, "nothing changed, so there is no new version"
    fresh = f"{tmp_path}/fresh"
    encode(fresh, 4)
    assert Store(fresh).dataset.id == Store(url).dataset.id


def test_a_version_is_opened_by_number_and_by_tag(tmp_path: Path) -> None:
    url = grown(tmp_path)
    tag_version(Store(f"{url}@v1"), "paper")
    tag_version(Store(f"{url}@v1"), "paper")
    assert Store(f"{url}@paper").spec.num_draws == 2
    assert Store(f"{url}@paper").version_url == f"{url}@v1"
    batch = next(CouplingStream(f"{url}@paper", batch_size=70, seed=0))
    assert set(batch.draw.tolist()) <= {0, 1}
    with pytest.raises(StoreError, match="tag paper is version 1; a tag stays"):
        tag_version(Store(url), "paper")
    with pytest.raises(StoreError, match=r"@v9: got a version that the store does not have; it has versions 1 to 3"):
        Store(f"{url}@v9")
    with pytest.raises(StoreError, match=r"@draft: got a tag that the store does not have; it has paper"):
        Store(f"{url}@draft")
    for name in ("v2", "a/b", "", "é", "x" * 65):
        with pytest.raises(StoreError, match="got tag"):
            tag_version(Store(url), name)
    damage(tmp_path / "store", "tags/paper.json", edit(id="0" * 64))
    with pytest.raises(StoreError, match="its id is not that of version 1"):
        Store(f"{url}@paper")
    assert [fault.file for fault in find_document_faults(Store(url))] == ["tags/paper.json"]


def test_a_folder_whose_name_has_an_at_is_a_store_too(tmp_path: Path) -> None:
    url = f"{tmp_path}/couplings@home"
    encode(url, 2)
    assert Store(url).url == url
    assert Store(f"{url}@v1").url == url
    first = Store(url).dataset.id
    encode(url, 4)
    assert find_version(url, first) == f"{url}@v1"


def test_nothing_is_written_to_a_version(tmp_path: Path) -> None:
    url = grown(tmp_path)
    with pytest.raises(StoreError, match="got a version to write to"):
        encode(f"{tmp_path}/other@v1", 2)
    with pytest.raises(StoreError, match="got a version to write to"):
        copy_store(Store(url), f"{tmp_path}/other@v1", ignore_progress, None)
    with pytest.raises(StoreError, match="older version; annotate"):
        annotate_store(Store(f"{url}@v1"), Attribution(notes="x"))
    with pytest.raises(StoreError, match=r"got a version; repair .*/store, the newest"):
        repair_store(f"{url}@v1", ignore_progress)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_store_is_not_annotated_while_it_is_written(tmp_path: Path) -> None:
    url = grown(tmp_path)
    with Lease(url, LEASE_FILE), pytest.raises(StoreError, match="is writing into it"):
        annotate_store(Store(url), Attribution(notes="x"))
    assert list_versions(Store(url).root) == [1, 2, 3]


def test_annotations_stay_when_draws_are_added_and_blocks_repaired(tmp_path: Path) -> None:
    url = f"{tmp_path}/store"
    encode(url, 2)
    annotate_store(Store(url), Attribution(licence="MIT", notes="first"))
    annotate_store(Store(url), Attribution(notes="second"))
    assert annotate_store(Store(url), Attribution(notes="second")).version == 3, "nothing new"
    encode(url, 4)
    assert Store(url).dataset.attribution == Attribution(licence="MIT", notes="second")
    damage(tmp_path / "store", "z/k003/000001.tar", flip(1200))
    before = Store(url).dataset
    repair_store(url, ignore_progress)
    encode(url, 4)
    assert Store(url).dataset == before, "the same bytes are the same version"


@pytest.mark.parametrize("name", ["manifest.parquet", "sigma_f.npy", "z_sums.npy", "README.md"])
def test_a_damaged_file_of_a_version_is_repaired_by_a_new_version_or_the_same_bytes(tmp_path: Path, name: str) -> None:
    url = grown(tmp_path)
    before = Store(url).dataset
    path = f"versions/0003/{name}" if name == "README.md" else f"versions/0002/{name}"
    damage(tmp_path / "store", path, flip(150))
    faults, blocks = repair_store(url, ignore_progress)
    assert path in faults[0] or "README.md" in faults[0]
    assert blocks == []
    encode(url, 4)
    repaired = Store(url)
    assert list(find_faults(repaired)) == []
    assert (repaired.dataset.id, repaired.dataset.attribution) == (before.id, before.attribution)
    assert repaired.dataset.version == 4 and repaired.dataset.parent == before.id


def test_a_history_that_does_not_fit_is_a_fault(tmp_path: Path) -> None:
    url = grown(tmp_path)
    shutil.copy(tmp_path / "store/versions/0001.json", tmp_path / "store/versions/0002.json")
    faults = find_document_faults(Store(url))
    assert "it is not the parent that version 3 names" in faults[0].message
    with pytest.raises(StoreError, match=r"0002.json: got version 1"):
        Store(f"{url}@v2")


def test_an_interrupted_publication_leaves_the_old_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever file is the last that was written, readers see version 1 or version 2, and the same command ends it."""
    whole = f"{tmp_path}/whole"
    encode(whole, 2)
    encode(whole, 4)
    for stop_at in ("versions/0002/sigma_f.npy", "versions/0002/croissant.json", "versions/0002.json", "dataset.json"):
        url = f"{tmp_path}/{stop_at.replace('/', '-')}"
        encode(url, 2)
        with monkeypatch.context() as patch:
            interrupt_before(patch, stop_at)
            with pytest.raises(KeyboardInterrupt):
                encode(url, 4)
        store = Store(url)
        assert store.spec.num_draws == 2
        # The cards are replaced just before dataset.json; nothing else of version 1 is touched.
        assert {fault.file for fault in find_faults(Store(f"{url}@v1"))} <= {"README.md", "croissant.json"}
        encode(url, 4)
        assert Store(url).dataset == Store(whole).dataset
        assert list(find_faults(Store(url))) == []


def test_a_copy_of_a_version_has_it_and_those_before(tmp_path: Path) -> None:
    url = grown(tmp_path)
    for reference, newest in (("", 3), ("@v2", 2), ("@v1", 1)):
        source = Store(f"{url}{reference}")
        copy = f"{tmp_path}/copy{newest}"
        copy_store(source, copy, ignore_progress, None)
        copied = Store(copy)
        assert copied.document == source.document
        assert list_versions(copied.root) == list(range(1, newest + 1))
        assert list(find_faults(copied)) == []
        for number in range(1, newest + 1):
            assert Store(f"{copy}@v{number}").document == Store(f"{url}@v{number}").document
        encode(copy, 4)
        assert Store(copy).dataset.id == Store(url).dataset.id


def test_a_copy_is_brought_up_to_date(tmp_path: Path) -> None:
    """The source gets draws and a licence; the copy stays version 1 until all of version 3 is there."""
    url, copy = f"{tmp_path}/store", f"{tmp_path}/copy"
    encode(url, 2)
    copy_store(Store(url), copy, ignore_progress, None)
    encode(url, 4)
    annotate_store(Store(url), Attribution(licence="MIT"))
    assert copy_store(Store(url), copy, ignore_progress, None) == 6, "the files of two draws"
    assert Store(copy).document == Store(url).document and list(find_faults(Store(copy))) == []
    assert list(find_faults(Store(f"{copy}@v1"))) == []
    with pytest.raises(StoreError, match=r"holds store .*, version 3; expected nothing, or version 1"):
        copy_store(Store(f"{url}@v1"), copy, ignore_progress, None)
    encode(f"{tmp_path}/other", 3)
    with pytest.raises(StoreError, match="holds store"):
        copy_store(Store(url), f"{tmp_path}/other", ignore_progress, None)


def test_a_copy_has_the_tags_of_its_versions(tmp_path: Path) -> None:
    url = grown(tmp_path)
    tag_version(Store(f"{url}@v1"), "first")
    tag_version(Store(f"{url}@v3"), "third")
    copy_store(Store(f"{url}@v2"), f"{tmp_path}/copy", ignore_progress, None)
    assert list_tags(Store(f"{tmp_path}/copy").root) == ["first"]
    assert Store(f"{tmp_path}/copy@first").document == Store(f"{url}@v1").document
    assert list(find_faults(Store(f"{tmp_path}/copy"))) == []


def test_another_parquet_writer_changes_neither_id_nor_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another pyarrow writes the same names as other bytes."""
    kind = replace(KINDS["pairs-bfloat16-stored"], names=True, draws=4)
    spec, values = kind.spec("webdataset"), kind.values()
    spec_before = spec.model_copy(update={"coupling": spec.nfm.model_copy(update={"draws": 2})})
    for name in ("one", "other"):
        write_store(f"{tmp_path}/{name}", spec_before, values)
        first = Store(f"{tmp_path}/one").dataset
        if name == "one":
            monkeypatch.setattr("nfm.storage_specs.writing.publish.encode_names", encode_names_with_gzip)
    other = Store(f"{tmp_path}/other").dataset
    assert other.id == first.id and other.documents.names != first.documents.names
    write_store(f"{tmp_path}/one", spec, values)
    grown_store = Store(f"{tmp_path}/one")
    assert grown_store.dataset.version == 2
    assert grown_store.dataset.documents.names == first.documents.names, "what is there already is shared"
    for reference in ("", "@v1"):
        assert list(find_faults(Store(f"{tmp_path}/one{reference}"))) == []


def encode_names_with_gzip(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table.combine_chunks(), buffer, compression="gzip")
    return buffer.getvalue()


@pytest.mark.parametrize("schema", ["1.2", "2.0"])
def test_repair_leaves_a_store_of_a_later_schema_alone(tmp_path: Path, schema: str) -> None:
    url = grown(tmp_path)
    for path in ("dataset.json", "versions/0003.json"):
        damage(tmp_path / "store", path, edit(schema_version=schema))
    before = tree(url)
    with pytest.raises(StoreError, match=f"got schema version {schema}, this nfm reads 1.1"):
        repair_store(url, ignore_progress)
    (tmp_path / "store/dataset.json").unlink()
    with pytest.raises(StoreError, match=f"got schema version {schema}, this nfm reads 1.1"):
        encode(url, 4)
    assert tree(url) == {path: data for path, data in before.items() if path != "dataset.json"}


def test_nothing_is_written_where_a_tag_could_be_meant(tmp_path: Path) -> None:
    url = grown(tmp_path)
    with pytest.raises(StoreError, match="got a version to write to"):
        encode(f"{url}@paper", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("document", ["reflow", "semidiscrete"])
def test_repair_leaves_a_store_of_a_later_kind_alone(tmp_path: Path, document: str) -> None:
    url = f"{tmp_path}/store"
    encode(url, 2)
    common = {"kind": document, "law": "philox-as241-v1", "seed": 0}
    couplings = {
        "reflow": common
        | {"draws": 1, "z_dtype": "float16", "z_scale_sha256": None, "sampler": "heun31", "guidance": 1.0}
        | {"precision": "fp32", "generator": {"architecture": {}, "sha256": "0" * 64, "training": {}}},
        "semidiscrete": common
        | {"draws": 2, "potentials": {"sha256": "0" * 64, "cost": "dot", "chi2": 0.01}, "source": "0" * 64},
    }
    for path in ("dataset.json", "versions/0001.json", "commits/spec.json"):
        damage(tmp_path / "store", path, edit(spec__coupling=couplings[document]))
    before = tree(url)
    with pytest.raises(StoreError, match=f"got a coupling of kind '{document}'; this nfm reads and writes 'nfm' alone"):
        repair_store(url, ignore_progress)
    assert tree(url) == before


@pytest.mark.parametrize("stop_at", ["versions/0003.json", "README.md", "dataset.json"])
def test_an_interrupted_annotation_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: str) -> None:
    url = f"{tmp_path}/store"
    encode(url, 2)
    encode(url, 4)
    with monkeypatch.context() as patch:
        interrupt_before(patch, stop_at)
        with pytest.raises(KeyboardInterrupt):
            annotate_store(Store(url), Attribution(licence="MIT"))
    assert Store(url).dataset.version == 2
    assert annotate_store(Store(url), Attribution(licence="MIT")).version == 3
    assert Store(url).dataset.attribution.licence == "MIT" and list(find_faults(Store(url))) == []


def test_a_store_is_not_annotated_between_an_interrupted_job_and_its_continuation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{tmp_path}/store"
    encode(url, 2)
    with monkeypatch.context() as patch:
        interrupt_before(patch, "dataset.json")
        with pytest.raises(KeyboardInterrupt):
            encode(url, 4)
    with pytest.raises(StoreError, match="was interrupted; run the same command again, and then annotate"):
        annotate_store(Store(url), Attribution(licence="MIT"))
    encode(url, 4)
    assert annotate_store(Store(url), Attribution(licence="MIT")).version == 3
    assert list(find_faults(Store(url))) == []


def test_all_documents_are_damaged_and_written_again(tmp_path: Path) -> None:
    url = grown(tmp_path)
    before = Store(url).dataset
    for name in ("dataset.json", "versions/0003.json", "versions/0002.json"):
        damage(tmp_path / "store", name, lambda data: data[:100])
    assert repair_store(url, ignore_progress)[1] == []
    encode(url, 4)
    repaired = Store(url)
    assert (repaired.dataset.id, repaired.dataset.version, repaired.dataset.parent) == (
        before.id,
        2,
        Store(f"{url}@v1").dataset.id,
    )
    assert list_versions(repaired.root) == [1, 2] and list(find_faults(repaired)) == []


def interrupt_before(monkeypatch: pytest.MonkeyPatch, path_of_file: str) -> None:
    """Stop the program before this file is written."""
    original = Root.write

    def write(root: Root, path: str, data: bytes) -> None:
        if path == path_of_file:
            raise KeyboardInterrupt
        original(root, path, data)

    monkeypatch.setattr(Root, "write", write)


def test_a_copy_is_the_version_that_was_opened(tmp_path: Path) -> None:
    """The source gets draws while it is copied."""
    url = f"{tmp_path}/store"
    encode(url, 2)
    opened = Store(url)
    calls = 0

    def add_draws(_bytes: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            encode(url, 4)

    copy_store(opened, f"{tmp_path}/copy", add_draws, None)
    assert calls > 2 and Store(url).spec.num_draws == 4
    copied = Store(f"{tmp_path}/copy")
    assert copied.dataset == opened.dataset and list(find_faults(copied)) == []


def test_a_reader_of_a_version_goes_on_when_draws_are_added(tmp_path: Path) -> None:
    url = f"{tmp_path}/store"
    encode(url, 2)
    expected = CouplingStream(url, batch_size=35, seed=3)
    batches = [next(expected) for _ in range(8)]
    stream = CouplingStream(url, batch_size=35, seed=3)
    for number in range(3):
        torch.testing.assert_close(next(stream).z, batches[number].z, rtol=0, atol=0)
    encode(url, 4)
    for number in range(3, 8):
        torch.testing.assert_close(next(stream).z, batches[number].z, rtol=0, atol=0)
    resumed = CouplingStream(f"{url}@v1", batch_size=35, seed=3)
    resumed.state = StreamState(epoch=2, position=35)
    torch.testing.assert_close(next(resumed).z, batches[5].z, rtol=0, atol=0)


def test_the_version_with_an_id_is_found(tmp_path: Path) -> None:
    url = grown(tmp_path)
    first, second = Store(f"{url}@v1").dataset.id, Store(url).dataset.id
    assert find_version(url, second) == url
    assert find_version(url, first) == f"{url}@v1"
    assert find_version(f"{url}@v2", first) == f"{url}@v2", "what the user says stands"
    assert find_version(url, "0" * 64) == url


ANNOTATE = """
import sys
from nfm.storage_specs.format.schema import Attribution
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.writing.publish import annotate_store
store = Store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
annotate_store(store, Attribution(notes=sys.argv[2]))
"""


@pytest.mark.long
def test_two_annotations_at_once_make_no_mixed_version(tmp_path: Path) -> None:
    for trial in range(6):
        url = f"{tmp_path}/{trial}"
        encode(url, 2)
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", ANNOTATE, url, note], stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True
            )
            for note in ("one", "other")
        ]
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        ended = [process.wait(60) for process in processes]
        assert 0 in ended
        assert list(find_faults(Store(url))) == []
        assert Store(url).dataset.version == 1 + ended.count(0)


class StopError(Exception):
    """Ends a training in the middle."""


def test_a_training_continues_on_the_version_it_began_with(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws, order and state are those of version 1, also after version 2 exists."""
    store = f"{tmp_path}/store"
    shutil.copytree(run.couplings["webdataset"], store)
    train_student(run.config.student, store, f"{tmp_path}/whole")
    original = Trainer._step
    steps = 0

    def step(*arguments: object) -> object:
        nonlocal steps
        steps += 1
        if steps > 7:
            raise StopError
        return original(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        with pytest.raises(StopError):
            train_student(run.config.student, store, f"{tmp_path}/parts")
    first_id = Store(store).dataset.id
    more = run.config.encode.model_copy(update={"draws": 5})
    config = run.config.model_copy(update={"encode": more})
    encode_in_process(config, f"{run.samples}/train", run.teacher, store, "webdataset")
    assert Store(store).dataset.version == 2 and Store(store).dataset.id != first_id
    document = train_student(run.config.student, store, f"{tmp_path}/parts")
    assert document["run"]["couplings"] == first_id
    whole = train_student(run.config.student, store, f"{tmp_path}/whole")
    assert whole["run"]["couplings"] == first_id, "a finished training is recognized too"
    assert document["curves"] == whole["curves"]
    parts = (tmp_path / "parts/model.safetensors").read_bytes()
    header_bytes = 8 + int.from_bytes(parts[:8], "little")
    assert parts[header_bytes:] == (tmp_path / "whole/model.safetensors").read_bytes()[-len(parts) + header_bytes :]
    fresh = train_student(run.config.student, store, f"{tmp_path}/fresh")
    assert fresh["run"]["couplings"] == Store(store).dataset.id, "a new training takes the newest"


def test_the_document_says_where_its_files_are(tmp_path: Path) -> None:
    """A reader without our code finds everything from dataset.json."""
    url = grown(tmp_path)
    document = json.loads((tmp_path / "store/dataset.json").read_text())
    sigma_f = np.load(tmp_path / "store" / document["documents"]["sigma_f"]["path"], allow_pickle=False)
    assert np.array_equal(sigma_f, Store(url).sigma_f)
    assert document["documents"]["sigma_f"]["path"] == "versions/0002/sigma_f.npy"
