"""Where data come from and on what terms: what may be written, and what is said when it changes."""

from pathlib import Path

import pytest

from nfm.pipeline.config import load_config
from nfm.pipeline.errors import ConfigError
from nfm.stages.attribution import AttributionConfig
from nfm.stages.prepare import DataConfig, prepare
from nfm.storage_specs.format.attribution import Attribution
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.writing.publish import annotate_store
from tests.tools.store_cases import Case, write_case

FOLDER = DataConfig(source="folder", image_size=8, channels=1, holdout=0.34, block_rows=8)


def test_a_changed_attribution_is_said_with_the_version(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{tmp_path}/out/train"

    def said(**fields: str) -> list[str]:
        capsys.readouterr()
        prepare(FOLDER, f"{tmp_path}/out", images, attribution=AttributionConfig(**fields))
        lines = capsys.readouterr().err.splitlines()
        return [line.removeprefix(f"{url}: ") for line in lines if line.startswith(f"{url}: ")]

    assert said(licence="MIT") == [], "the first version says so"
    assert said(licence="Apache-2.0") == ["version 2 changes licence 'MIT' → 'Apache-2.0'"]
    assert said(licence="Apache-2.0") == []
    assert said() == []
    assert said(creator="us", notes="n" * 100) == [
        "version 3 changes creator none → 'us'; notes none → 'nnnnnnnnnnnn...nnnnnnnnnnnnn'"
    ]
    assert Store(url).dataset.attribution == Attribution(licence="Apache-2.0", creator="us", notes="n" * 100)


def test_licences_are_checked_for_every_writer(tmp_path: Path) -> None:
    store = write_case(tmp_path / "store", Case())
    for wrong in ("our own", " ", "MIT OR"):
        with pytest.raises(StoreError, match="expected an SPDX expression"):
            annotate_store(store, Attribution(licence=wrong))
        with pytest.raises(ValueError, match=r"expected an SPDX expression|expected a text"):
            AttributionConfig(licence=wrong)
    with pytest.raises(StoreError, match="without password"):
        annotate_store(store, Attribution(source_url="https://me:secret@example.org/data"))
    assert Store(store.url).dataset.version == 1
    assert annotate_store(store, Attribution(licence="mit or apache-2.0")).attribution.licence == "MIT OR Apache-2.0"


def test_a_store_of_others_may_have_any_licence(tmp_path: Path) -> None:
    store = write_case(tmp_path / "store", Case(), Attribution(licence="our own"))
    assert annotate_store(store, Attribution(notes="read")).attribution == Attribution(licence="our own", notes="read")


@pytest.mark.parametrize(("field", "value"), [("licence", ""), ("creator", ""), ("notes", "  ")])
def test_an_empty_text_is_refused_as_such(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"attribution\.{field}: got '{value}'; expected a text, or no such key"):
        load_config("digits", [f"attribution.{field}='{value}'"])
    with pytest.raises(ConfigError, match=rf"attribution\.{field}: got ''; expected a text, or no such key"):
        load_config("digits", [f"attribution.{field}="])
