"""The encode job on a real Ray: the bytes are those of one process, whatever happens to the workers."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import nfm.pipeline.encode_job as job
from nfm.models.tarflow import forward_flops
from nfm.pipeline.cli import main
from nfm.pipeline.config import StorageConfig
from nfm.pipeline.encode_report import Summary
from nfm.pipeline.pool import Pool
from nfm.stages.encode import load_teacher, output_spec
from nfm.stages.errors import StageError
from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.verify import find_faults
from nfm.storage_specs.storage import lease
from nfm.storage_specs.storage.errors import StorageError, StoreError
from nfm.storage_specs.storage.files import set_file_system_options
from nfm.storage_specs.writing.units import Unit
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.lease_holder import lease_holder
from tests.tools.object_store import ObjectStore
from tests.tools.ray_cluster import MARK, kill_processes, list_processes
from tests.tools.small_run import Run, infinite_teacher
from tests.tools.stores import content, tree
from tests.tools.waiting import PATIENCE

pytestmark = pytest.mark.usefixtures("ray_cluster")


def encode(run: Run, out: str, layout: LayoutName = "webdataset", draws: int = 3, workers: int = 2) -> Summary:
    config = run.config.encode.model_copy(update={"layout": layout, "draws": draws, "workers": workers})
    return job.encode_couplings(config, f"{run.samples}/train", run.teacher, out)


@pytest.mark.parametrize("layout", ["webdataset", "zarr"])
def test_two_workers_write_the_bytes_of_one_process(run: Run, tmp_path: Path, layout: LayoutName) -> None:
    encode(run, str(tmp_path), layout)
    assert content(str(tmp_path)) == content(run.couplings[layout])
    assert Store(str(tmp_path)).dataset.id == Store(run.couplings[layout]).dataset.id
    assert list(find_faults(Store(str(tmp_path)))) == []


def test_only_missing_blocks_are_encoded(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode(run, str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    for name in ("dataset.json", "commits/000003.k000-003.json"):
        (tmp_path / name).unlink()
    encode(run, str(tmp_path))
    changed = {path for path in before if path.stat().st_mtime_ns != before[path]}
    assert {path.stem for path in changed} == {"000003"}
    assert content(str(tmp_path)) == content(run.couplings["webdataset"])
    capsys.readouterr()
    assert encode(run, str(tmp_path)).units_encoded == 0
    assert capsys.readouterr().err == (
        f"{tmp_path} is complete already; its files are not read again: nfm store verify does that\n"
    )


@pytest.mark.long
def test_more_draws_extend_a_store_to_the_bytes_of_one_made_with_them(run: Run, tmp_path: Path) -> None:
    grown, whole = tmp_path / "grown", tmp_path / "whole"
    encode(run, str(grown), draws=3)
    before = {path: path.stat().st_mtime_ns for path in grown.rglob("*.tar")}
    student = Store(str(grown))
    assert len(student.files) == 42
    summary = encode(run, str(grown), draws=5)
    assert summary.pairs_encoded == 2 * 179 and summary.units_before == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was there is not touched"
    assert student.z(0, 2).shape == (32, 1, 8, 8), "a reader that had it open reads on"
    encode(run, str(whole), draws=5)
    files, expected = tree(str(grown)), tree(str(whole))
    for name in ("manifest.parquet", "sigma_f.npy", "z_sums.npy", "z_class_sums.npy"):
        assert files[f"versions/0002/{name}"] == expected[f"versions/0001/{name}"], name
    for part in (files, expected):
        for name in [name for name in part if not name.startswith(("x/", "z/", "noise/", "names"))]:
            del part[name]
    assert files == expected
    assert Store(str(grown)).dataset.id == Store(str(whole)).dataset.id
    assert Store(f"{grown}@v1").document == student.document and list(find_faults(Store(f"{grown}@v1"))) == []
    assert list(find_faults(Store(str(grown)))) == []
    with pytest.raises(StoreError, match=r"coupling.draws: existing 5, requested 4 \(draws can be added"):
        encode(run, str(grown), draws=4)


def test_a_store_stays_readable_until_its_new_draws_are_complete(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.couplings["zarr"], tmp_path, dirs_exist_ok=True)
    before = Store(str(tmp_path)).dataset
    config = run.config.encode.model_copy(update={"layout": "zarr", "draws": 4})
    spec, _ = output_spec(config, Store(f"{run.samples}/train"), run.teacher, str(tmp_path))
    StoreWriter(str(tmp_path), spec).initialize()  # and then the power went
    assert Store(str(tmp_path)).dataset == before and list(find_faults(Store(str(tmp_path)))) == []
    encode(run, str(tmp_path), "zarr", draws=4)
    assert Store(str(tmp_path)).spec.num_draws == 4


def test_a_killed_worker_is_replaced(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed when the first unit is done, one or two are in flight, and others are not begun."""
    run_pool, killed = Pool.run, list[int]()

    def run_pool_and_kill(pool: Pool, *arguments: Any) -> Iterator[tuple[Any, Any]]:
        results = run_pool(pool, *arguments)
        yield next(results)
        if not killed:
            killed.extend(list_processes(os.environ[MARK], "ray::Worker"))
            kill_processes(killed)
        yield from results

    monkeypatch.setattr(Pool, "run", run_pool_and_kill)
    summary = encode(run, str(tmp_path), workers=1)
    assert killed and summary.worker_deaths == 1
    assert content(str(tmp_path)) == content(run.couplings["webdataset"])


def test_a_second_driver_is_refused_and_harms_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.5)
    monkeypatch.setattr(lease, "LEASE_SECONDS", PATIENCE)  # a holder that is slow is not dead
    with lease_holder(tmp_path):
        with pytest.raises(StoreError, match="is writing into it; wait until it ends, or stop it"):
            encode(run, str(tmp_path))
        assert os.listdir(tmp_path) == ["commits"] and not (tmp_path / "commits/spec.json").exists()
    assert encode(run, str(tmp_path)).units_encoded == 6


@pytest.mark.long
def test_storage_that_refuses_the_workers_is_named(run: Run, object_store: ObjectStore) -> None:
    """The driver may write, its workers may not."""
    out = f"s3://{object_store.bucket('refused')}/out"
    refused = StorageConfig(options={"s3": {**object_store.options, "secret": "wrong"}})
    config = run.config.encode.model_copy(update={"workers": 1})
    set_file_system_options({"s3": object_store.options})
    try:
        with pytest.raises(StorageError, match=f"{out}.*403.*check URL and credentials") as failure:
            job.encode_couplings(config, f"{run.samples}/train", run.teacher, out, refused)
    finally:
        set_file_system_options({})
    assert "died" not in str(failure.value)


@pytest.mark.long
def test_bad_pairs_are_named_and_counted(run: Run, tmp_path: Path) -> None:
    teacher, out = infinite_teacher(run, tmp_path, 3), str(tmp_path / "out")
    labels = Store(f"{run.samples}/train").labels()
    bad = 3 * int((labels == 3).sum())
    config = run.config.encode.model_copy(update={"workers": 1})
    with pytest.raises(
        FloatingPointError, match=r"is not finite .*: image \d+ draw 0.*not written\. The job stops here; with"
    ):
        job.encode_couplings(config, f"{run.samples}/train", teacher, out)
    tolerant = config.model_copy(update={"max_bad": bad})
    with pytest.raises(
        FloatingPointError, match=f"z of {bad} pairs is not finite.*All other units are encoded; the store is"
    ):
        job.encode_couplings(tolerant, f"{run.samples}/train", teacher, out)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_progress_and_summary_for_machines(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--samples", f"{run.samples}/train", "--teacher", run.teacher, "--out", str(tmp_path), "--draws", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["nfm", "encode", *arguments, "--json-progress", "--workers", "1"])
        main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    statuses = [line["status"] for line in lines if line["event"] == "status"]
    progress = [line for line in lines if line["event"] == "progress"]
    assert "waiting for the first worker" in statuses
    assert len(statuses) + len(progress) == len(lines) - 1
    assert (progress[0]["phase"], progress[0]["units_done"], progress[0]["workers"]) == ("encode", 0, 1)
    last, summary = progress[-1], lines[-1]
    assert last["phase"] == "check"
    assert (last["units_done"], last["units_total"], last["pairs_done"], last["pairs_total"]) == (6, 6, 537, 537)
    assert (last["units_checked"], last["units_to_check"]) == (6, 6)
    assert (last["workers"], last["retries"], last["seconds_left"]) == (1, 0, 0)
    assert summary["event"] == "summary" and summary["id"] == Store(str(tmp_path)).dataset.id
    assert (summary["units_encoded"], summary["pairs_encoded"], summary["units_repeated"]) == (6, 537, 0)
    flops = forward_flops(load_teacher(run.teacher)[0].config)
    assert summary["teacher_flop"] == 537 * flops
    assert summary["student_saves_flop"] == summary["student_images"] * flops


def test_pairs_of_an_earlier_run_are_not_counted(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode(run, str(tmp_path))
    for name in ("dataset.json", "commits/000003.k000-003.json"):
        (tmp_path / name).unlink()
    config = run.config.encode.model_copy(update={"workers": 1})
    capsys.readouterr()
    job.encode_couplings(config, f"{run.samples}/train", run.teacher, str(tmp_path), as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    progress = [line for line in lines if line["event"] == "progress"]
    assert {(line["units_total"], line["pairs_total"]) for line in progress} == {(1, 3 * 32)}
    assert progress[-1]["pairs_done"] == 3 * 32


def test_pairs_of_a_unit_are_reported_while_it_is_encoded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of a worker that is at the first unit: its pairs are counted batch by batch, before its commit."""
    reports: list[dict[Unit, int]] = []
    spec, _ = output_spec(run.config.encode, Store(f"{run.samples}/train"), run.teacher, str(tmp_path))
    StoreWriter(str(tmp_path), spec).initialize()
    worker = job.Worker(
        threads=1,
        storage=StorageConfig(),
        samples=f"{run.samples}/train",
        teacher=run.teacher,
        out=str(tmp_path),
        spec=spec.model_dump(mode="json"),
    )
    worker.ready()
    forward = worker.encoder.teacher.forward

    def observed_forward(*arguments: Tensor) -> Any:
        reports.append(worker.count_pairs_done())
        return forward(*arguments)

    monkeypatch.setattr(worker.encoder.teacher, "forward", observed_forward)
    worker.encoder.batch_rows = 16  # of the 32 rows of the block
    unit = Unit(0, 0, 3)
    assert worker.encode(unit).pairs == 3 * 32
    assert reports == [{unit: 16 * batch} for batch in range(6)]
    assert worker.count_pairs_done() == {}


def test_a_teacher_of_other_images_is_refused(run: Run, tmp_path: Path, images: Path) -> None:
    from nfm.stages.prepare import DataConfig, prepare

    config = DataConfig(source="folder", image_size=8, channels=3, holdout=0.3, block_rows=4)
    prepare(config, f"{tmp_path}/samples", images)
    with pytest.raises(StageError, match="use the teacher that was trained on these samples"):
        job.encode_couplings(run.config.encode, f"{tmp_path}/samples/train", run.teacher, f"{tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_a_job_without_room_for_a_worker_leaves_the_output_free(run: Run, tmp_path: Path) -> None:
    config = run.config.encode.model_copy(update={"cpus_per_worker": 64, "z_dtype": "float16"})
    with pytest.raises(StageError, match="one worker needs 64 CPUs, but this machine has 2 CPUs"):
        job.encode_couplings(config, f"{run.samples}/train", run.teacher, f"{tmp_path}/out")
    StoreWriter(f"{tmp_path}/out", Store(run.couplings["webdataset"]).spec).initialize()  # of another spec


def test_a_folder_of_other_things_is_refused_before_ray_starts(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(job, "ray_session")
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StoreError, match="holds thesis.tex; expected an empty folder"):
        encode(run, str(tmp_path))
    assert tree(str(tmp_path)).keys() == {"thesis.tex"}


def test_paths_mean_the_same_to_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.chdir(tmp_path)
    assert job.shared_url("~/out") == "/home/somebody/out"
    assert job.shared_url("out") == f"{tmp_path}/out" and job.shared_url("s3://bucket/out") == "s3://bucket/out"
    copy = tmp_path / "runtime_resources/working_dir_files/_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(StageError, match="got 'out', which is inside the copy of the working directory"):
        job.shared_url("out")
