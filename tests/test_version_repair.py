"""Versions of a store after damage and interruption: what can be restored is the same version again."""

import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest

from nfm.storage_specs.format.attribution import Attribution
from nfm.storage_specs.format.names import LEASE_FILE
from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.verify import find_document_faults, find_faults
from nfm.storage_specs.reading.versions import list_versions
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.lease import Lease
from nfm.storage_specs.writing.publish import annotate_store, tag_version
from nfm.storage_specs.writing.repair import repair_store
from nfm.storage_specs.writing.transfer import copy_store
from tests.tools.stores import LAYOUT_NAMES, damage, edit, flip, ignore_progress, tree
from tests.tools.versions import encode, grown, interrupt_before


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


@pytest.mark.parametrize("harm", ["deleted", "flipped"])
@pytest.mark.parametrize("name", ["manifest.parquet", "sigma_f.npy", "z_sums.npy", "README.md"])
def test_a_lost_document_is_written_again_for_every_version_that_names_it(tmp_path: Path, name: str, harm: str) -> None:
    """The same bytes are the same version: its number, its tag and copies of it stay good."""
    url = grown(tmp_path)
    tag_version(Store(url), "paper")
    before = Store(url).document
    path = f"versions/0003/{name}" if name == "README.md" else f"versions/0002/{name}"
    if harm == "deleted":
        (tmp_path / "store" / path).unlink()
    else:
        damage(tmp_path / "store", path, flip(150))
    faults, blocks, is_complete = repair_store(url, ignore_progress)
    assert path in faults[0] and (blocks, is_complete) == ([], True)
    assert Store(url).document == before and list_versions(Store(url).root) == [1, 2, 3]
    for reference in ("", "@v1", "@v2", "@paper"):
        assert list(find_faults(Store(f"{url}{reference}"))) == []
    copy_store(Store(url), f"{tmp_path}/copy", ignore_progress, None)
    assert Store(f"{tmp_path}/copy@paper").document == before


@pytest.mark.parametrize("name", ["manifest.parquet", "sigma_f.npy", "croissant.json"])
def test_a_damaged_document_of_an_older_version_is_repaired_too(tmp_path: Path, name: str) -> None:
    url = grown(tmp_path)
    before = tree(url)
    (tmp_path / "store/versions/0001" / name).unlink()
    (fault,) = find_faults(Store(url))
    assert fault.file == "versions/0001.json" and f"versions/0001/{name}" in fault.message
    with pytest.raises(StoreError, match=f"0001/{name}.* nfm store repair"):
        copy_store(Store(url), f"{tmp_path}/copy", ignore_progress, None)
    assert repair_store(url, ignore_progress).is_complete
    assert tree(url) == before


def test_an_older_versions_document_that_nothing_else_says_cannot_be_repaired(tmp_path: Path) -> None:
    url = grown(tmp_path)
    (tmp_path / "store/versions/0001.json").unlink()
    before = tree(url)
    with pytest.raises(StoreError, match=r"0001.json is missing.*put the file there from a copy"):
        repair_store(url, ignore_progress)
    assert tree(url) == before, "the newest version stays"
    assert Store(url).dataset.version == 3


def test_a_damaged_tag_or_card_takes_nothing_away(tmp_path: Path) -> None:
    url = grown(tmp_path)
    before = tree(url)
    tag_version(Store(url), "paper")
    damage(tmp_path / "store", "tags/paper.json", lambda data: data[:10])
    damage(tmp_path / "store", "README.md", lambda data: b"")
    assert len(repair_store(url, ignore_progress).faults) == 3, "the tag, that it is removed, the card"
    assert tree(url) == before, "the tag is deleted, the card written again"


def test_a_tag_of_a_lost_version_stays(tmp_path: Path) -> None:
    url = grown(tmp_path)
    tag_version(Store(f"{url}@v1"), "first")
    document = tmp_path / "store/versions/0001.json"
    lost = document.read_bytes()
    document.write_bytes(lost[:100])
    with pytest.raises(StoreError, match="put the file there from a copy"):
        repair_store(url, ignore_progress)
    document.write_bytes(lost)
    assert Store(f"{url}@first").dataset.version == 1 and list(find_faults(Store(url))) == []


def test_repair_names_the_tags_that_it_removes(tmp_path: Path) -> None:
    url = grown(tmp_path)
    tag_version(Store(url), "paper")
    damage(tmp_path / "store", "tags/paper.json", edit(id="0" * 64))
    faults, _, is_complete = repair_store(url, ignore_progress)
    assert is_complete and any("tags/paper.json: the tag named no version and is removed" in fault for fault in faults)


def test_a_store_that_is_being_written_is_not_repaired(tmp_path: Path) -> None:
    url = grown(tmp_path)
    damage(tmp_path / "store", "z/k003/000001.tar", flip(1200))
    before = tree(url)
    with Lease(url, LEASE_FILE), pytest.raises(StoreError, match="is writing into it"):
        repair_store(url, ignore_progress)
    assert tree(url) == before


def test_between_repair_and_encode_every_command_says_what_to_do(tmp_path: Path) -> None:
    url = grown(tmp_path)
    damage(tmp_path / "store", "z/k003/000001.tar", flip(1200))
    assert repair_store(url, ignore_progress).damaged_blocks == [1]
    for call in (lambda: repair_store(url, ignore_progress), lambda: Store(url)):
        with pytest.raises(StoreError, match=r"no dataset.json: .* interrupted, .*repair.*: run nfm encode .* again"):
            call()
    with pytest.raises(StoreError, match="no dataset.json, and nothing of a store"):
        Store(f"{tmp_path}/elsewhere")


def test_a_history_that_does_not_fit_is_a_fault(tmp_path: Path) -> None:
    url = grown(tmp_path)
    shutil.copy(tmp_path / "store/versions/0001.json", tmp_path / "store/versions/0002.json")
    faults = find_document_faults(Store(url))
    assert any("it is not the parent that version 3 names" in fault.message for fault in faults)
    with pytest.raises(StoreError, match=r"0002.json: got version 1"):
        Store(f"{url}@v2")


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_an_interrupted_publication_leaves_the_old_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: LayoutName
) -> None:
    """Whatever file is the last that was written, readers see version 1 or version 2, and the same command ends it."""
    whole = f"{tmp_path}/whole"
    encode(whole, 2, layout)
    encode(whole, 4, layout)
    metadata = {path for path in tree(whole) if path.endswith("zarr.json")}
    copies = {"README.md", "croissant.json", *metadata}  # of the newest version, replaced just before dataset.json
    stops = ("versions/0002/sigma_f.npy", "versions/0002/croissant.json", "versions/0002.json", *sorted(copies))
    for stop_at in (*stops, "dataset.json"):
        url = f"{tmp_path}/{stop_at.replace('/', '-')}"
        encode(url, 2, layout)
        with monkeypatch.context() as patch:
            interrupt_before(patch, stop_at)
            with pytest.raises(KeyboardInterrupt):
                encode(url, 4, layout)
        store = Store(url)
        assert store.spec.num_draws == 2
        assert {fault.file for fault in find_faults(store)} <= copies
        assert all(np.array_equal(store.z(0, draw), Store(whole).z(0, draw)) for draw in range(2))
        encode(url, 4, layout)
        assert Store(url).dataset == Store(whole).dataset
        assert list(find_faults(Store(url))) == []


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
    assert repair_store(url, ignore_progress).is_complete
    repaired = Store(url)
    assert (repaired.dataset.id, repaired.dataset.version, repaired.dataset.parent) == (
        before.id,
        2,
        Store(f"{url}@v1").dataset.id,
    )
    assert list_versions(repaired.root) == [1, 2] and list(find_faults(repaired)) == []


ANNOTATE = """
import sys
from nfm.storage_specs.format.names import LEASE_FILE
from nfm.storage_specs.format.attribution import Attribution
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
