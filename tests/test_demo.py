"""The whole path on small settings: every artifact, every number, and nothing done twice."""

import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nfm.pipeline.config import Config
from nfm.pipeline.demo import run_demo
from nfm.storage_specs.reading.store import Store
from tests.tools.small_run import encode_in_process


@pytest.fixture
def demo(home: Path) -> Path:
    return home / "runs" / "demo"


def test_every_number_is_there_and_finite(demo: Path, config: Config) -> None:
    metrics = json.loads((demo / "metrics.json").read_text())
    for coupling in ("nfm", "independent"):
        student = metrics["students"][coupling]
        assert math.isfinite(student["loss"])
        for sampler in ("heun31", "heun15", "heun7", "euler5", "euler3"):
            assert student[sampler]["fd"] > 0
            assert student[sampler]["curvature"] >= 0
    assert {"bpd", "roundtrip_max_abs", "fd"} <= metrics["teacher"].keys()
    assert metrics["teacher"]["roundtrip_max_abs"] < 1e-4
    for space in ("dx", "dz"):
        assert set(metrics["zspace"][space]) == {
            "different_x_different_noise",
            "same_x_different_noise",
            "different_x_same_noise",
        }
    assert metrics["zspace"]["dx"]["same_x_different_noise"] == pytest.approx(config.teacher.eta, rel=0.05)
    store = Store(f"{demo}/couplings-webdataset")
    assert metrics["encode"]["images"] == store.spec.rows
    assert metrics["encode"]["draws"] == config.encode.draws
    assert metrics["encode"]["files"] == store.dataset.totals.files
    assert metrics["encode"]["seconds"] > 0
    assert metrics["fd"]["floor"]["samples"] == Store(f"{demo}/samples/val").spec.rows
    assert metrics["config"] == config.model_dump(mode="json", exclude={"storage"})


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_report_is_one_self_contained_page(demo: Path) -> None:
    page = (demo / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert len(links.sources) == 3 + 2 + 2 * 3  # plots, real and teacher rows, three samplers of two students
    assert all(source.startswith("data:image/png;base64,") for source in links.sources)
    metrics = json.loads((demo / "metrics.json").read_text())
    for value in (metrics["students"]["nfm"]["euler3"]["fd"], metrics["fd"]["floor"]["fd"]):
        assert f"{value:.3f}" in page


def test_the_same_command_again_does_nothing_twice(demo: Path, config: Config) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*") if path.is_file()}
    run_demo(config, str(demo), None, skip_bad_images=False)
    changed = {path.name for path, at in before.items() if path.stat().st_mtime_ns != at}
    assert changed == {"report.html", "report.png"}


def test_metrics_of_other_settings_are_not_reused(demo: Path, config: Config) -> None:
    fewer = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"samples": 200})})
    run_demo(fewer, str(demo), None, skip_bad_images=False)
    assert json.loads((demo / "metrics.json").read_text())["fd"]["samples"] == 200
    run_demo(config, str(demo), None, skip_bad_images=False)


def test_metrics_of_another_version_are_not_reused(demo: Path, config: Config) -> None:
    metrics = json.loads((demo / "metrics.json").read_text())
    older = metrics | {"version": metrics["version"] - 1, "encode": {}}
    (demo / "metrics.json").write_text(json.dumps(older))
    run_demo(config, str(demo), None, skip_bad_images=False)
    assert json.loads((demo / "metrics.json").read_text())["encode"] == metrics["encode"]


@pytest.fixture
def demo_with_more_draws(demo: Path, config: Config, tmp_path: Path) -> Path:
    """A copy of the demo whose stores have one draw more."""
    shutil.copytree(demo, tmp_path / "demo")
    more = config.model_copy(update={"encode": config.encode.model_copy(update={"draws": config.encode.draws + 1})})
    for layout in ("webdataset", "zarr"):
        teacher = f"{tmp_path}/demo/teacher/model.safetensors"
        encode_in_process(
            more, f"{tmp_path}/demo/samples/train", teacher, f"{tmp_path}/demo/couplings-{layout}", layout
        )
    return tmp_path / "demo"


def test_draws_that_were_added_stay_and_change_no_number(
    demo_with_more_draws: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (demo_with_more_draws / "metrics.json").read_bytes()
    capsys.readouterr()
    run_demo(config, str(demo_with_more_draws), None, skip_bad_images=False)
    assert "has 4 draws an image, more than encode.draws = 3" in capsys.readouterr().err
    assert (demo_with_more_draws / "metrics.json").read_bytes() == before
    assert Store(f"{demo_with_more_draws}/couplings-zarr").spec.num_draws == 4


def test_new_students_learn_from_draws_that_were_added(demo_with_more_draws: Path, config: Config) -> None:
    for coupling in ("nfm", "independent"):
        shutil.rmtree(demo_with_more_draws / f"student-{coupling}")
    run_demo(config, str(demo_with_more_draws), None, skip_bad_images=False)
    assert json.loads((demo_with_more_draws / "metrics.json").read_text())["encode"]["draws"] == 4


@pytest.mark.long
def test_an_image_folder_instead_of_digits(ray_cluster: None, images: Path, config: Config, tmp_path: Path) -> None:
    halves = config.model_copy(update={"data": config.data.model_copy(update={"holdout": 0.4})})
    run_demo(halves, f"{tmp_path}/out", images, skip_bad_images=False)
    assert Store(f"{tmp_path}/out/samples/train").spec.class_names == ["cat", "dog"]
    assert (tmp_path / "out" / "report.html").exists()
