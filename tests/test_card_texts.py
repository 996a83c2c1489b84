"""Texts in cards: front matter, names and attributions that try to be more than text, and the summary of a store."""

import re
import string
from pathlib import Path
from typing import Any

import pytest
import yaml

from nfm.storage_specs.format.attribution import Attribution
from nfm.storage_specs.format.card import make_cards, readme, summarize
from nfm.storage_specs.format.card_text import escape_markdown, quote_yaml
from nfm.storage_specs.format.dataset import max_document_bytes
from nfm.storage_specs.format.names import MAX_METADATA_BYTES
from nfm.storage_specs.format.schema import Dataset
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.documents import canonical_json
from nfm.storage_specs.storage.text import printable
from nfm.storage_specs.writing.tuples import export_tuples
from tests.tools.store_cases import KNOWN, Case, write_case
from tests.tools.stores import ignore_progress

# Of rdflib and pandas, on how mlcroissant calls them.
pytestmark = pytest.mark.filterwarnings("ignore:ConjunctiveGraph is deprecated", "ignore:The inplace keyword")

HOSTILE = (
    "# h\r\n---\n```\n<script>x</script> [a](http://b.c) ![i](j) 'p' \"q\" \\ {r} *s* _t_ &amp; www.u.v | - w"
    "\n\n    x\n\u0085\u2028\u202e\x1b[31m\ufeff \U0001f600"
)


def front_matter(card: str) -> tuple[dict[str, Any], str]:
    """The YAML in front of a card, and the Markdown behind it."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match
    return yaml.safe_load(match[1]), card[match.end() :]


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


@pytest.mark.long
def test_the_largest_cards_can_be_read(dataset: Dataset) -> None:
    """Of a million classes, whose names take nearly all of a document."""
    document_bytes = MAX_METADATA_BYTES - (1 << 20)
    names = [f"{number:06d}".ljust(document_bytes // 1_000_000 - len('   "",\n'), "x") for number in range(1_000_000)]
    spec = dataset.spec.model_copy(update={"num_classes": len(names), "class_names": names})
    large = dataset.model_copy(update={"spec": spec})
    assert document_bytes * 0.9 < len(canonical_json(large.model_dump(mode="json"))) < MAX_METADATA_BYTES
    for name, card in make_cards(large).items():
        assert len(card) < max_document_bytes(large)[name]


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
    assert printable("a\tb\x1b[0m\u202ec é😀") == r"a b\u001b[0m\u202ec é😀"


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
