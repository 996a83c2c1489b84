"""The config of a run: a typed section for each stage, read from a TOML preset and overrides `section.key=value`."""

import difflib
import os
import re
import reprlib
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from nfm.pipeline.config_keys import list_keys, subsection_type, walk_subsections
from nfm.pipeline.errors import ConfigError
from nfm.pipeline.presets import preset_names, preset_text
from nfm.stages.attribution import AttributionConfig
from nfm.stages.encode import EncodeConfig
from nfm.stages.evaluate import EvaluateConfig
from nfm.stages.prepare import DataConfig
from nfm.stages.section import Section
from nfm.stages.train_student import StudentConfig
from nfm.stages.train_teacher import TeacherConfig
from nfm.storage_specs.format.attribution import Attribution
from nfm.storage_specs.storage.files import absolute_url, expand_home, set_file_system_options
from nfm.storage_specs.storage.text import HIDDEN, shown_options

MAX_TOML_BYTES = 1 << 15  # of a preset; what nfm config prints has a third
MAX_DEPTH = 16  # of tables and arrays inside each other, and of the parts of a key


class StorageConfig(Section):
    """How this process reaches remote stores. None of it changes what is computed, and no artifact records it."""

    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Options of fsspec file systems by protocol, such as `storage.options.s3.endpoint_url`. "
        "They may hold keys, and are not recorded in any artifact, nor printed.",
    )
    cache: str | None = Field(
        default=None,
        min_length=1,
        description="Folder that keeps files of remote stores, and nothing else: a new or an empty one, which only you "
        "can write to. Without it: `$NFM_CACHE`, or nfm/files in the user's cache directory.",
    )
    cache_gb: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Largest size of that folder, in GB; the least recently used files are removed first. Without it: "
        "`$NFM_CACHE_GB`, or 200.",
    )

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if HIDDEN in _leaves(options):
            raise ValueError(
                f"got {HIDDEN!r}, which nfm config prints in place of a secret; expected the secret, or no such option "
                "where the environment or a profile has it"
            )
        return options

    def without_secrets(self) -> "StorageConfig":
        """The section with HIDDEN in place of what may be a secret."""
        return self.model_copy(update={"options": shown_options(self.options)})

    def apply(self) -> None:
        """Sets the options and the cache for this process and the processes that it starts."""
        set_file_system_options(self.options)
        if self.cache is not None:
            os.environ["NFM_CACHE"] = absolute_url(self.cache)
        if self.cache_gb is not None:
            os.environ["NFM_CACHE_GB"] = str(self.cache_gb)


class Config(Section):
    """All settings of a run."""

    data: DataConfig = Field(description="Images, and the sample stores that prepare makes of them.")
    teacher: TeacherConfig = Field(description="The TarFlow teacher.")
    encode: EncodeConfig = Field(description="The couplings that encode writes.")
    student: StudentConfig = Field(description="The SiT student.")
    evaluate: EvaluateConfig = Field(description="What evaluate generates and measures.")
    attribution: AttributionConfig = Field(
        default=AttributionConfig(),
        description="Where the data come from and on what terms, as prepare and encode write it into stores. "
        "It stands outside their ids.",
    )
    storage: StorageConfig = Field(
        default=StorageConfig(), description="How remote stores are reached. Nothing in it changes a result."
    )


def load_config(preset: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a shipped preset by name, or a TOML file by path, and applies overrides `section.key=value` in their order.

    Raises ConfigError naming every key that is missing, unknown or wrong.
    """
    values = _read_preset(preset)
    for override in overrides:
        _apply_override(values, override)
    _add_missing_sections(values, Config)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(*_describe_mistakes(f"preset {preset}", error)) from error


def load_storage(overrides: Sequence[str]) -> StorageConfig:
    """Reads the section `storage` from overrides alone, for commands that take no preset. Raises ConfigError."""
    values: dict[str, Any] = {"storage": {}}
    for override in overrides:
        if not override.startswith("storage."):
            raise ConfigError(
                f"got {_describe_override(override)}; expected storage.key=value, as in storage.cache_gb=50"
            )
        _apply_override(values, override)
    try:
        return StorageConfig.model_validate(values["storage"])
    except ValidationError as error:
        raise ConfigError(*_describe_mistakes("--set", error, prefix=("storage",))) from error


def parse_attribution(values: dict[str, Any]) -> Attribution:
    """The attribution with these fields of the section `attribution`. Raises ConfigError."""
    try:
        return AttributionConfig.model_validate(values).to_attribution()
    except ValidationError as error:
        raise ConfigError(*_describe_mistakes("annotate", error, prefix=("attribution",))) from error


def _leaves(value: Any) -> Iterator[Any]:
    """The values inside tables and arrays."""
    if isinstance(value, dict | list):
        for element in _elements(value):
            yield from _leaves(element)
    else:
        yield value


def _read_preset(preset: str) -> dict[str, Any]:
    preset = expand_home(preset)
    try:
        if preset in preset_names():
            text = preset_text(preset)
        elif preset.endswith(".toml") and Path(preset).is_file():
            with open(preset, "rb") as file:
                data = file.read(MAX_TOML_BYTES + 1)
            if len(data) > MAX_TOML_BYTES:
                raise ConfigError(f"preset {preset}: got more than {MAX_TOML_BYTES} bytes; expected a preset of nfm")
            text = data.decode()
        else:
            kind = ", which is a folder" if Path(preset).is_dir() else ""
            raise ConfigError(
                f"got preset {preset!r}{kind}; expected one of {', '.join(preset_names())}, or the path of a .toml file"
            )
        return _parse_toml(text, f"preset {preset}")
    except UnicodeDecodeError as error:
        raise ConfigError(f"preset {preset}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"preset {preset}: not TOML: {error}") from error


def _parse_toml(text: str, source: str) -> dict[str, Any]:
    """The tables of a TOML text of MAX_DEPTH. Raises ConfigError naming the `source` for a deeper one or for an integer
    that Python does not read, TOMLDecodeError for another text."""
    too_deep = f"{source}: got more than {MAX_DEPTH} tables or arrays inside each other; expected keys of nfm"
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise ConfigError(f"{source}: got a number of too many digits; expected one of at most 19") from error
    except RecursionError as error:
        raise ConfigError(too_deep) from error
    layer: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        layer = [element for container in layer for element in _elements(container)]
    if any(isinstance(element, dict | list) for element in layer):
        raise ConfigError(too_deep)
    return values


def _elements(value: Any) -> Iterable[Any]:
    """What is directly in a table or an array; nothing of another value."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Sets the key of one override `section.key=value` in nested dicts."""
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(
            f"got {_describe_override(override)}; expected section.key=value, as in student.train.lr=0.001"
        )
    if len(parts) > MAX_DEPTH:
        raise ConfigError(f"got --set with a key of {len(parts)} parts; expected at most {MAX_DEPTH}")
    section, depth = _innermost_section(parts)
    if depth == len(parts):
        example = next(iter(section.model_fields))
        raise ConfigError(
            f"got {_describe_override(override)}, but {path} is a section; set its keys, as in {path}.{example}=…"
        )
    try:
        value = _parse_toml(f"value = {text}", _describe_override(override))["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    table = values
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"got {_describe_override(override)}, but {part} is a value, not a section")
    table[parts[-1]] = value


def _describe_override(override: str) -> str:
    """An override without its value, which may be a secret whatever its key is: the key may be misspelt."""
    key = re.match(r"[\w.-]*", override)
    assert key is not None
    return f"--set {key[0]}=…" if override.startswith(f"{key[0]}=") else f"--set {key[0]}"


def _add_missing_sections(values: dict[str, Any], section: type[Section]) -> None:
    """Gives absent sections an empty table, so that validation names each of their missing keys."""
    for name in section.model_fields:
        subsection = subsection_type(section, name)
        if subsection is not None:
            table = values.setdefault(name, {})
            if isinstance(table, dict):
                _add_missing_sections(table, subsection)


def _innermost_section(path: Sequence[str | int]) -> tuple[type[Section], int]:
    """The last section on the path of a key, and how many parts of the path lead to it."""
    section: type[Section] = Config
    for depth, part in enumerate(path):
        subsection = subsection_type(section, str(part))
        if subsection is None:
            return section, depth
        section = subsection
    return section, len(path)


def _describe_mistakes(source: str, error: ValidationError, prefix: tuple[str, ...] = ()) -> list[str]:
    """One line for a single mistake; for several, a first line and a line for each.

    `prefix` is the path of the section that was validated.
    """
    mistakes = [_describe_mistake((*prefix, *detail["loc"]), detail) for detail in error.errors()]
    hint = "nfm config prints all keys with their meaning"
    if len(mistakes) == 1:
        return [f"{source}: {mistakes[0]} ({hint})"]
    return [f"{source}: {len(mistakes)} keys are missing or wrong ({hint}):", *mistakes]


def _describe_mistake(path: tuple[str | int, ...], detail: Any) -> str:
    """What is wrong with the key at `path`, from the details that pydantic gives."""
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    section, depth = _innermost_section(path)
    if detail["type"] == "extra_forbidden":
        return _describe_unknown_key(name, section)
    if depth == len(path):
        return f"{name}: got {_describe_value(detail['input'])}; expected a section"
    if detail["type"] == "value_error":
        return f"{name}: {detail['ctx']['error']}"
    expected = next(key.values for key in list_keys(section) if key.name == path[depth])
    if detail["type"] == "missing":
        return f"{name} is missing; expected {expected}"
    if detail["type"] == "finite_number":
        expected = f"finite {expected}"
    got = _describe_value(detail["input"])
    if path[:2] == ("storage", "options") and isinstance(detail["input"], str | int | float):
        got = "a single value"  # it may be a secret
    return f"{name}: got {got}; expected {expected}"


def _describe_unknown_key(name: str, section: type[Section]) -> str:
    known = [f"{inner.path}.{key.name}" for inner in walk_subsections(Config) for key in list_keys(inner.section)]
    nearest = difflib.get_close_matches(name, known, n=1)
    suggestion = f"; the nearest known key is {nearest[0]}" if nearest else ""
    return f"unknown key {name}{suggestion}; expected one of {', '.join(section.model_fields)}"


def _describe_value(value: object) -> str:
    """A single value as it is, but of a table or an array only the kind: it may be long, and hold secrets."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return f"an array of {len(value)}"
    return reprlib.repr(value)
