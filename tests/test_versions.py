"""Versions of a store: numbered, immutable, each the parent of the next; what was begun on one goes on with it."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nfm.stages.train_student import train_student
from nfm.stages.training import Trainer
from nfm.storage_specs.format.attribution import Attribution
from nfm.storage_specs.format.names import LEASE_FILE
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream, StreamState
from nfm.storage_specs.reading.verify import find_document_faults, find_faults
from nfm.storage_specs.reading.versions import find_version, list_tags, list_versions
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import Root
from nfm.storage_specs.storage.lease import Lease
from nfm.storage_specs.writing.publish import annotate_store, tag_version
from nfm.storage_specs.writing.repair import repair_store
from nfm.storage_specs.writing.transfer import copy_store
from tests.tools.kinds import KINDS
from tests.tools.make_fixtures import write_store
from tests.tools.small_run import Run, encode_in_process
from tests.tools.stores import damage, edit, ignore_progress, tree
from tests.tools.versions import encode, grown


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


def test_a_name_that_no_version_has_is_none(tmp_path: Path) -> None:
    (tmp_path / "versions").mkdir()
    for name in ("0001.json", "9999999.json", "00002.json", "0000003.json", "0000.json", "٠٠٠٤.json", "0005.json.tmp"):
        (tmp_path / "versions" / name).touch()
    assert list_versions(Root(str(tmp_path))) == [1, 9999999]


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


def test_nothing_is_written_where_a_tag_could_be_meant(tmp_path: Path) -> None:
    url = grown(tmp_path)
    with pytest.raises(StoreError, match="got a version to write to"):
        encode(f"{url}@paper", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


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


class StopError(Exception):
    """Ends a training in the middle."""


def test_a_training_continues_on_the_version_it_began_with(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
        return original(*arguments)  # type: ignore[arg-type]  # those of the step that it stands for

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        with pytest.raises(StopError):
            train_student(run.config.student, store, f"{tmp_path}/parts")
    first_id = Store(store).dataset.id
    more = run.config.encode.model_copy(update={"draws": 5})
    config = run.config.model_copy(update={"encode": more})
    encode_in_process(config, f"{run.samples}/train", run.teacher, store, "webdataset")
    assert Store(store).dataset.version == 2 and Store(store).dataset.id != first_id
    capsys.readouterr()
    document = train_student(run.config.student, store, f"{tmp_path}/parts")
    told = f"{tmp_path}/parts stays on {store}@v1, on which it was begun; another folder would take the newer {store}"
    assert told in capsys.readouterr().err.splitlines()
    assert document["run"]["couplings"] == first_id
    whole = train_student(run.config.student, store, f"{tmp_path}/whole")
    assert whole["run"]["couplings"] == first_id, "a finished training is recognized too"
    assert document["curves"] == whole["curves"]
    parts = (tmp_path / "parts/model.safetensors").read_bytes()
    header_bytes = 8 + int.from_bytes(parts[:8], "little")
    assert parts[header_bytes:] == (tmp_path / "whole/model.safetensors").read_bytes()[-len(parts) + header_bytes :]
    capsys.readouterr()
    fresh = train_student(run.config.student, store, f"{tmp_path}/fresh")
    assert fresh["run"]["couplings"] == Store(store).dataset.id, "a new training takes the newest"
    assert "stays on" not in capsys.readouterr().err


def test_the_document_says_where_its_files_are(tmp_path: Path) -> None:
    """A reader without our code finds everything from dataset.json."""
    url = grown(tmp_path)
    document = json.loads((tmp_path / "store/dataset.json").read_text())
    sigma_f = np.load(tmp_path / "store" / document["documents"]["sigma_f"]["path"], allow_pickle=False)
    assert np.array_equal(sigma_f, Store(url).sigma_f)
    assert document["documents"]["sigma_f"]["path"] == "versions/0002/sigma_f.npy"
