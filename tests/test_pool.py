"""The pool of actors: what it does again elsewhere, and when it gives up."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from nfm.pipeline.pool import RETRIES, Pool
from nfm.stages.errors import StageError

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Flaky:
    """Squares numbers, and fails as the files in a folder say: <task>.<what> holds how many times still."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def ready(self) -> None:
        self._fail("ready")

    def square(self, task: int) -> int:
        self._fail(str(task))
        return task * task

    def _fail(self, task: str) -> None:
        for what in ("dies", "errs", "full"):
            file = self.folder / f"{task}.{what}"
            left = int(file.read_text()) if file.exists() else 0
            if left:
                file.write_text(str(left - 1))
                if what == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(28, "No space left on device") if what == "full" else RuntimeError("CUDA error")


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    actor = ray.remote(Flaky)

    def make(resources: dict[str, float], device: str) -> Any:
        assert device == "cpu"
        return actor.options(max_concurrency=2, num_cpus=1).remote(str(tmp_path))

    with Pool(make, workers=2, cpus_per_worker=1) as pool:
        yield pool


def run(pool: Pool, tasks: range) -> dict[int, int]:
    return dict(pool.run("square", tasks, lambda: True))


def test_tasks_of_a_dead_or_failing_actor_go_to_another(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "3.dies").write_text("1")
    (tmp_path / "5.errs").write_text("2")
    assert run(pool, range(8)) == {task: task * task for task in range(8)}
    assert pool.deaths == 3
    assert 3 <= pool.retries <= 6, "with the other task that was in the same hand"
    assert not pool.lost and not pool.in_hand


def test_a_task_that_kills_every_actor_is_named(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "1.errs").write_text("99")
    with pytest.raises(StageError, match=f"died {RETRIES + 1} times on 1, at last with RuntimeError: CUDA error"):
        run(pool, range(1, 2))


def test_actors_that_die_as_they_start_end_the_job(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "ready.dies").write_text("99")
    with pytest.raises(StageError, match="workers die as they start"):
        run(pool, range(2))


def test_a_worker_that_no_node_has_room_for_is_refused() -> None:
    with (
        Pool(ray.put, workers=None, cpus_per_worker=64) as pool,
        pytest.raises(StageError, match="none of which has 64"),
    ):
        next(pool.run("square", [1], lambda: True))


def test_a_full_disk_is_no_fault_of_the_actor(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "0.full").write_text("1")
    with pytest.raises(OSError, match="No space left"):
        run(pool, range(3))


def test_no_more_tasks_are_begun_once_the_tick_says_so(pool: Pool) -> None:
    asked: list[int] = []

    def tick() -> bool:
        asked.append(len(pool.in_hand))
        return not any(asked)

    done = dict(pool.run("square", range(1000), tick))
    assert 0 < len(done) < 20
    assert not pool.in_hand
