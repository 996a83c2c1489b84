"""Faults in real processes while couplings are encoded: after each, the store has the bytes of a clean run.

`python -m tests.tools.faults --rounds 60 --seed 0` (or `make soak ROUNDS=600`) prints a table. Kills land while units
are in flight: a job in which no unit was started yet, or all were committed, is run again.
"""

import argparse
import json
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

import nfm.pipeline.encode_job as job
from nfm.pipeline.config import StorageConfig, load_config
from nfm.pipeline.encode_report import Summary
from nfm.stages.encode import UnitEncoder, output_spec
from nfm.stages.prepare import prepare
from nfm.stages.train_teacher import train_teacher
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.verify import find_faults
from nfm.storage_specs.storage.files import Root
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.fault_plan import PLAN, Outcome, schedule, table
from tests.tools.object_store import ObjectStore
from tests.tools.ray_cluster import Cluster, kill_processes, list_processes
from tests.tools.small_run import SMALL
from tests.tools.stores import content, without_times
from tests.tools.waiting import PATIENCE, wait_for

DRAWS, BLOCK_ROWS = 8, 8
PAGE_BYTES = 4096  # of a tmpfs
FSYNC_SECONDS = 0.003  # a disk, and so a job that lasts long enough to be hit, at no cost of CPU


class MissedError(Exception):
    """The fault came before any unit was in flight, or after all were committed."""


class Soak:
    """What all jobs share: the samples and the teacher, the bytes of a clean run, a cluster, an object store."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        config = load_config("digits", [*SMALL, f"data.block_rows={BLOCK_ROWS}", f"encode.draws={DRAWS}"])
        self.config = config.encode
        with open(os.devnull, "w") as quiet, redirect_stderr(quiet):
            prepare(config.data, f"{folder}/samples")
            train_teacher(config.teacher, f"{folder}/samples", f"{folder}/teacher")
        self.samples, self.teacher = f"{folder}/samples/train", f"{folder}/teacher/model.safetensors"
        self.slow_file = folder / "slow"
        self.slow_file.write_text(str(FSYNC_SECONDS))
        self.cluster = Cluster(2, self.slow_file)
        self.store: ObjectStore | None = None
        clean = str(folder / "clean")
        spec, _ = output_spec(self.config, Store(self.samples), self.teacher, clean)
        writer = StoreWriter(clean, spec)
        self.spec = spec
        self.num_units = spec.num_blocks
        writer.initialize()
        encoder = UnitEncoder(self.samples, self.teacher, clean, spec.model_dump(mode="json"))
        for unit in writer.list_missing_units():
            encoder.encode(unit)
        writer.finalize()
        self.clean_content = content(clean)

    def __enter__(self) -> "Soak":
        self.cluster.start_node()
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()
        self.cluster.stop()
        if self.store:
            self.store.stop()

    # Drivers

    @contextmanager
    def slow_fsync(self, seconds: float) -> Iterator[None]:
        """Inside the block, each fsync of a worker takes so many seconds."""
        self.slow_file.write_text(f"{seconds:.3f}")
        try:
            yield
        finally:
            self.slow_file.write_text(str(FSYNC_SECONDS))

    def encode(self, out: str, workers: int = 1) -> Summary:
        """The job with the driver in this process."""
        config = self.config.model_copy(update={"workers": workers})
        storage = StorageConfig(options={"s3": self.store.options} if self.store else {})
        storage.apply()
        with open(os.devnull, "w") as quiet, redirect_stderr(quiet):
            return job.encode_couplings(config, self.samples, self.teacher, out, storage)

    def start_driver(self, out: str, address: str) -> "subprocess.Popen[str]":
        """The job with the driver in a process of its own, as a user starts it."""
        arguments = ["--samples", self.samples, "--teacher", self.teacher, "--out", out, "--draws", str(DRAWS)]
        return subprocess.Popen(
            [sys.executable, "-m", "nfm", "encode", *arguments, "--json-progress"],
            env=os.environ | {"RAY_ADDRESS": address},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    # When a fault comes

    def list_commits(self, out: str) -> list[Path]:
        """The commit records of the output."""
        return list(Path(out, "commits").glob("[0-9]*.json"))

    def list_lost_units(self, out: str) -> dict[Path, int]:
        """The x files of units that have no commit, with the time (ns) at which they were written; called after a
        fault, it waits until all workers are gone."""
        wait_for(lambda: not self.cluster.list_workers(), "the end of the workers")
        committed = {path.name.partition(".")[0] for path in self.list_commits(out)}
        return {path: path.stat().st_mtime_ns for path in Path(out, "x").glob("*.tar") if path.stem not in committed}

    def wait_for_commits(self, out: str, driver: "subprocess.Popen[str] | None" = None) -> None:
        """Wait for a few more commits, and a random moment more. Raises MissedError if the job is over then."""
        count = len(self.list_commits(out)) + self.random.randrange(1, 4)

        def is_over() -> bool:
            return len(self.list_commits(out)) == self.num_units or (driver is not None and driver.poll() is not None)

        wait_for(lambda: len(self.list_commits(out)) >= count or is_over(), f"{count} commits")
        time.sleep(self.random.uniform(0, 0.05))
        if is_over():
            raise MissedError

    @contextmanager
    def run_beside(self, action: Callable[[], None]) -> Iterator[None]:
        """Run `action` in a thread beside the block; its errors are raised at the end."""
        errors: list[Exception] = []

        def run_action() -> None:
            try:
                action()
            except MissedError:
                pass  # fewer faults: those that came are counted
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=run_action, daemon=True)
        thread.start()
        yield
        thread.join()
        if errors:
            raise errors[0]

    # Faults: each hits one job up to `count` times

    def worker_killed(self, out: str, count: int) -> Outcome:
        """A worker at random, ready or just starting; the next one once the job has gone on."""
        killed = 0

        def apply_faults() -> None:
            nonlocal killed
            for _ in range(count):
                self.wait_for_commits(out)
                kill_processes([self.random.choice(wait_for(self.cluster.list_workers, "a worker"))])
                killed += 1

        with self.run_beside(apply_faults):
            summary = self.encode(out, workers=2)
        return Outcome(killed, summary.units_of_dead_workers, summary.units_repeated)

    def driver_killed(self, out: str, count: int, number: signal.Signals = signal.SIGKILL, code: int = -9) -> Outcome:
        killed = 0
        lost_units: list[dict[Path, int]] = []
        for _ in range(count):
            with self.start_driver(out, self.cluster.address) as driver:
                try:
                    self.wait_for_commits(out, driver)
                except MissedError:
                    driver.communicate()
                    break
                driver.send_signal(number)
                _, errors = driver.communicate(timeout=PATIENCE)
            if driver.returncode == 0:
                break  # it was over in the same moment
            assert driver.returncode == code, f"the driver ended with {driver.returncode}: {errors}"
            if "units in flight" in errors:  # it was encoding, and neither before nor after that
                assert errors.index("received SIGTERM; finishing") < errors.rindex("received SIGTERM; "), errors
            killed += 1
            lost_units.append(self.list_lost_units(out))
        self.encode(out)
        return Outcome(killed, sum(map(len, lost_units)), count_rewritten(lost_units))

    def driver_told_to_end(self, out: str, count: int) -> Outcome:
        return self.driver_killed(out, count, signal.SIGTERM, 75)

    def ray_head_killed(self, out: str, count: int) -> Outcome:
        assert count == 1
        with Cluster(2, self.slow_file) as cluster, self.start_driver(out, cluster.address) as driver:
            self.wait_for_commits(out)
            cluster.kill_node(cluster.nodes[0])
            _, errors = driver.communicate(timeout=PATIENCE)
        if driver.returncode == 0:
            raise MissedError
        assert driver.returncode == 75, f"the driver ended with {driver.returncode}: {errors}"
        summary = self.encode(out)
        return Outcome(1, summary.units_of_earlier_driver, summary.units_repeated)

    def ray_node_killed(self, out: str, count: int) -> Outcome:
        """One worker on each of two nodes; the second joins while the job runs, and all of its processes are killed."""
        assert count == 1
        with (
            Cluster(1, self.slow_file) as cluster,
            self.slow_fsync(math.inf),  # no file is finished before the second node has come and gone
            self.start_driver(out, cluster.address) as driver,
        ):
            wait_for(lambda: list(Path(out).glob("x/*")), "the first worker")
            second = cluster.start_node()
            wait_for(lambda: has_files_open(list_processes(second, "ray::Worker"), out), "a second worker that writes")
            cluster.kill_node(second)
            self.slow_file.write_text("0")
            output, errors = driver.communicate(timeout=PATIENCE)
        assert driver.returncode == 0, errors
        summary = json.loads(output.splitlines()[-1])
        assert summary["worker_deaths"] == 1
        return Outcome(1, summary["units_of_dead_workers"], summary["units_repeated"])

    def object_store_killed(self, out: str, count: int) -> Outcome:
        if self.store is None:
            self.store = ObjectStore(self.folder / "objects")
            self.store.start()
        store, killed = self.store, 0
        url = f"{store.bucket('faults')}/{Path(out).name}"
        root = Root(url, store.options)

        def count_commits() -> int:
            return sum(name[0].isdigit() for name in root.list_names("commits"))

        def has_commits(count: int) -> bool:
            return count_commits() >= min(count, self.num_units)

        def apply_faults() -> None:
            nonlocal killed
            for _ in range(count):
                num_commits = count_commits() + self.random.randrange(1, 3)
                wait_for(partial(has_commits, num_commits), f"{num_commits} commits")
                if count_commits() == self.num_units:
                    return
                store.kill()
                killed += 1
                time.sleep(self.random.uniform(0, 0.5))
                store.start()

        with self.run_beside(apply_faults):
            summary = self.encode(url)
        assert without_times({name: root.read(name, 1 << 30) for name in root.list_file_sizes()}) == self.clean_content
        root.fs.rm(root.path, recursive=True)
        shutil.copytree(self.folder / "clean", out)  # for the check of all jobs; the objects were compared here
        return Outcome(killed, summary.units_of_dead_workers, summary.units_repeated)

    def disk_full(self, out: str, count: int) -> Outcome:
        """A file system that is too small, and then a little less so."""
        pages = sum(math.ceil(len(data) / PAGE_BYTES) for data in self.clean_content.values())
        step = pages * PAGE_BYTES / (count + 2)
        Path(out).mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={round(step)}", "none", out], check=True)
        lost_units: list[dict[Path, int]] = []
        try:
            for number in range(1, count + 1):
                size = round((number + self.random.uniform(-0.3, 0.3)) * step)
                subprocess.run(["mount", "-o", f"remount,size={size}", out], check=True)
                with pytest.raises(OSError, match="No space left on device"):
                    self.encode(out)
                assert not Path(out, "dataset.json").exists()
                lost_units.append(self.list_lost_units(out))
            num_commits = len(self.list_commits(out))
            subprocess.run(["mount", "-o", f"remount,size={round(9 * count * step)}", out], check=True)
            summary = self.encode(out)
            assert summary.units_before == num_commits
            outcome = Outcome(count, sum(map(len, lost_units)), count_rewritten(lost_units))
            shutil.copytree(out, f"{out}.copy")
        finally:
            subprocess.run(["umount", out], check=True)
        Path(out).rmdir()
        Path(f"{out}.copy").rename(out)
        return outcome

    def slow_disk(self, out: str, count: int) -> Outcome:
        """Each fsync takes as long as on a disk that is overloaded; workers are killed as they wait for one."""
        with self.slow_fsync(self.random.uniform(0.02, 0.04)):
            return self.worker_killed(out, count)

    def torn_files(self, out: str, count: int) -> Outcome:
        """What a node leaves that lost power: halves of files, under temporary names and under their own, of a store
        that was started."""
        StoreWriter(out, self.spec).initialize()
        names = self.random.sample(
            [name for name in self.clean_content if name.startswith(("x/", "z/", "noise/"))], count
        )
        for number, name in enumerate(names):
            path = Path(out, name if number % 2 else f"{name}.{uuid.uuid4().hex}.tmp")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.clean_content[name][: self.random.randrange(1, len(self.clean_content[name]))])
        return Outcome(count, 0, self.encode(out).units_repeated)

    def damage_files(self, out: str, count: int, damage: Callable[[Path], None]) -> Outcome:
        """Damage one file each of units that were committed, while others are encoded."""
        damaged_commits: set[Path] = set()

        def apply_faults() -> None:
            for _ in range(count):
                self.wait_for_commits(out)
                commit = self.random.choice(sorted(set(self.list_commits(out)) - damaged_commits))
                file = self.random.choice(json.loads(commit.read_text())["files"])
                damage(Path(out, file["path"]))
                damaged_commits.add(commit)

        with self.run_beside(apply_faults):
            summary = self.encode(out)
        assert summary.units_damaged == len(damaged_commits)
        return Outcome(len(damaged_commits), len(damaged_commits), summary.units_repeated)

    def file_deleted(self, out: str, count: int) -> Outcome:
        return self.damage_files(out, count, Path.unlink)

    def bit_flipped(self, out: str, count: int) -> Outcome:
        def flip(path: Path) -> None:
            data = bytearray(path.read_bytes())
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            path.write_bytes(data)

        return self.damage_files(out, count, flip)

    # Jobs

    def run_job(self, fault: str, count: int) -> Outcome:
        """Run a job with some faults, and check that the store is that of a clean run. If all of the faults came too
        late, the job is run again."""
        for _ in range(5):
            out = str(self.folder / "out")
            shutil.rmtree(out, ignore_errors=True)
            try:
                outcome: Outcome = getattr(self, fault.lower().replace(" ", "_"))(out, count)
            except MissedError:
                continue
            files = content(out)
            names = files.keys() | self.clean_content.keys()
            different = sorted(name for name in names if files.get(name) != self.clean_content.get(name))
            assert not different, f"{fault}: other bytes than a clean run in {different[:5]}"
            assert list(find_faults(Store(out))) == []
            if outcome.faults:
                return outcome
        raise AssertionError(f"{fault}: five times in a row it came too late to hit anything")


def count_rewritten(lost_units: list[dict[Path, int]]) -> int:
    """How many of the units that were lost at each fault, as `list_lost_units` gave them, were written after it."""
    count = 0
    for written_at in lost_units:
        for path, nanoseconds in written_at.items():
            if path.stat().st_mtime_ns > nanoseconds:
                count += 1
    return count


def has_files_open(pids: list[int], folder: str) -> bool:
    """Whether one of the processes has a file in the folder open."""
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                if os.readlink(descriptor).startswith(f"{folder}/"):
                    return True
    return False


@contextmanager
def redirect_stderr(file: Any) -> Iterator[None]:
    """Also for code that looks up sys.stderr when it prints."""
    previous = sys.stderr
    sys.stderr = file
    try:
        yield
    finally:
        sys.stderr = previous


def main() -> None:
    if "RAY_AUTH_TOKEN" not in os.environ:  # Ray looks at its environment when it is imported
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.tools.faults", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | token | quiet)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60, help="how many faults, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=PLAN, help="one kind of fault, once a job")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="nfm-"))
    outcomes: dict[str, list[Outcome]] = {}
    seconds: dict[str, float] = {}
    try:
        with Soak(folder, arguments.seed) as soak:
            plan = schedule(arguments.rounds, random.Random(arguments.seed))
            if arguments.only:
                plan = [(arguments.only, 1)] * arguments.rounds
            for number, (fault, count) in enumerate(plan):
                started_at = time.monotonic()
                outcome = soak.run_job(fault, count)
                outcomes.setdefault(fault, []).append(outcome)
                elapsed = time.monotonic() - started_at
                seconds[fault] = seconds.get(fault, 0.0) + elapsed
                print(f"job {number + 1}/{len(plan)} {fault}: {outcome}, {elapsed:.1f} s", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if outcomes:
            print(table(outcomes, seconds), flush=True)


if __name__ == "__main__":
    main()
