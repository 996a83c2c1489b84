"""The cards of stores: what `datasets` of Hugging Face and `mlcroissant` of MLCommons make of them, the code in the
README, the summary, and texts that try to be more than text."""

import hashlib
import io
import json
import os
import re
import string
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from numpy.typing import NDArray

from nfm.storage_specs.format import codecs
from nfm.storage_specs.format.card import readme, summarize
from nfm.storage_specs.format.card_text import Z_IS_THE_IMAGE, escape_markdown, printable, quote_yaml
from nfm.storage_specs.format.croissant import croissant
from nfm.storage_specs.format.schema import Attribution, Dataset, LayoutName
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.writing.publish import annotate_store
from nfm.storage_specs.writing.tuples import export_tuples
from tests.tools.small_run import Run
from tests.tools.store_cases import Case, write_case
from tests.tools.stores import LAYOUT_NAMES, ignore_progress

# Of rdflib and pandas, on how mlcroissant calls them.
pytestmark = pytest.mark.filterwarnings("ignore:ConjunctiveGraph is deprecated", "ignore:The inplace keyword")

CLASSES = ["a", "b", "c"]
HOSTILE = (
    "# h\r\n---\n```\n<script>x</script> [a](http://b.c) ![i](j) 'p' \"q\" \\ {r} *s* _t_ &amp; www.u.v | - w"
    "\n\n    x\n\u0085\u2028\u202e\x1b[31m\ufeff \U0001f600"
)
KNOWN = Attribution(
    licence="CC-BY-4.0",
    citation="@article{a,\n  title = {x}\n}",
    creator="Jane Doe",
    source_url="https://example.org/images",
    notes="For research only.",
)
CASES = [
    *(Case(layout, samples=samples) for layout in LAYOUT_NAMES for samples in (False, True)),
    *(Case(layout, labels=False, names=True, noise_stored=False) for layout in LAYOUT_NAMES),
    *(Case(layout, latents="bfloat16", mirrored=True, z_dtype="int8") for layout in LAYOUT_NAMES),
    Case("webdataset", samples=True, latents="float32", mirrored=True, names=True),
]


@pytest.fixture(scope="module")
def mlc(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """mlcroissant, which looks for its cache when it is imported."""
    os.environ["CROISSANT_CACHE"] = str(tmp_path_factory.mktemp("croissant"))
    import mlcroissant

    return mlcroissant


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


def front_matter(card: str) -> tuple[dict[str, Any], str]:
    """The YAML in front of a card, and the Markdown behind it."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match
    return yaml.safe_load(match[1]), card[match.end() :]


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


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        (None, {"license": "unknown"}),
        ("CC-BY-4.0", {"license": "cc-by-4.0"}),
        ("MIT", {"license": "mit"}),
        ("LicenseRef-ImageNet", {"license": "other", "license_name": "LicenseRef-ImageNet"}),
        ("MIT OR Apache-2.0", {"license": "other", "license_name": "MIT OR Apache-2.0"}),
        ("GPL-3.0-only", {"license": "other", "license_name": "GPL-3.0-only"}),  # "gpl-3.0" at Hugging Face
        (HOSTILE, {"license": "other", "license_name": HOSTILE}),
    ],
)
def test_front_matter_has_the_licence(dataset: Dataset, licence: str | None, expected: dict[str, str]) -> None:
    attribution = Attribution(licence=licence)
    metadata, _ = front_matter(readme(dataset.model_copy(update={"attribution": attribution})))
    assert {key: value for key, value in metadata.items() if key.startswith("license")} == expected
    assert metadata["pretty_name"] == "Couplings: 70 images 1×4×4, 3 classes"
    assert metadata["size_categories"] == ["n<1K"]
    assert [config["config_name"] for config in metadata["configs"]] == [
        "x", "z-k000", "z-k001", "noise-k000", "noise-k001",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The document of a coupling store."""
    return write_case(tmp_path_factory.mktemp("store"), Case()).dataset


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (1, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (50_000, "10K<n<100K"),
        (1_281_167, "1M<n<10M"),
        (10**12 - 1, "100B<n<1T"),
        (10**12, "n>1T"),
    ],
)
def test_front_matter_has_the_size(dataset: Dataset, rows: int, expected: str) -> None:
    spec = dataset.spec.model_copy(update={"rows": rows})
    metadata, _ = front_matter(readme(dataset.model_copy(update={"spec": spec})))
    assert metadata["size_categories"] == [expected]


def test_yaml_strings_are_read_as_they_were() -> None:
    text = "".join(map(chr, [*range(0x3000), 0xFEFF, 0xFFFD, 0xFFFE, 0xFFFF, 0x1F600, 0x10FFFF]))
    assert yaml.safe_load(quote_yaml(text)) == text
    assert "\n" not in quote_yaml(text)


def markdown_of(folder: Path, store: Store) -> tuple[dict[str, Any], str, list[str]]:
    """The front matter of a card, what the store's own texts can add to (without the start of its id), and the lines of
    the code block with the attribution."""
    card = (folder / "README.md").read_bytes().decode()
    metadata, body = front_matter(card)
    markdown, attribution = body.split("## Licence and origin\n\n")
    return metadata, markdown.replace(store.dataset.id[:12], ""), attribution.removesuffix("\n").split("\n")


def test_texts_of_a_store_stay_text(mlc: Any, tmp_path: Path) -> None:
    """A card with hostile texts is the card with plain ones, with their escaped form in place of names, and has the
    texts of the attribution in an indented code block, in which nothing is Markdown."""
    plain_case = Case(latents="float16", teacher="plain", decoder="plain")
    plain = write_case(tmp_path / "plain", plain_case, KNOWN)
    case = Case(latents="float16", class_names=(HOSTILE, "b", "c"), teacher=HOSTILE, decoder=HOSTILE)
    texts = Attribution(licence=HOSTILE, citation=HOSTILE, creator=HOSTILE, source_url=HOSTILE, notes=HOSTILE)
    hostile = write_case(tmp_path / "hostile", case, texts)
    for suffix in ("", "-tuples"):
        if suffix:
            export_tuples(plain, str(tmp_path / "plain-tuples"), ignore_progress, None)
            export_tuples(hostile, str(tmp_path / "hostile-tuples"), ignore_progress, None)
        _, plain_markdown, plain_attribution = markdown_of(tmp_path / f"plain{suffix}", plain)
        assert plain_attribution == [
            "    licence     CC-BY-4.0",
            "    creator     Jane Doe",
            "    source url  https://example.org/images",
            "    citation    @article{a,",
            "                  title = {x}",
            "                }",
            "    notes       For research only.",
        ]
        metadata, markdown, attribution = markdown_of(tmp_path / f"hostile{suffix}", hostile)
        assert markdown.count(escape_markdown(HOSTILE)) == 2
        # The two stores have other ids.
        shown = markdown.replace(escape_markdown(HOSTILE), "plain")
        assert re.sub("[0-9a-f]{12,64}", "id", shown) == re.sub("[0-9a-f]{12,64}", "id", plain_markdown)
        assert all(line.startswith("    ") and printable(line) == line for line in attribution if line)
        assert set(metadata) == {"license", "license_name", "pretty_name", "tags", "size_categories", "configs"}
        document = mlc.Dataset(tmp_path / f"hostile{suffix}" / "croissant.json")
        assert document.metadata.ctx.issues.report() == ""
        assert document.metadata.creators[0].name == document.metadata.cite_as == HOSTILE
        assert [record["classes/name"] for record in document.records("classes")] == [HOSTILE, "b", "c"]
    summary = summarize(hostile.dataset, sigma_f_rms=1.0)
    assert all(printable(line) == line for line in summary.split("\n"))
    names = [line[:12].rstrip() for line in summary.split("\n")]
    assert names.count("licence") == names.count("id") == 1 and "# h" not in names


def test_escapes() -> None:
    assert escape_markdown("a_b <c> [d](e)\n`f` www.g") == r"a\_b \<c\> \[d\]\(e\) \`f\` www\.g"
    assert escape_markdown(string.punctuation) == "".join(f"\\{char}" for char in string.punctuation)
    assert printable("a\tb\x1b[0m\u202ec é😀") == "a b\ufffd[0m\ufffdc é😀"


def test_summary(tmp_path: Path, dataset: Dataset) -> None:
    def row(of: Dataset, name: str) -> str:
        lines = summarize(of, sigma_f_rms=1.0).splitlines()
        (text,) = [line.removeprefix(name).strip() for line in lines if line.startswith(f"{name} ")]
        return text

    assert row(dataset, "version") == "1"
    assert row(dataset, "x") == "uint8 pixels, value / 127.5 - 1"
    assert row(dataset, "views") == "plain"
    assert row(dataset, "licence") == "not stated"
    assert row(dataset, "labels") == "3 classes, 23 to 24 images each"
    second = dataset.model_copy(update={"version": 2, "parent": "1a2b" * 16, "attribution": KNOWN})
    assert row(second, "version") == "2, parent 1a2b1a2b1a2b"
    assert row(second, "licence") == "CC-BY-4.0"
    assert row(second, "creator") == "Jane Doe"
    assert row(second, "source url") == "https://example.org/images"
    assert row(second, "citation") == "@article{a,"
    assert "\n              title = {x}\n" in summarize(second, sigma_f_rms=1.0)
    latents = write_case(tmp_path / "latents", Case(latents="bfloat16", mirrored=True, labels=False)).dataset
    assert row(latents, "x") == "bfloat16 latents, (value - -0.25) * 0.5; decoder vae 333333333333"
    assert row(latents, "views") == "plain, mirrored"
    assert row(latents, "labels") == "none"
    assert "bytes x_mirrored " in summarize(latents)


@pytest.mark.parametrize("counts", [{}, {"0": 0, "1": 0, "2": 0}, {"2": 5}])
def test_summary_of_odd_totals(dataset: Dataset, counts: dict[str, int]) -> None:
    totals = dataset.totals.model_copy(update={"label_counts": counts, "z_rms_error": None, "files": 0, "bytes": 0})
    summary = summarize(dataset.model_copy(update={"totals": totals}))
    assert f"3 classes, 0 to {max(counts.values(), default=0)} images each" in summary
    assert summary.count("█") == (30 if max(counts.values(), default=0) else 0)


def test_cards_of_a_run(mlc: Any, run: Run) -> None:
    """Stores as the stages write them have the cards of their documents."""
    for url in (f"{run.samples}/train", *run.couplings.values()):
        store = Store(url)
        assert Path(url, "README.md").read_text() == readme(store.dataset)
        assert json.loads(Path(url, "croissant.json").read_text()) == croissant(store.dataset)
        assert mlc.Dataset(Path(url, "croissant.json")).metadata.ctx.issues.report() == ""
