"""The cards of stores: what `datasets` of Hugging Face and `mlcroissant` of MLCommons make of them, and the code in the
README."""

import hashlib
import io
import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from nfm.storage_specs.format import codecs
from nfm.storage_specs.format.attribution import Attribution
from nfm.storage_specs.format.card import readme
from nfm.storage_specs.format.card_text import Z_IS_THE_IMAGE
from nfm.storage_specs.format.croissant import croissant
from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.writing.publish import annotate_store
from nfm.storage_specs.writing.tuples import export_tuples
from tests.tools.small_run import Run
from tests.tools.store_cases import KNOWN, Case, write_case
from tests.tools.stores import LAYOUT_NAMES, ignore_progress

# Of rdflib and pandas, on how mlcroissant calls them.
pytestmark = pytest.mark.filterwarnings("ignore:ConjunctiveGraph is deprecated", "ignore:The inplace keyword")

CLASSES = ["a", "b", "c"]
CASES = [
    *(Case(layout, samples=samples) for layout in LAYOUT_NAMES for samples in (False, True)),
    *(Case(layout, labels=False, names=True, noise_stored=False) for layout in LAYOUT_NAMES),
    *(Case(layout, latents="bfloat16", mirrored=True, z_dtype="int8") for layout in LAYOUT_NAMES),
    Case("webdataset", samples=True, latents="float32", mirrored=True, names=True),
]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """load_dataset of Hugging Face, offline, with a cache of its own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()

    def load_dataset(folder: str, *arguments: str, **options: Any) -> Any:
        return datasets.load_dataset(folder, *arguments, cache_dir=str(tmp_path / "hf"), **options)

    return load_dataset


def values_of(store: Store, name: str, draw: int = -1) -> NDArray[Any]:
    """A column of a whole store."""
    return np.concatenate([store.column(name, block, draw) for block in range(store.spec.num_blocks)])


@pytest.mark.parametrize("attribution", [Attribution(), KNOWN], ids=["unknown", "known"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_mlcroissant_has_no_complaint(
    mlc: Any, tmp_path: Path, case: Case, attribution: Attribution, caplog: pytest.LogCaptureFixture
) -> None:
    from absl import logging

    store = write_case(tmp_path / "store", case, attribution)
    folders = [tmp_path / "store"]
    if not case.samples:
        export_tuples(store, str(tmp_path / "tuples"), ignore_progress, None)
        folders.append(tmp_path / "tuples")
    logger = logging.get_absl_logger()
    logger.addHandler(caplog.handler)
    try:
        for folder in folders:
            metadata = mlc.Dataset(folder / "croissant.json").metadata
            assert metadata.ctx.issues.report() == ""
            assert metadata.ctx.is_v1_1()
            document = json.loads((folder / "croissant.json").read_text())
            for file in document["distribution"]:
                if file["@type"] == "cr:FileObject":
                    assert hashlib.sha256((folder / file["contentUrl"]).read_bytes()).hexdigest() == file["sha256"]
            if attribution == KNOWN:
                assert metadata.license[0].name == "CC-BY-4.0"
                assert metadata.cite_as == KNOWN.citation
                assert metadata.creators[0].name == "Jane Doe"
                assert metadata.url == KNOWN.source_url
                assert "For research only." in document["usageInfo"]["text"]
            else:
                assert metadata.license[0].name == "NOASSERTION"
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.message for record in caplog.records] == []


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_croissant_covers_every_file_and_states_its_origin(mlc: Any, tmp_path: Path, layout: LayoutName) -> None:
    store = write_case(tmp_path, Case(layout, names=True), KNOWN)
    document = json.loads((tmp_path / "croissant.json").read_text())
    patterns = [
        file["includes"] for file in document["distribution"] if "includes" in file and "containedIn" not in file
    ]
    for record in store.files.values():
        assert any(fnmatch(record.path, pattern) for pattern in patterns), record.path
    dataset = mlc.Dataset(tmp_path / "croissant.json")
    manifest = pq.read_table(tmp_path / "versions/0001/manifest.parquet").to_pylist()
    records = list(dataset.records("files"))
    assert [record["files/sha256"].decode() for record in records] == [row["sha256"] for row in manifest]
    assert [record["files/path"].decode() for record in records] == [row["path"] for row in manifest]
    assert [record["names/name"] for record in dataset.records("names")] == [f"i{i}.png".encode() for i in range(70)]
    assert [record["classes/name"] for record in dataset.records("classes")] == CLASSES
    used = document["prov:wasGeneratedBy"]["prov:used"]
    assert {"1" * 64} == {entity["sha256"] for entity in used if "sha256" in entity}
    assert any("philox-as241-v1, seed 7" in entity["prov:label"] for entity in used)
    sources = document["prov:wasDerivedFrom"]
    assert [source.get("@id", source.get("url")) for source in sources] == ["urn:nfm:" + "2" * 64, KNOWN.source_url]
    assert document["version"] == "1.0.0" and document["identifier"] == store.dataset.id


def test_a_new_version_has_cards_of_its_own(tmp_path: Path) -> None:
    write_case(tmp_path, Case())
    first = (tmp_path / "README.md").read_text()
    annotated = annotate_store(Store(str(tmp_path)), KNOWN)
    card, document = (tmp_path / "README.md").read_text(), json.loads((tmp_path / "croissant.json").read_text())
    assert (annotated.version, document["version"]) == (2, "2.0.0")
    assert "Version 2 of store " in card and "Jane Doe" in card and "Jane Doe" not in first
    assert (tmp_path / "versions/0001/README.md").read_text() == first
    assert "prov:wasRevisionOf" not in document  # the content is the same
    changed = annotated.model_copy(update={"parent": "5" * 64})
    assert croissant(changed)["prov:wasRevisionOf"]["@id"] == "urn:nfm:" + "5" * 64


def test_mlcroissant_reads_tuples_as_our_reader_reads_the_store(mlc: Any, tmp_path: Path) -> None:
    store = write_case(tmp_path / "store", Case(mirrored=True))
    export_tuples(store, str(tmp_path / "tuples"), ignore_progress, None)
    records = list(mlc.Dataset(tmp_path / "tuples" / "croissant.json").records("pairs"))
    by_key = {record["pairs/key"].decode(): record for record in records}
    assert len(records) == len(by_key) == 140
    for block in range(store.spec.num_blocks):
        for draw in range(2):
            x, label = store.x_of(block, draw), store.column("label", block)
            z, noise = store.column("z", block, draw), store.column("noise", block, draw)
            for row, index in enumerate(store.spec.indices(block)):
                record = by_key.pop(f"{index:012d}_k{draw:03d}")
                for name, value in (("x", x[row]), ("z", z[row]), ("noise", noise[row])):
                    loaded = np.load(io.BytesIO(record[f"pairs/{name}"]), allow_pickle=False)
                    assert loaded.dtype == value.dtype and np.array_equal(loaded, value)
                assert record["pairs/label"] == label[row]
    assert not by_key


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_loads_each_column_of_a_webdataset_store(load: Any, tmp_path: Path, streaming: bool) -> None:
    store = write_case(tmp_path / "store", Case(latents="float32", mirrored=True, z_dtype="float32"))
    expected_keys = [f"{index:012d}" for index in range(70)]
    for config, column, draw in (
        ("x", "x", -1),
        ("x_mirrored", "x_mirrored", -1),
        ("z-k001", "z", 1),
        ("noise-k000", "noise", 0),
    ):
        rows = list(load(store.url, config, split="train", streaming=streaming))
        assert [row["__key__"] for row in rows] == expected_keys
        values = np.array([row[f"{column}.npy"] for row in rows])
        assert np.array_equal(values, values_of(store, column, draw))
        expected_columns = {f"{column}.npy", "__key__", "__url__"} | (
            {"cls"} if config in ("x", "x_mirrored") else set()
        )
        assert set(rows[0]) == expected_columns
        if config == "x":
            assert [row["cls"] for row in rows] == values_of(store, "label").tolist()
    with pytest.raises(ValueError, match="Config name is missing"):
        load(store.url)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("labels", [False, True])
def test_datasets_loads_samples_and_tuples_in_one_call(
    load: Any, tmp_path: Path, labels: bool, streaming: bool
) -> None:
    samples = write_case(tmp_path / "samples", Case(samples=True, labels=labels))
    rows = list(load(samples.url, split="train", streaming=streaming))
    assert np.array_equal(np.array([row["x.npy"] for row in rows]), values_of(samples, "x"))
    assert set(rows[0]) == {"x.npy", "__key__", "__url__"} | ({"cls"} if labels else set())

    store = write_case(tmp_path / "store", Case(labels=labels, noise_stored=False))
    export_tuples(store, str(tmp_path / "tuples"), ignore_progress, None)
    rows = list(load(str(tmp_path / "tuples"), split="train", streaming=streaming))
    assert [row["__key__"] for row in rows] == [f"{index:012d}_k{draw:03d}" for draw in range(2) for index in range(70)]
    assert set(rows[0]) == {"x.npy", "z.npy", "noise.npy", "__key__", "__url__"} | ({"cls"} if labels else set())
    for draw in range(2):
        of_draw = rows[70 * draw : 70 * (draw + 1)]
        assert np.array_equal(np.array([row["x.npy"] for row in of_draw]), values_of(store, "x"))
        for name in ("z", "noise"):
            assert np.array_equal(np.array([row[f"{name}.npy"] for row in of_draw]), values_of(store, name, draw))
        if labels:
            assert [row["cls"] for row in of_draw] == values_of(store, "label").tolist()


@pytest.mark.parametrize("samples", [False, True])
def test_datasets_loads_nothing_from_a_zarr_store(load: Any, tmp_path: Path, samples: bool) -> None:
    """Without a card it takes zarr.json for the data."""
    from datasets.exceptions import DataFilesNotFoundError

    store = write_case(tmp_path / "store", Case("zarr", samples=samples))
    for streaming in (False, True):
        with pytest.raises(DataFilesNotFoundError):
            load(store.url, streaming=streaming)
    card = (tmp_path / "store" / "README.md").read_text()
    assert "DataFilesNotFoundError" in card
    (tmp_path / "store" / "README.md").unlink()
    assert "zarr_format" in next(iter(load(store.url, split="train", streaming=True)))


def code_blocks(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "case", [*CASES, Case(z_dtype="bfloat16"), Case(z_dtype="float32"), Case("zarr", z_dtype="bfloat16")], ids=str
)
def test_the_code_in_a_readme_reads_the_store(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    store = write_case(tmp_path / "store", case)
    spec = store.spec
    x = store.column("x", 0).astype(np.float32)
    if case.latents is not None:
        x = codecs.decode_float(store.column("x", 0), case.latents)
    data = (x + 0.25) * 0.5 if case.latents else x / 127.5 - 1
    monkeypatch.chdir(tmp_path / "store")
    first, *others = code_blocks((tmp_path / "store" / "README.md").read_text())
    got: dict[str, Any] = {}
    exec(first, got)
    rows = slice(None) if case.layout == "zarr" else -1  # the loop over a tar ends with its last row
    np.testing.assert_allclose(got["x"], data[rows], rtol=1e-5, atol=1e-6)
    if spec.has_labels:
        assert np.array_equal(got["label"], store.column("label", 0)[rows])
    if spec.coupling is not None:
        np.testing.assert_allclose(got["z"], (store.z(0, 0) / store.sigma_f)[rows], rtol=1e-5)
    if case.layout == "zarr":
        assert not others
        return
    (second,) = others
    exec(second, got)
    assert np.array_equal(next(iter(got["images"]))["x.npy"], store.column("x", 0)[0])
    if spec.coupling is None:
        return
    assert np.array_equal(next(iter(got["draws"]))["z.npy"], store.column("z", 0, 0)[0])
    export_tuples(store, str(tmp_path / "tuples"), ignore_progress, None)
    monkeypatch.chdir(tmp_path / "tuples")
    (code,) = code_blocks((tmp_path / "tuples" / "README.md").read_text())
    exec(code, got)
    last = spec.num_blocks - 1
    last_x = store.x_of(last, 1)[-1]
    last_x = codecs.decode_float(last_x, case.latents) if case.latents else last_x
    np.testing.assert_allclose(
        got["x"], (last_x + 0.25) * 0.5 if case.latents else last_x / 127.5 - 1, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(got["z"], (store.z(last, 1) / store.sigma_f)[-1], rtol=1e-5)
    if spec.has_labels:
        assert got["label"] == store.column("label", last)[-1]


def test_cards_say_that_z_is_the_image(tmp_path: Path) -> None:
    for layout in LAYOUT_NAMES:
        folder = tmp_path / layout
        store = write_case(folder, Case(layout))
        export_tuples(store, f"{folder}-tuples", ignore_progress, None)
        for where in (folder, Path(f"{folder}-tuples")):
            assert Z_IS_THE_IMAGE in (where / "README.md").read_text().splitlines()
            assert Z_IS_THE_IMAGE in json.loads((where / "croissant.json").read_text())["description"]
        samples = write_case(Path(f"{folder}-samples"), Case(layout, samples=True))
        assert Z_IS_THE_IMAGE not in readme(samples.dataset) + json.dumps(croissant(samples.dataset))


def test_cards_of_a_run(mlc: Any, run: Run) -> None:
    """Stores as the stages write them have the cards of their documents."""
    for url in (f"{run.samples}/train", *run.couplings.values()):
        store = Store(url)
        assert Path(url, "README.md").read_text() == readme(store.dataset)
        assert json.loads(Path(url, "croissant.json").read_text()) == croissant(store.dataset)
        assert mlc.Dataset(Path(url, "croissant.json")).metadata.ctx.issues.report() == ""
