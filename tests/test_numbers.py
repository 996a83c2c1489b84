"""Numbers that a user gives: what is no number, or too small to be of use, is refused in one line before any work."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from nfm.pipeline.cli import nfm
from nfm.pipeline.config import Config, load_config
from nfm.pipeline.config_keys import list_keys, walk_subsections
from nfm.pipeline.errors import ConfigError
from nfm.stages.errors import StageError
from nfm.stages.train_student import train_student
from nfm.storage_specs.reading.stream import Source
from tests.tools.small_run import Run


def number_keys() -> Iterator[str]:
    for inner in walk_subsections(Config):
        for key in list_keys(inner.section):
            if key.values.startswith(("number", "integer")):
                yield f"{inner.path}.{key.name}"


KEYS = list(number_keys())


def test_the_keys_are_found() -> None:
    assert {"evaluate.guidance", "evaluate.samples", "student.train.lr", "teacher.eta", "student.t_mean"} <= set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_the_config_takes_no_nan_and_no_infinity(key: str) -> None:
    for value in ("nan", "inf", "-inf", "'many'"):
        with pytest.raises(ConfigError, match=rf"{key}: got .*; expected") as caught:
            load_config("digits", [f"{key}={value}"])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [key for key in KEYS if key != "student.t_mean"])  # the mean of a normal distribution
def test_a_key_of_the_config_takes_nothing_negative(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: got -1; expected"):
        load_config("digits", [f"{key}=-1"])


@pytest.mark.parametrize("samples", [0, 1])
def test_evaluation_takes_two_samples_or_more(samples: int) -> None:
    with pytest.raises(ConfigError, match=rf"evaluate\.samples: got {samples}; expected integer ≥ 2"):
        load_config("digits", [f"evaluate.samples={samples}"])


@pytest.mark.parametrize("weight", [math.nan, math.inf, -1.0, 0.0, 1e308, 1e-320])
def test_weights_of_a_mixture_are_positive_numbers(run: Run, tmp_path: Path, weight: float) -> None:
    sources = [Source(url, weight) for url in run.couplings.values()]
    with pytest.raises(StageError, match=r"got weights .*; expected positive numbers"):
        train_student(run.config.student, sources, str(tmp_path))


@pytest.mark.parametrize("guidance", ["nan", "inf", "-inf", "-1"])
def test_sample_takes_no_guidance_that_is_no_number(run: Run, student: str, tmp_path: Path, guidance: str) -> None:
    for model in (run.teacher, student):
        result = CliRunner().invoke(nfm, ["sample", model, "--out", f"{tmp_path}/x.png", f"--guidance={guidance}"])
        assert isinstance(result.exception, StageError)
        assert f"got --guidance {guidance} for a" in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["--count", "0"], ["--count", "nan"], ["--seed", "-1"], ["--class", "nan"], ["--guidance", "much"]]
)
def test_sample_takes_counts(student: str, tmp_path: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(nfm, ["sample", student, "--out", f"{tmp_path}/x.png", *arguments])
    assert result.exit_code == 2
    assert f"Invalid value for '{arguments[0]}'" in result.output
