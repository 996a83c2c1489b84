"""Versions that somebody changed on purpose: a document is not published again, and a repair goes by what the writer
committed."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nfm.pipeline.store_cli import describe_versions
from nfm.pipeline.store_cli import store as store_commands
from nfm.storage_specs.format.attribution import Attribution
from nfm.storage_specs.format.card import list_code
from nfm.storage_specs.format.dataset import parse_dataset
from nfm.storage_specs.format.names import MAX_VERSION, version_file
from nfm.storage_specs.format.schema import Dataset
from nfm.storage_specs.reading import verify, versions
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.verify import describe_weak_promises, find_document_faults, find_faults
from nfm.storage_specs.reading.versions import list_documents, list_versions
from nfm.storage_specs.storage.documents import canonical_json
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import sha256
from nfm.storage_specs.writing.publish import annotate_store, tag_version
from nfm.storage_specs.writing.repair import repair_store
from nfm.storage_specs.writing.transfer import copy_store
from nfm.storage_specs.writing.writer import read_started_spec
from tests.tools.fuzz_files import change_files, read_files
from tests.tools.fuzz_seals import seal
from tests.tools.kinds import KINDS
from tests.tools.stores import damage, edit, flip, ignore_progress

KIND, PAIRS = KINDS["samples-names"], KINDS["pairs-float16-stored"]

SUMS, COMMIT = "sums/000001.k000-002.npy", "commits/000001.k000-002.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    KIND.write(str(root), "webdataset")
    return root


def other_classes(document: dict[str, Any], _root: Path) -> None:
    document["spec"]["class_names"][0] = "other"


def other_records(document: dict[str, Any], _root: Path) -> None:
    document["records"]["x"]["members"][0]["value_offset"] += 1


def other_totals(document: dict[str, Any], _root: Path) -> None:
    document["totals"]["bytes"] += 1


def forged(name: str) -> Callable[[dict[str, Any], Path], None]:
    """Another file in place of a document, whose sha256 agrees with it."""

    def change(document: dict[str, Any], root: Path) -> None:
        file = document["documents"][name]
        (root / file["path"]).write_bytes(b"PAR1 and no more")
        file["sha256"] = sha256(b"PAR1 and no more")

    return change


@pytest.mark.parametrize("change", [other_classes, other_records, other_totals, forged("manifest"), forged("names")])
def test_a_changed_document_is_not_published_again(
    sound: Path, tmp_path: Path, change: Callable[[dict[str, Any], Path], None]
) -> None:
    root = tmp_path / "store"
    shutil.copytree(sound, root)
    document = json.loads((root / "dataset.json").read_bytes())
    change(document, root)
    (root / "versions" / "0001.json").write_bytes(canonical_json(document))
    (root / "dataset.json").unlink()
    KIND.write(str(root), "webdataset")
    assert Store(str(root)).dataset.id == Store(str(sound)).dataset.id
    assert [fault.message for fault in find_faults(Store(str(root)))] == []


def test_a_file_that_the_manifest_has_and_the_writer_did_not_commit_is_written_again(tmp_path: Path) -> None:
    """z is changed, and all documents agree with it but σ_f."""
    root, path = tmp_path / "store", "z/k001/000001.tar"
    PAIRS.write(str(root), "webdataset")
    true_id = Store(str(root)).dataset.id
    damage(root, path, flip(512 + 128))
    files = read_files(root)
    seal(files, commits=False, respecify=False)
    change_files(root, read_files(root), files, tmp_path)
    assert Store(str(root)).dataset.id != true_id and list(find_faults(Store(str(root))))
    repaired = repair_store(str(root), ignore_progress)
    assert repaired.damaged_blocks == [1] and not repaired.is_complete
    assert f"{root}/{path}: its bytes are not the committed ones" in repaired.faults
    PAIRS.write(str(root), "webdataset")
    assert Store(str(root)).dataset.id == true_id
    assert list(find_faults(Store(str(root)))) == []


def test_z_that_contradicts_its_sums_is_not_called_repaired(tmp_path: Path) -> None:
    """z is changed, and the commit records agree with it, but no sums do."""
    root = tmp_path / "store"
    PAIRS.write(str(root), "webdataset")
    damage(root, "z/k001/000001.tar", flip(512 + 128))
    files = read_files(root)
    seal(files, commits=True, respecify=False)
    change_files(root, read_files(root), files, tmp_path)
    with pytest.raises(StoreError, match=r"not the sums over z.*nothing tells which block is wrong; copy"):
        repair_store(str(root), ignore_progress)
    assert list(find_faults(Store(str(root))))


@pytest.mark.parametrize(("path", "old", "new"), [(SUMS, b"'<f8'", b"'>f8'"), (COMMIT, b"null", b"0.0 ")])
def test_a_unit_that_was_committed_with_other_documents_is_refused(
    tmp_path: Path, path: str, old: bytes, new: bytes
) -> None:
    """Sums of another type, and an error of x, which has none."""
    root = tmp_path / "store"
    PAIRS.write(str(root), "webdataset")
    (root / "dataset.json").unlink()
    damage(root, path, lambda data: data.replace(old, new, 1))
    files = read_files(root)
    seal(files, commits=True, respecify=False)
    change_files(root, read_files(root), files, tmp_path)
    with pytest.raises(StoreError, match=path):
        PAIRS.write(str(root), "webdataset")
    assert not (root / "dataset.json").exists()


@pytest.mark.parametrize("content", [b"{}", b"[]", b"null", None])
def test_a_spec_that_is_none_is_not_taken_for_one_of_schema_1_0(tmp_path: Path, content: bytes | None) -> None:
    PAIRS.write(str(tmp_path), "webdataset")
    (tmp_path / "commits" / "spec.json").write_bytes(content or (tmp_path / COMMIT).read_bytes())
    with pytest.raises(StoreError, match=r"commits/spec\.json: got no readable schema_version"):
        read_started_spec(str(tmp_path))


@pytest.mark.parametrize("harm", [b"", None])
def test_an_attribution_whose_document_is_damaged_is_not_lost(tmp_path: Path, harm: bytes | None) -> None:
    """It stands in dataset.json still, and neither another annotation nor the writer takes that of an older version."""
    url, path = str(tmp_path), tmp_path / "versions" / "0002.json"
    KIND.write(url, "webdataset")
    annotate_store(Store(url), Attribution(licence="MIT"))
    for write in (
        lambda: annotate_store(Store(url), Attribution(notes="x")),
        lambda: KIND.write(url, "webdataset"),
    ):
        path.unlink() if harm is None else path.write_bytes(harm)
        write()
        assert Store(url).dataset.attribution == Attribution(licence="MIT", notes="x")
        assert Store(url).dataset.version == 3 and list(find_faults(Store(url))) == []
        path = tmp_path / "versions" / "0003.json"


def test_an_annotation_is_not_written_over_a_document_that_disagrees(sound: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    shutil.copytree(sound, root)
    damage(root, "versions/0001.json", edit(records={}))
    with pytest.raises(StoreError, match=r"versions/0001\.json: its `records`"):
        annotate_store(Store(str(root)), Attribution(notes="x"))


@pytest.mark.parametrize("card", ["README.md", "croissant.json"])
def test_a_lost_card_of_schema_1_0_is_a_fault(tmp_path: Path, card: str) -> None:
    with tarfile.open(Path(__file__).parent / "fixtures/format-1.0/webdataset-samples.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    (tmp_path / card).unlink()
    assert [fault.file for fault in find_faults(Store(str(tmp_path)))] == [card]


def test_what_lies_beyond_the_newest_version_is_no_version(tmp_path: Path) -> None:
    KIND.write(str(tmp_path), "webdataset")
    (tmp_path / "versions" / "0009.json").mkdir()
    assert [dataset.version for dataset in list_documents(Store(str(tmp_path)).root)] == [1]


def test_a_cost_that_cannot_be_read_is_a_fault_and_repaired(tmp_path: Path) -> None:
    """No hash covers it, and what moves the store reads it."""
    PAIRS.write(str(tmp_path), "webdataset")
    store, cost = Store(str(tmp_path)), (tmp_path / "cost.json").read_bytes()
    (tmp_path / "cost.json").write_bytes(b"")
    assert [fault.file for fault in find_faults(Store(store.url))] == ["cost.json"]
    assert repair_store(store.url, ignore_progress).is_complete
    assert (tmp_path / "cost.json").read_bytes() == cost and list(find_faults(Store(store.url))) == []


def test_a_number_of_versions_is_no_work(tmp_path: Path) -> None:
    """A small store that calls itself the last of a million versions."""
    root, copied = tmp_path / "store", f"{tmp_path}/copy"
    KIND.write(str(root), "webdataset")
    damage(root, "dataset.json", edit(version=MAX_VERSION, parent=Store(str(root)).dataset.id))
    (root / "versions/0001.json").unlink()
    shutil.copy(root / "dataset.json", root / version_file(MAX_VERSION))
    store = Store(f"{root}@v{MAX_VERSION}")
    assert [fault.file for fault in find_faults(store)] == [version_file(MAX_VERSION - 1)]
    with pytest.raises(StoreError, match=rf"{MAX_VERSION - 1}\.json.*nothing was copied"):
        copy_store(store, copied, ignore_progress, None)
    with pytest.raises(StoreError, match="^.*/store: got version 1000000, the last that a store can have; [^\n]*$"):
        annotate_store(Store(str(root)), Attribution(notes="x"))
    assert list_versions(store.root) == [MAX_VERSION]
    with pytest.raises(StoreError, match=rf"{MAX_VERSION - 1}\.json is missing"):
        repair_store(str(root), ignore_progress)


def test_tags_make_no_version_be_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KIND.write(str(tmp_path), "webdataset")
    for notes in ("second", "third"):
        annotate_store(Store(str(tmp_path)), Attribution(notes=notes))
    for number in range(30):
        tag_version(Store(f"{tmp_path}@v{number % 3 + 1}"), f"tag-{number}")
    parsed: list[str] = []

    def parse(data: bytes, name: str) -> Dataset:
        parsed.append(name.rpartition("/")[2])
        return parse_dataset(data, name)

    for module in (versions, verify):
        monkeypatch.setattr(module, "parse_dataset", parse)
    store = Store(str(tmp_path))
    assert len(describe_versions(store)) == 3 and parsed == ["dataset.json", "0001.json", "0002.json"]
    parsed.clear()
    assert find_document_faults(store) == [] and parsed == ["0002.json", "0001.json"]


@pytest.mark.parametrize("part", ["preprocessing", "coupling.teacher.architecture", "coupling.teacher.training"])
def test_parts_without_a_schema_have_a_size(tmp_path: Path, part: str) -> None:
    PAIRS.write(str(tmp_path), "webdataset")
    document = json.loads((tmp_path / "dataset.json").read_bytes())
    *sections, field = part.split(".")
    section = document["spec"]
    for name in sections:
        section = section[name]
    section[field] = {"note": ["x"] * 300_000}
    (tmp_path / "dataset.json").write_bytes(canonical_json(document))
    with pytest.raises(StoreError, match=rf"spec\..*{field}.*got 1500010 bytes of JSON, expected at most 1048576"):
        Store(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "said", "claimed"),
    [
        ("README.md", b'"x/*.tar"', b'"/etc/hostname"'),
        ("README.md", b"import webdataset", b"import os; import webdataset"),
        ("README.md", b"# ", b"~~~python\nimport os\n~~~\n# "),
        ("croissant.json", b'"x/', b'"https://elsewhere.example/x/'),
    ],
)
def test_cards_that_are_not_those_of_this_nfm_are_named(tmp_path: Path, name: str, said: bytes, claimed: bytes) -> None:
    """Other programs read the files that a card names; no id covers them."""
    root = tmp_path / "store"
    PAIRS.write(str(root), "webdataset")
    assert list(describe_weak_promises(Store(str(root)))) == []
    assert len(list_code((root / "README.md").read_bytes())) == 3, "front matter, and code for two libraries"
    data = (root / name).read_bytes().replace(said, claimed)
    document = json.loads((root / "dataset.json").read_bytes())
    assert sha256(data) != document["documents"][name.partition(".")[0].lower()]["sha256"]
    document["documents"][name.partition(".")[0].lower()]["sha256"] = sha256(data)
    for path in (name, f"versions/0001/{name}"):
        (root / path).write_bytes(data)
    for path in ("dataset.json", "versions/0001.json"):
        (root / path).write_bytes(canonical_json(document))
    assert list(find_faults(Store(str(root)))) == []
    for command in (["verify", str(root)], ["copy", str(root), f"{tmp_path}/copy"]):
        result = CliRunner().invoke(store_commands, command)
        assert result.exit_code == 0, result.output
        assert (
            f"note: {root}/versions/0001/{name}: what programs go by in it is not what this nfm writes" in result.output
        )
