"""The document of a version that somebody changed is not published again: the command that wrote the store writes a
sound one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.verify import find_faults
from nfm.storage_specs.storage.documents import canonical_json
from nfm.storage_specs.storage.files import sha256
from tests.tools.kinds import KINDS

KIND = KINDS["samples-names"]


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
