"""The config: what is printed reads back as the same, every key is described, and each mistake is named on a line."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
import pytest
from click.testing import CliRunner

from nfm.models.sit import SIZE_GRAMMAR, SIZES, parse_size
from nfm.models.solvers import SAMPLER_GRAMMAR, SOLVERS, ScheduleName, parse_sampler
from nfm.models.tarflow import NOTATION_GRAMMAR, parse_notation
from nfm.pipeline.cli import Shortcut, nfm
from nfm.pipeline.config import MAX_TOML_BYTES, Config, load_config, load_storage
from nfm.pipeline.config_docs import config_page, config_toml
from nfm.pipeline.config_keys import Key, list_keys, walk_subsections
from nfm.pipeline.errors import ConfigError
from nfm.pipeline.presets import preset_names, preset_text

KEYS = {f"{inner.path}.{key.name}": key for inner in walk_subsections(Config) for key in list_keys(inner.section)}
GRAMMARS: list[tuple[str, Callable[[str], Any], str]] = [
    (NOTATION_GRAMMAR, parse_notation, r"TF-\d\S*\d"),
    (SIZE_GRAMMAR, parse_size, r"SiT-[\dA-Z]\S*\d"),
    (SAMPLER_GRAMMAR, parse_sampler, r"(?:euler|heun)\d+(?::t)?"),
]


def mistakes(preset: Path, *overrides: str) -> list[str]:
    """The lines of the error."""
    with pytest.raises(ConfigError) as error:
        load_config(str(preset), overrides)
    return str(error.value).splitlines()


@pytest.mark.parametrize("preset", preset_names())
def test_the_printed_config_reads_back_as_the_same(preset: str, tmp_path: Path) -> None:
    config = load_config(preset, ["teacher.train.window_blocks=7", "encode.workers=3", "storage.cache_gb=0.5"])
    text = config_toml(config)
    assert Config.model_validate(tomllib.loads(text)) == config
    (tmp_path / "printed.toml").write_text(text, encoding="utf-8")
    again = load_config(str(tmp_path / "printed.toml"))
    assert again == config
    assert config_toml(again) == text


@pytest.mark.parametrize("preset", preset_names())
def test_the_config_command_prints_a_preset_that_stages_read(preset: str, tmp_path: Path) -> None:
    printed = CliRunner().invoke(nfm, ["config", "--preset", preset, "--set", "teacher.eta=0.123"])
    assert printed.exit_code == 0, printed.output
    path = tmp_path / "printed.toml"
    path.write_text(printed.stdout, encoding="utf-8")
    assert load_config(str(path)) == load_config(preset, ["teacher.eta=0.123"])
    stage = CliRunner().invoke(nfm, ["train-teacher", "--preset", str(path), "--dry-run"])
    assert stage.stdout == printed.stdout


def config_with(options: dict[str, dict[str, Any]]) -> Config:
    storage = load_storage([]).model_copy(update={"options": options})
    return load_config("digits").model_copy(update={"storage": storage})


def test_options_of_file_systems_are_printed_whatever_they_hold() -> None:
    options: dict[str, dict[str, Any]] = {
        "s3": {
            "profile": 'a"b\\c\n\t\x7f\x85\u2028\u202e\U000e0001\u3000 é 𝛈',
            "anon": False,
            "client_kwargs": {"retries": 3, "waits": [0.5, 1e-9]},
        },
        "a.b c": {"listed": [{"a": 1}, {"b": [True, {"region": "d"}]}], "empty": []},
    }
    text = config_toml(config_with(options))
    assert Config.model_validate(tomllib.loads(text)).storage.options == options
    assert all(line.isprintable() for line in text.split("\n"))


def test_secret_options_are_neither_printed_nor_read_back(tmp_path: Path) -> None:
    options: dict[str, dict[str, Any]] = {
        "s3": {"key": "MARKED", "secret": "MARKED", "endpoint_url": "http://user:MARKED@host:80/?token=MARKED"},
        "http": {"headers": {"X-Any": "MARKED"}, "client_kwargs": {"auth": ["MARKED", {"password": 73}], "n": 5}},
    }
    text = config_toml(config_with(options))
    assert "MARKED" not in text and "73" not in text
    printed = tomllib.loads(text)["storage"]["options"]
    assert printed["s3"] == {"key": "***", "secret": "***", "endpoint_url": "http://***@host:80/?token=***"}
    assert printed["http"]["client_kwargs"] == {"auth": ["***", {"password": "***"}], "n": 5}
    path = tmp_path / "printed.toml"
    path.write_text(text, encoding="utf-8")
    (line,) = mistakes(path)
    assert "storage.options: got '***', which nfm config prints in place of a secret" in line


@pytest.mark.parametrize(
    "override",
    [
        "storage.options.s3=MARKED",
        "storage.options=MARKED",
        "storage.options.s3=['MARKED']",
        "storage.options.s3.secret:MARKED",
        "storage={options={s3={secret='MARKED'}}}",
        "storag.options.s3.secret=MARKED",
        "s3.secret.a=MARKED",
        "secret=MARKED",
        "secret MARKED",
        "storage.cache.options.s3.secret=MARKED",
    ],
)
def test_no_mistake_in_an_option_prints_its_value(override: str) -> None:
    for load in (load_storage, lambda overrides: load_config("digits", ["storage.cache=a", *overrides])):
        with pytest.raises(ConfigError) as error:
            load([override])
        assert "MARKED" not in str(error.value)


def test_no_key_forges_a_line(preset: Path) -> None:
    spoil(preset, ("[encode]", '["a\\nerror: all good\\u001b[31m"]\n[encode]'))
    (line,) = mistakes(preset)
    assert "unknown key a error: all good\\u001b[31m;" in line


def test_every_key_and_section_is_described() -> None:
    sections = list(walk_subsections(Config))
    assert [inner.path for inner in sections] == [
        "data", "teacher", "teacher.train", "encode", "student", "student.train", "evaluate", "attribution", "storage",
    ]  # fmt: skip
    descriptions = [
        inner.section.model_fields[name].description for inner in sections for name in inner.section.model_fields
    ]
    for text in [*descriptions, *(inner.meaning for inner in sections)]:
        assert text is not None
        assert re.fullmatch(r"[^|\n]{8,}\.", text), f"{text!r} is no sentence that fits in a table"
    for name, key in KEYS.items():
        can_be_unset = not key.required and key.default is None
        assert ("Without it:" in key.meaning) == can_be_unset, f"{name} must say what happens without it"


def test_values_and_defaults_are_those_of_the_declarations() -> None:
    def described(name: str) -> tuple[str, bool, Any]:
        key = KEYS[name]
        return key.values, key.required, key.default

    assert described("data.channels") == ("1 or 3", True, None)
    assert described("data.holdout") == ("number > 0 and < 1", True, None)
    assert described("data.layout") == ('"webdataset" or "zarr"', False, "webdataset")
    assert described("encode.draws") == ("integer ≥ 1 and ≤ 65536", True, None)
    assert described("encode.device") == ('"cuda" or "cpu"', False, None)
    assert described("encode.workers") == ("integer ≥ 1", False, None)
    assert described("student.t_mean") == ("number", False, -0.2)
    assert described("student.train.betas") == ("array of 2, each number ≥ 0 and < 1", False, (0.9, 0.95))
    assert described("evaluate.samplers") == ("array, each string", True, None)
    assert described("attribution.licence") == ("string", False, None)
    assert described("storage.cache_gb") == ("number > 0", False, None)
    assert described("storage.options") == ("table", False, {})


def test_the_printed_config_names_every_key_with_its_meaning() -> None:
    text = config_toml(load_config("digits"))
    prose = re.sub(r"\n# ", " ", text)
    section = ""
    names = []
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif match := re.fullmatch(r"(# )?(\w+) =( .*)?", line):
            names.append(f"{section}.{match[2]}")
            assert bool(match[1]) == (match[3] is None), f"{line} must be a comment if it has no value"
    assert names == list(KEYS)
    for key in KEYS.values():
        assert key.meaning in prose
        assert key.values in prose
    for grammar, _, _ in GRAMMARS:
        for line in grammar.splitlines():
            assert f"#   {line}\n" in text


@pytest.mark.parametrize(("grammar", "parse", "example"), GRAMMARS, ids=["TF", "SiT", "sampler"])
def test_examples_of_a_grammar_parse(grammar: str, parse: Callable[[str], Any], example: str) -> None:
    examples = re.findall(example, grammar)
    assert len(examples) >= 2
    for name in examples:
        parse(name)


def test_grammars_name_all_that_their_parsers_know() -> None:
    equal = re.search(r"(SiT-\S+) is (SiT-\S+)\.", SIZE_GRAMMAR)
    assert equal is not None
    assert parse_size(equal[1]) == parse_size(equal[2])
    for size in SIZES:
        (free,) = re.findall(rf"^ +{size} += (\S+)$", SIZE_GRAMMAR, re.MULTILINE)
        assert parse_size(f"SiT-{free}/2") == parse_size(f"SiT-{size}/2")
    for word in (*SOLVERS, *get_args(ScheduleName)):
        assert re.search(rf"\b{word}\b", SAMPLER_GRAMMAR)


def test_the_page_is_what_the_code_generates() -> None:
    page = Path(__file__).parent.parent / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == config_page(), "run python -m nfm.pipeline.config_docs > docs/config.md"


def test_shortcuts_take_what_their_keys_take() -> None:
    shortcuts = [
        option for command in nfm.commands.values() for option in command.params if isinstance(option, Shortcut)
    ]
    assert len(shortcuts) >= 10
    for option in shortcuts:
        key: Key = KEYS[option.key]
        if isinstance(option.type, click.Choice):
            values = " or ".join(f'"{choice}"' for choice in option.type.choices)
        elif option.is_flag:
            values = "boolean"
        elif option.type is click.STRING:
            values = "string"
        else:
            assert isinstance(option.type, click.IntRange)
            values = f"integer ≥ {option.type.min}"
        assert key.values.startswith(values), f"{option.opts} differs from {option.key}"


@pytest.mark.parametrize("command", ["prepare", "train-teacher", "encode", "train-student", "evaluate", "demo"])
def test_a_dry_run_asks_for_no_paths(command: str) -> None:
    result = CliRunner().invoke(nfm, [command, "--preset", "cifar10", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert Config.model_validate(tomllib.loads(result.stdout)) == load_config("cifar10")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["prepare"], "--out"),
        (["train-teacher", "--out", "x"], "--samples"),
        (["encode", "--samples", "x", "--out", "y"], "--teacher"),
        (["train-student", "--out", "x"], "--couplings"),
        (["evaluate", "--samples", "a", "--couplings", "b", "--teacher", "c", "--out", "d"], "--student"),
    ],
)
def test_a_run_asks_for_its_paths(arguments: list[str], option: str) -> None:
    result = CliRunner().invoke(nfm, arguments)
    assert result.exit_code == 2
    assert f"Missing option '{option}'" in result.output


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """A TOML file with the text of a shipped preset, for tests to spoil."""
    path = tmp_path / "mine.toml"
    path.write_text(preset_text("digits"), encoding="utf-8")
    return path


def spoil(preset: Path, *replacements: tuple[str, str]) -> None:
    text = preset.read_text(encoding="utf-8")
    for old, new in replacements:
        assert text.count(old) >= 1
        text = text.replace(old, new, 1)
    preset.write_text(text, encoding="utf-8")


def test_one_mistake_is_one_line(preset: Path) -> None:
    spoil(preset, ("eta = 0.3", ""))
    (line,) = mistakes(preset)
    assert line.startswith(f"preset {preset}: teacher.eta is missing; expected number > 0 (")


def test_several_mistakes_are_a_line_each(preset: Path) -> None:
    spoil(
        preset,
        ("block_rows = 128", "block_rows = 0"),
        ("head_dim = 24", "head_dims = 24"),
        ("eta = 0.3", ""),
        ("draws = 16", 'draws = "many"'),
        ("images = 204_800", ""),
    )
    first, *lines = mistakes(preset, "encode.layout=hdf5")
    assert "6 keys are missing or wrong" in first
    assert [line.strip() for line in lines] == [
        "data.block_rows: got 0; expected integer ≥ 1 and ≤ 1048576",
        "teacher.eta is missing; expected number > 0",
        "teacher.train.images is missing; expected integer ≥ 1",
        "unknown key teacher.head_dims; the nearest known key is teacher.head_dim; expected one of notation, head_dim, "
        "eta, label_drop, train",
        "encode.draws: got 'many'; expected integer ≥ 1 and ≤ 65536",
        'encode.layout: got \'hdf5\'; expected "webdataset" or "zarr"',
    ]


def test_a_missing_section_names_its_missing_keys(preset: Path) -> None:
    preset.write_text(preset_text("digits").partition("[student]")[0], encoding="utf-8")
    named = {line.split()[0] for line in mistakes(preset)[1:]}
    required = {name for name, key in KEYS.items() if key.required}
    assert named == {name for name in required if name.startswith(("student.", "evaluate."))}
    preset.write_text("", encoding="utf-8")
    assert {line.split()[0] for line in mistakes(preset)[1:]} == required


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("teacher.train.betas=[0.9]", "teacher.train.betas[1] is missing; expected array of 2"),
        ("teacher.train.betas=[0.9, 0.9, 0.9]", "teacher.train.betas: got an array of 3; expected array of 2"),
        ("teacher.train.betas=[0.9, 1.5]", "teacher.train.betas[1]: got 1.5; expected array of 2, each number"),
        ("teacher.eta=nan", "teacher.eta: got nan; expected finite number > 0"),
        ("teacher.train.lr=true", "teacher.train.lr: got True; expected number > 0"),
        ('data.image_size="8"', "data.image_size: got '8'; expected integer"),
        ("teacher.train.betas=[true, 0.9]", "teacher.train.betas[0]: got True; expected array of 2, each number"),
        ("data.channels=2", "data.channels: got 2; expected 1 or 3"),
        ("encode.workers=none", "encode.workers: got 'none'; expected integer ≥ 1"),
        ("student.size=SiT-M/2", "student.size: got student size 'SiT-M/2'; expected SiT-"),
        ("evaluate.samplers=['heun31', 'rk4']", "evaluate.samplers: got sampler 'rk4'; expected"),
        ("teacher.lr=0.1", "unknown key teacher.lr; the nearest known key is teacher.train.lr"),
        ("nothing.key=1", "unknown key nothing; expected one of data, teacher"),
        ("teacher.train=5", "teacher.train is a section; set its keys, as in teacher.train.images=…"),
        ("teacher.train={lr = 1}", "teacher.train is a section; set its keys"),
        ("data.source.name=1", "source is a value, not a section"),
        ("teacher=1", "expected section.key=value"),
    ],
)
def test_overrides_that_are_wrong(preset: Path, override: str, expected: str) -> None:
    (line,) = mistakes(preset, override)
    assert expected in line


def test_no_table_is_printed(preset: Path) -> None:
    """A table may be long, and hold secrets."""
    spoil(preset, ("eta = 0.3", "eta = {a = 'SECRET'}"), ("[encode]", "[unknown]\na = 'SECRET'\n[encode]"))
    text = "\n".join(mistakes(preset, "storage.options={s3 = ['SECRET']}", "encode.draws=['SECRET']"))
    assert "teacher.eta: got a table; expected number > 0" in text
    assert "unknown key unknown" in text
    assert "storage.options.s3: got an array of 1; expected table" in text
    assert "encode.draws: got an array of 1" in text
    assert "SECRET" not in text
    preset.write_text("teacher = ['SECRET']\nstudent = 3\n", encoding="utf-8")
    text = "\n".join(mistakes(preset))
    assert "teacher: got an array of 1; expected a section" in text
    assert "student: got 3; expected a section" in text
    assert "SECRET" not in text


def test_files_that_are_no_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes("# größer\n".encode("latin-1"))
    assert mistakes(path) == [f"preset {path}: byte 4 is not UTF-8; save the file as UTF-8 text"]
    path.write_text("[data\n", encoding="utf-8")
    assert "not TOML" in mistakes(path)[0]
    (tmp_path / "folder.toml").mkdir()
    (line,) = mistakes(tmp_path / "folder.toml")
    assert "which is a folder; expected one of cifar10, digits, imagenet64, or the path of a .toml file" in line
    (line,) = mistakes(tmp_path / "none.toml")
    assert "expected one of cifar10" in line


def test_storage_alone() -> None:
    assert load_storage(["storage.cache_gb=5", "storage.options.s3.anon=true"]).options == {"s3": {"anon": True}}
    with pytest.raises(ConfigError, match=re.escape("--set: storage.cache_gb: got -1; expected number > 0")):
        load_storage(["storage.cache_gb=-1"])
    with pytest.raises(ConfigError, match="unknown key storage.cach; the nearest known key is storage.cache;"):
        load_storage(["storage.cach=a"])


HOSTILE = {
    "arrays": "[data]\nholdout = " + "[" * 20_000 + "]" * 20_000,
    "few arrays": "[data]\nholdout = " + "[" * 17 + "]" * 17,
    "tables": "[data]\nholdout = " + "{a=" * 5_000 + "1" + "}" * 5_000,
    "a long key": f"[storage.options.{'.'.join('a' * 3_000)}]\nb = 1",
    "digits": "[data]\nimage_size = " + "9" * 5_000,
    "bytes": "#" * (MAX_TOML_BYTES + 1),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_preset_of_a_stranger_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "preset.toml").write_text(text)
    [line] = mistakes(tmp_path / "preset.toml")
    assert re.fullmatch(r"preset \S+: got (more than|a number of too many digits)[^;]{0,60}; expected .{0,30}", line)


@pytest.mark.parametrize(
    "override",
    [
        "storage.cache_gb=" + "[" * 5_000,
        "storage.cache_gb=" + "[" * 17 + "]" * 17,
        "storage.cache_gb=" + "9" * 5_000,
        f"storage.options.{'.'.join('a' * 3_000)}=1",
    ],
)
def test_an_override_of_a_stranger_is_refused_in_one_line(override: str) -> None:
    with pytest.raises(ConfigError, match=r"^got [^\n]{,100}$|^--set storage.cache_gb=…: got [^\n]{,100}$"):
        load_storage([override])
