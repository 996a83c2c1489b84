"""Small real data, shared by the tests: digits as sample stores, a teacher trained for seconds, its couplings."""

import os
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (Ray spells it so)
# Seconds until Ray gives a process up that has not started: a busy machine needs longer than Ray expects.
os.environ["RAY_gcs_server_port_wait_time_s"] = "900"  # noqa: SIM112
os.environ["RAY_raylet_start_wait_time_s"] = "900"  # noqa: SIM112
os.environ["RAY_worker_register_timeout_seconds"] = "900"  # noqa: SIM112

import numpy as np
import pytest
import torch

from nfm.pipeline.cli import main
from nfm.pipeline.config import Config, load_config
from nfm.stages.prepare import prepare
from nfm.stages.train_student import train_student
from nfm.stages.train_teacher import train_teacher
from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.storage import lease
from tests.tools.kind_checks import WrittenKinds
from tests.tools.object_store import ObjectStore
from tests.tools.ray_cluster import MARK
from tests.tools.small_run import SMALL, Nfm, Run, encode_in_process

_ray = ExitStack()  # ends the Ray of the tests


def _uses_ray(item: pytest.Item | None) -> bool:
    return "ray_cluster" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on Ray come first, those of the demo last among them, and Ray ends with them: its processes take half a GB,
    and this one grows."""
    items.sort(key=lambda item: (not _uses_ray(item), "home" in getattr(item, "fixturenames", ())))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if _uses_ray(item) and not _uses_ray(nextitem):
        _ray.close()


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _interrupts() -> None:
    """A shell ignores Ctrl-C for what it starts in the background, which all processes started from there inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Remote files of the tests, away from the user's."""
    os.environ["NFM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _one_driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process nothing competes for a lease, but in the tests of leases."""
    if request.path.name != "test_lease.py":
        monkeypatch.setattr(lease, "CONFIRM_SECONDS", 0.0)


@pytest.fixture(scope="session")
def config() -> Config:
    return load_config("digits", SMALL)


@pytest.fixture(scope="session")
def run(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("run")
    prepare(config.data, f"{root}/samples")
    train_teacher(config.teacher, f"{root}/samples", f"{root}/teacher")
    teacher = f"{root}/teacher/model.safetensors"
    couplings: dict[LayoutName, str] = {"webdataset": f"{root}/webdataset", "zarr": f"{root}/zarr"}
    for layout, url in couplings.items():
        encode_in_process(config, f"{root}/samples/train", teacher, url, layout)
    return Run(config, f"{root}/samples", teacher, couplings)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Nfm:
    """`nfm …` in this process: exit code, stdout, stderr."""

    def run_nfm(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nfm", *arguments])
        code = 0
        capsys.readouterr()
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run_nfm


@pytest.fixture(scope="session")
def write(tmp_path_factory: pytest.TempPathFactory) -> WrittenKinds:
    """Writes a kind of store once, and returns its URL."""
    return WrittenKinds(tmp_path_factory.getbasetemp() / "kinds")


@pytest.fixture(scope="session")
def student(run: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    """model.safetensors of a student trained on one batch of `run`'s webdataset couplings."""
    out = tmp_path_factory.mktemp("student")
    train = run.config.student.train.model_copy(update={"images": 64})
    train_student(run.config.student.model_copy(update={"train": train}), run.couplings["webdataset"], str(out))
    return f"{out}/model.safetensors"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for all tests that need it."""
    from nfm.pipeline.ray_session import local_ray

    os.environ[MARK] = uuid.uuid4().hex  # of its processes
    _ray.enter_context(local_ray(num_cpus=2))
    yield
    _ray.close()


@pytest.fixture(scope="module")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real S3 server for the tests of a file; each takes a bucket of its own."""
    with ObjectStore(tmp_path_factory.mktemp("object-store")) as store:
        yield store


@pytest.fixture(scope="session")
def home(ray_cluster: None, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `runs/demo` is a small finished demo."""
    from nfm.pipeline.demo import run_demo

    out = tmp_path_factory.mktemp("home")
    run_demo(config, f"{out}/runs/demo", None, skip_bad_images=False)
    return out


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An image folder with two classes of coloured squares, one greyscale, of different sizes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        folder = tmp_path / "images" / "train" / name
        folder.mkdir(parents=True)
        for i in range(6):
            size = (20 + i, 30 - i) if i else (16, 16)
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            if i == 1:
                image = image.convert("L")
            image.save(folder / f"{i}.{('png', 'jpg', 'jpeg')[(i + label) % 3]}")
    return tmp_path / "images"


@pytest.fixture(scope="session")
def mlc(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """mlcroissant, which looks for its cache when it is imported."""
    os.environ["CROISSANT_CACHE"] = str(tmp_path_factory.mktemp("croissant"))
    import mlcroissant

    return mlcroissant
