"""The pool of actors: what it does again elsewhere, and when it gives up."""

import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError

from nfm.pipeline import pool as pool_module
from nfm.pipeline.pool import MAX_RETRIES, Pool
from nfm.stages.errors import StageError

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Flaky:
    """Squares numbers, and fails as the files in a folder say.

    <task>.dies, .errs, .full or .denied holds how many times the task still fails in that way. A task for which there
    is a file <task>.waits reports progress 7 and does not end before that file is gone.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.tasks: dict[int, int] = {}

    def ready(self) -> None:
        self._fail("ready")

    def square(self, task: int) -> int:
        self._fail(str(task))
        while (self.folder / f"{task}.waits").exists():
            self.tasks[task] = 7
            time.sleep(0.01)
        return task * task

    def progress(self) -> dict[int, int]:
        return dict(self.tasks)

    def broken_progress(self) -> dict[int, int]:
        raise KeyError("no such unit")

    def _fail(self, task: str) -> None:
        for kind in ("dies", "errs", "full", "denied"):
            file = self.folder / f"{task}.{kind}"
            num_failures = int(file.read_text()) if file.exists() else 0
            if num_failures:
                file.write_text(str(num_failures - 1))
                if kind == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                if kind == "full":
                    raise OSError(errno.ENOSPC, "No space left on device")
                if kind == "denied":
                    raise PermissionError("Access Denied")
                raise RuntimeError("CUDA error")


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    actor = ray.remote(Flaky)

    def make_actor(resources: dict[str, float], device: str) -> Any:
        assert device == "cpu"
        return actor.options(max_concurrency=3, num_cpus=1).remote(str(tmp_path))

    with Pool(make_actor, max_actors=2, cpus_per_actor=1) as pool:
        yield pool


def run(pool: Pool, tasks: range) -> dict[int, int]:
    return dict(pool.run("square", tasks, lambda: True))


def test_tasks_of_a_dead_or_failing_actor_go_to_another(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "3.dies").write_text("1")
    (tmp_path / "5.errs").write_text("2")
    assert run(pool, range(8)) == {task: task * task for task in range(8)}
    assert pool.num_actor_deaths == 3
    assert 3 <= pool.num_retries <= 6, "with the other task that was in flight on the same actor"
    assert not pool.deaths_by_task and not pool.tasks_in_flight


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("errs", f"workers failed {MAX_RETRIES + 1} times on 1, at last with RuntimeError: CUDA error$"),
        pytest.param("dies", f"workers died {MAX_RETRIES + 1} times on 1.*; if memory ran out", marks=pytest.mark.long),
    ],
)
def test_a_task_that_fails_on_every_actor_is_named(pool: Pool, tmp_path: Path, kind: str, message: str) -> None:
    (tmp_path / f"1.{kind}").write_text("99")
    with pytest.raises(StageError, match=message):
        run(pool, range(1, 2))


def test_actors_that_die_as_they_start_end_the_job(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "ready.dies").write_text("99")
    with pytest.raises(StageError, match="workers die as they start"):
        run(pool, range(2))


@pytest.mark.parametrize("workers", [None, 2])
@pytest.mark.parametrize(
    ("cpus", "device", "needs", "advice"),
    [(64, "cpu", "64 CPUs", "lower --cpus-per-worker"), (1, "cuda", "1 CPU and a GPU", "use --device cpu")],
)
def test_a_worker_that_this_machine_has_no_room_for_is_refused(
    workers: int | None, cpus: int, device: str, needs: str, advice: str
) -> None:
    message = f"one worker needs {needs}, but this machine has 2 CPUs and no GPUs; {advice}, or name a cluster"
    with (
        Pool(lambda _resources, _device: None, workers, cpus, device) as pool,
        pytest.raises(StageError, match=message),
    ):
        next(pool.run("square", [1], lambda: True))


def test_workers_for_nodes_that_may_join_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a cluster: a number of workers is waited for, and what they need is known; without one, it is refused."""
    monkeypatch.setattr(pool_module, "is_local", lambda: False)
    actor = ray.remote(Flaky)

    def make_actor(resources: dict[str, float], _device: str) -> Any:
        return actor.options(**resources).remote(str(tmp_path))

    with Pool(make_actor, max_actors=1, cpus_per_actor=64) as pool:
        assert list(pool.run("square", [1], lambda: pool.missing_node is None)) == []
        assert pool.missing_node == "64 CPUs" and len(pool.actors) == 1
    with (
        Pool(make_actor, max_actors=None, cpus_per_actor=64) as pool,
        pytest.raises(StageError, match="no node of the Ray cluster has 64 CPUs, .*; lower --cpus-per-worker"),
    ):
        next(pool.run("square", [1], lambda: True))


def test_no_more_actors_are_made_than_this_machine_has_room_for(pool: Pool) -> None:
    pool.max_actors = 9
    assert run(pool, range(9)) == {task: task * task for task in range(9)}
    assert len(pool.actors) == 2


@pytest.mark.parametrize(("kind", "message"), [("full", "No space left"), ("denied", "Access Denied")])
def test_storage_that_is_full_or_refuses_access_is_no_fault_of_the_actor(
    pool: Pool, tmp_path: Path, kind: str, message: str
) -> None:
    (tmp_path / f"0.{kind}").write_text("1")
    with pytest.raises(OSError, match=message):
        run(pool, range(3))


def test_no_more_tasks_are_started_once_the_tick_returns_false(pool: Pool) -> None:
    nums_in_flight: list[int] = []

    def tick() -> bool:
        nums_in_flight.append(len(pool.tasks_in_flight))
        return not any(nums_in_flight)

    results = dict(pool.run("square", range(1000), tick))
    assert 0 < len(results) < 20
    assert not pool.tasks_in_flight


def test_the_progress_of_tasks_in_flight_is_known_before_they_end(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks wait until both have been seen to be half done; then they end, and count no more."""
    monkeypatch.setattr(pool_module, "PROGRESS_SECONDS", 0.0)
    for task in (0, 1):
        (tmp_path / f"{task}.waits").touch()
    reports: list[int] = []

    def tick() -> bool:
        reports.append(pool.progress_in_flight)
        if reports[-1] == 2 * 7:
            for task in (0, 1):
                (tmp_path / f"{task}.waits").unlink(missing_ok=True)
        return True

    assert dict(pool.run("square", range(2), tick, "progress")) == {0: 0, 1: 1}
    assert max(reports) == 2 * 7
    assert pool.progress_in_flight == 0


def test_a_progress_method_that_fails_is_no_secret(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "PROGRESS_SECONDS", 0.0)
    (tmp_path / "0.waits").touch()
    with pytest.raises(RayTaskError, match="no such unit"):
        dict(pool.run("square", range(1), lambda: True, "broken_progress"))
