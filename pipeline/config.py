"""The config of a whole run: one typed section a stage, from a TOML preset and `--set section.key=value`."""

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from nfm.pipeline.errors import ConfigError
from nfm.pipeline.presets import preset_names, preset_text
from nfm.stages.encode import EncodeConfig
from nfm.stages.evaluate import EvaluateConfig
from nfm.stages.prepare import DataConfig
from nfm.stages.section import Section
from nfm.stages.train_student import StudentConfig
from nfm.stages.train_teacher import TeacherConfig
from nfm.storage_specs.storage.files import set_file_system_options


class StorageConfig(Section):
    """How remote stores are reached: options of fsspec file systems by protocol, as in
    storage.options.s3.endpoint_url; and the cache of their files. None of it changes what is computed."""

    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    cache: str | None = None  # None: $NFM_CACHE, or nfm under the user's cache directory
    cache_gb: Annotated[float, Field(gt=0)] | None = None  # None: $NFM_CACHE_GB, or 200

    def apply(self) -> None:
        """For this process, and the ones it starts."""
        set_file_system_options(self.options)
        if self.cache is not None:
            os.environ["NFM_CACHE"] = self.cache
        if self.cache_gb is not None:
            os.environ["NFM_CACHE_GB"] = str(self.cache_gb)


class Config(Section):
    storage: StorageConfig = StorageConfig()
    data: DataConfig
    teacher: TeacherConfig
    encode: EncodeConfig
    student: StudentConfig
    evaluate: EvaluateConfig


def load_config(preset: str, overrides: Sequence[str] = ()) -> Config:
    """A shipped preset by name, or a TOML file by path, with overrides. Raises ConfigError naming what is wrong."""
    if preset in preset_names():
        text = preset_text(preset)
    elif preset.endswith(".toml") and Path(preset).is_file():
        text = Path(preset).read_text(encoding="utf-8")
    else:
        raise ConfigError(
            f"got preset {preset!r}; expected one of {', '.join(preset_names())}, or the path of a .toml file"
        )
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"preset {preset}: not TOML: {error}") from error
    for override in overrides:
        _apply(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"preset {preset}: {'; '.join(_explain(fault) for fault in error.errors())}") from error


def load_storage(overrides: Sequence[str]) -> StorageConfig:
    """`storage.…` overrides alone, for commands that take no preset."""
    values: dict[str, Any] = {"storage": {}}
    for override in overrides:
        if not override.startswith("storage."):
            raise ConfigError(f"got --set {override!r}; expected storage.key=value, as in storage.cache_gb=50")
        _apply(values, override)
    try:
        return StorageConfig.model_validate(values["storage"])
    except ValidationError as error:
        faults = (f"storage.{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ConfigError("; ".join(faults)) from error


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"got --set {override!r}; expected section.key=value, as in student.train.lr=0.001")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    section = values
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"got --set {override!r}, but {part} is a value, not a section")
    section[parts[-1]] = value


def _explain(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = ", ".join(_fields_at(fault["loc"][:-1]))
        return f"unknown key {where}; expected one of {known}"
    return f"{where}: got {fault['input']!r}; {fault['msg']}"


def _fields_at(path: tuple[Any, ...]) -> list[str]:
    model: Any = Config
    for part in path:
        model = model.model_fields[part].annotation
    return sorted(model.model_fields)
