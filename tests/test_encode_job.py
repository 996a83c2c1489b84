"""The encode job on a real Ray: the bytes are those of one process, whatever happens to the workers."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

import pipeline.encode_job as job
from stages.section import StageError
from storage_specs.errors import StoreError
from storage_specs.schema import LayoutName
from storage_specs.store import Store
from tests.conftest import Run, content

pytestmark = pytest.mark.usefixtures("ray_cluster")


def encode(run: Run, out: str, layout: LayoutName = "webdataset", draws: int = 3, workers: int = 2) -> None:
    config = run.config.encode.model_copy(update={"layout": layout, "draws": draws, "workers": workers})
    job.encode_couplings(config, f"{run.samples}/train", run.teacher, out)


@pytest.mark.parametrize("layout", ["webdataset", "zarr"])
def test_two_workers_write_the_bytes_of_one_process(run: Run, tmp_path: Path, layout: LayoutName) -> None:
    encode(run, str(tmp_path), layout)
    assert content(str(tmp_path)) == content(run.couplings[layout])
    assert Store(str(tmp_path)).dataset.id == Store(run.couplings[layout]).dataset.id
    assert list(Store(str(tmp_path)).faults()) == []


def test_only_missing_blocks_are_encoded(run: Run, tmp_path: Path) -> None:
    encode(run, str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    for name in ("dataset.json", "commits/000003.k000-003.json"):
        (tmp_path / name).unlink()
    encode(run, str(tmp_path))
    changed = {path for path in before if path.stat().st_mtime_ns != before[path]}
    assert {path.stem for path in changed} == {"000003"}
    assert content(str(tmp_path)) == content(run.couplings["webdataset"])
    encode(run, str(tmp_path))  # complete: nothing to do


def test_a_killed_worker_costs_only_its_own_blocks(run: Run, tmp_path: Path) -> None:
    """SIGKILL one actor's process as soon as the first block is committed."""
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and not list((tmp_path / "commits").glob("0*.json")):
            time.sleep(0.002)
        for stat in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if stat.read_bytes().startswith(b"ray::Worker"):
                    killed.append(int(stat.parent.name))
                    os.kill(killed[-1], signal.SIGKILL)
                    return
            except (FileNotFoundError, ProcessLookupError):
                continue

    killer = threading.Thread(target=kill_one)
    killer.start()
    encode(run, str(tmp_path))
    killer.join()
    assert killed
    assert content(str(tmp_path)) == content(run.couplings["webdataset"])


def test_another_teacher_or_spec_at_the_output_is_refused(run: Run, tmp_path: Path) -> None:
    encode(run, str(tmp_path))
    before = content(str(tmp_path))
    with pytest.raises(StoreError, match="coupling.draws is 3 there and 2 here"):
        encode(run, str(tmp_path), draws=2)
    assert content(str(tmp_path)) == before


def test_a_teacher_of_other_images_is_refused(run: Run, tmp_path: Path, images: Path) -> None:
    from stages.prepare import DataConfig, prepare

    config = DataConfig(source="folder", image_size=8, channels=3, holdout=0.3, block_rows=4)
    prepare(config, f"{tmp_path}/samples", images)
    with pytest.raises(StageError, match="use the teacher trained on these samples"):
        job.encode_couplings(run.config.encode, f"{tmp_path}/samples/train", run.teacher, f"{tmp_path}/out")
    assert not (tmp_path / "out").exists()
