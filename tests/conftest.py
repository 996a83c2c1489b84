"""Small real data, shared by the tests: digits as sample stores, a teacher trained for seconds, its couplings."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (Ray spells it so)

import numpy as np
import pytest
import torch

from nfm.pipeline.config import Config, load_config
from nfm.stages.encode import UnitEncoder, output_spec
from nfm.stages.prepare import prepare
from nfm.stages.train_teacher import train_teacher
from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.object_store import ObjectStore

SMALL = (
    "data.holdout=0.9",
    "data.block_rows=32",
    "teacher.notation=TF-2×1-16/2",
    "teacher.head_dim=8",
    "teacher.train.images=640",
    "teacher.train.checkpoint_images=320",
    "teacher.train.log_images=128",
    "encode.draws=3",
    "student.size=SiT-1x16h2/2",
    "student.train.images=640",
    "student.train.checkpoint_images=320",
    "student.train.log_images=128",
    "evaluate.samples=300",
    "evaluate.grid_columns=10",
)


@dataclass(frozen=True)
class Run:
    """Paths of a small finished run up to its couplings."""

    config: Config
    samples: str
    teacher: str
    couplings: dict[LayoutName, str]


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Remote files of the tests, away from the user's."""
    os.environ["NFM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def config() -> Config:
    return load_config("digits", SMALL)


def encode_here(config: Config, samples: str, teacher: str, out: str, layout: LayoutName) -> None:
    """The encode stage without Ray, unit after unit: what the job on a cluster must equal."""
    encode = config.encode.model_copy(update={"layout": layout})
    spec, z_scale = output_spec(encode, Store(samples), teacher, out)
    writer = StoreWriter(out, spec)
    writer.begin(z_scale)
    encoder = UnitEncoder(samples, teacher, out, spec.model_dump(mode="json"))
    for unit in writer.missing():
        encoder.encode(unit)
    writer.finalize()


def content(url: str) -> dict[str, bytes]:
    """The bytes of a local store by path: all of it but the times it took, and the commit records that have them."""
    files = {str(path.relative_to(url)): path.read_bytes() for path in Path(url).rglob("*") if path.is_file()}
    return without_times(files)


def without_times(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if not re.fullmatch(r"commits/\d+.*|cost\.json", name)}


@pytest.fixture(scope="session")
def run(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("run")
    prepare(config.data, f"{root}/samples")
    train_teacher(config.teacher, f"{root}/samples", f"{root}/teacher")
    teacher = f"{root}/teacher/model.safetensors"
    couplings: dict[LayoutName, str] = {"webdataset": f"{root}/webdataset", "zarr": f"{root}/zarr"}
    for layout, url in couplings.items():
        encode_here(config, f"{root}/samples/train", teacher, url, layout)
    return Run(config, f"{root}/samples", teacher, couplings)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for all tests that need it."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real S3 server for all tests that need one; each takes a bucket of its own."""
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
