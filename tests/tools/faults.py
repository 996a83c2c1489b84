"""Faults in real processes while couplings are encoded: after each, the store has the bytes of a clean run.

`python -m tests.tools.faults --rounds 60 --seed 0` (or `make soak ROUNDS=600`) prints a table. Kills land while units
are in hand: a round in which nothing was begun yet, or all was done, is run again.
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
from dataclasses import dataclass
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
from nfm.storage_specs.storage.files import Root
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.object_store import ObjectStore
from tests.tools.ray_cluster import Cluster, alive, kill
from tests.tools.small_run import SMALL
from tests.tools.stores import content, without_times
from tests.tools.waiting import PATIENCE, wait_for

DRAWS, BLOCK_ROWS = 8, 8
FSYNC_SECONDS = 0.003  # a disk, and so a job that lasts long enough to be hit, at no cost of CPU
# Jobs of each kind of 66 faults, and how often each is hit before its bytes are looked at: most of a job is the start
# of its workers. A soak hits each job once.
PLAN = {
    "worker killed": (2, 6),
    "driver killed": (1, 2),
    "driver told to end": (1, 2),
    "Ray head killed": (1, 1),
    "Ray node killed": (1, 1),
    "object store killed": (1, 2),
    "disk full": (1, 4),
    "slow disk": (1, 2),
    "torn files": (1, 16),
    "shard deleted": (2, 6),
    "shard flipped": (2, 6),
}


class MissedError(Exception):
    """The fault came before anything was in hand, or after everything was done."""


@dataclass
class Outcome:
    faults: int
    lost: int  # units that were in hand at the faults, or damaged by them
    again: int  # units encoded again


class Soak:
    """What all jobs share: the samples and the teacher, the bytes of a clean run, a cluster, an object store."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        config = load_config("digits", [*SMALL, f"data.block_rows={BLOCK_ROWS}", f"encode.draws={DRAWS}"])
        self.config = config.encode
        with open(os.devnull, "w") as quiet, _stderr(quiet):
            prepare(config.data, f"{folder}/samples")
            train_teacher(config.teacher, f"{folder}/samples", f"{folder}/teacher")
        self.samples, self.teacher = f"{folder}/samples/train", f"{folder}/teacher/model.safetensors"
        self.slow = folder / "slow"
        self.slow.write_text(str(FSYNC_SECONDS))
        self.cluster = Cluster(2, self.slow)
        self.store: ObjectStore | None = None
        clean = str(folder / "clean")
        spec, _ = output_spec(self.config, Store(self.samples), self.teacher, clean)
        writer, self.units = StoreWriter(clean, spec), spec.blocks
        writer.initialize()
        encoder = UnitEncoder(self.samples, self.teacher, clean, spec.model_dump(mode="json"))
        for unit in writer.list_missing_units():
            encoder.encode(unit)
        writer.finalize()
        self.clean = content(clean)

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
    def slower(self, seconds: float) -> Iterator[None]:
        """A disk that is slower than it was."""
        self.slow.write_text(f"{seconds:.3f}")
        try:
            yield
        finally:
            self.slow.write_text(str(FSYNC_SECONDS))

    def encode(self, out: str, workers: int = 1) -> Summary:
        """The job with the driver in this process."""
        config = self.config.model_copy(update={"workers": workers})
        storage = StorageConfig(options={"s3": self.store.options} if self.store else {})
        storage.apply()
        with open(os.devnull, "w") as quiet, _stderr(quiet):
            return job.encode_couplings(config, self.samples, self.teacher, out, storage)

    def driver(self, out: str, address: str) -> "subprocess.Popen[str]":
        """The same in a process of its own, as a user starts it."""
        arguments = ["--samples", self.samples, "--teacher", self.teacher, "--out", out, "--draws", str(DRAWS)]
        return subprocess.Popen(
            [sys.executable, "-m", "nfm", "encode", *arguments, "--json-progress"],
            env=os.environ | {"RAY_ADDRESS": address},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    # When a fault comes

    def done(self, out: str) -> list[Path]:
        return list(Path(out, "commits").glob("[0-9]*.json"))

    def begun(self, out: str) -> dict[Path, int]:
        """When the first file was written of each unit that has one, and no commit: once all workers are gone."""
        wait_for(lambda: not self.cluster.workers(), "the end of the workers")
        committed = {path.name.partition(".")[0] for path in self.done(out)}
        return {path: path.stat().st_mtime_ns for path in Path(out, "x").glob("*.tar") if path.stem not in committed}

    def moment(self, out: str, driver: "subprocess.Popen[str] | None" = None) -> None:
        """Some time while units are in hand, a few commits from now. Raises MissedError where the job is over."""
        count = len(self.done(out)) + self.random.randrange(1, 4)

        def over() -> bool:
            return len(self.done(out)) == self.units or (driver is not None and driver.poll() is not None)

        wait_for(lambda: len(self.done(out)) >= count or over(), f"{count} commits")
        time.sleep(self.random.uniform(0, 0.05))
        if over():
            raise MissedError

    @contextmanager
    def meanwhile(self, action: Callable[[], None]) -> Iterator[None]:
        """`action` in a thread beside the block; its errors are raised at the end."""
        errors: list[Exception] = []

        def guarded() -> None:
            try:
                action()
            except MissedError:
                pass  # fewer faults: those that came are counted
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        yield
        thread.join()
        if errors:
            raise errors[0]

    # Faults: each hits one job up to `count` times

    def worker_killed(self, out: str, count: int) -> Outcome:
        """A worker at random, ready or just starting; the next one once the job has gone on."""
        killed = 0

        def strike() -> None:
            nonlocal killed
            for _ in range(count):
                self.moment(out)
                kill([self.random.choice(wait_for(self.cluster.workers, "a worker"))])
                killed += 1

        with self.meanwhile(strike):
            summary = self.encode(out, workers=2)
        return Outcome(killed, summary.units_of_dead_workers, summary.units_repeated)

    def driver_killed(self, out: str, count: int, number: signal.Signals = signal.SIGKILL, code: int = -9) -> Outcome:
        killed, begun = 0, list[dict[Path, int]]()
        for _ in range(count):
            with self.driver(out, self.cluster.address) as driver:
                try:
                    self.moment(out, driver)
                except MissedError:
                    driver.communicate()
                    break
                driver.send_signal(number)
                driver.communicate(timeout=PATIENCE)
            if driver.returncode == 0:
                break  # it was over in the same moment
            assert driver.returncode == code, f"the driver ended with {driver.returncode}"
            killed += 1
            begun.append(self.begun(out))
        self.encode(out)
        return Outcome(killed, sum(map(len, begun)), again(begun))

    def driver_told_to_end(self, out: str, count: int) -> Outcome:
        return self.driver_killed(out, count, signal.SIGTERM, 75)

    def ray_head_killed(self, out: str, count: int) -> Outcome:
        assert count == 1
        with Cluster(2, self.slow) as cluster, self.driver(out, cluster.address) as driver:
            self.moment(out)
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
            Cluster(1, self.slow) as cluster,
            self.slower(math.inf),  # no file is finished before the second node has come and gone
            self.driver(out, cluster.address) as driver,
        ):
            wait_for(lambda: list(Path(out).glob("x/*")), "the first worker")
            second = cluster.start_node()
            wait_for(lambda: has_files_open(alive(second, "ray::Worker"), out), "a second worker that writes")
            cluster.kill_node(second)
            self.slow.write_text("0")
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

        def commits() -> int:
            return sum(name[0].isdigit() for name in root.list_names("commits"))

        def enough(wanted: int) -> bool:
            return commits() >= min(wanted, self.units)

        def strike() -> None:
            nonlocal killed
            for _ in range(count):
                wanted = commits() + self.random.randrange(1, 3)
                wait_for(partial(enough, wanted), f"{wanted} commits")
                if commits() == self.units:
                    return
                store.kill()
                killed += 1
                time.sleep(self.random.uniform(0, 0.5))
                store.start()

        with self.meanwhile(strike):
            summary = self.encode(url)
        assert without_times({name: root.read(name, 1 << 30) for name in root.list_file_sizes()}) == self.clean
        root.fs.rm(root.path, recursive=True)
        shutil.copytree(self.folder / "clean", out)  # for the check of all jobs; the objects were compared here
        return Outcome(killed, summary.units_of_dead_workers, summary.units_repeated)

    def disk_full(self, out: str, count: int) -> Outcome:
        """A file system that is too small, and then a little less so."""
        step = sum(-(-len(data) // 4096) * 4096 for data in self.clean.values()) / (count + 2)
        Path(out).mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={round(step)}", "none", out], check=True)
        begun = list[dict[Path, int]]()
        try:
            for number in range(1, count + 1):
                size = round((number + self.random.uniform(-0.3, 0.3)) * step)
                subprocess.run(["mount", "-o", f"remount,size={size}", out], check=True)
                with pytest.raises(OSError, match="No space left on device"):
                    self.encode(out)
                assert not Path(out, "dataset.json").exists()
                begun.append(self.begun(out))
            before = len(self.done(out))
            subprocess.run(["mount", "-o", f"remount,size={round(9 * count * step)}", out], check=True)
            summary = self.encode(out)
            assert summary.units_before == before
            found = Outcome(count, sum(map(len, begun)), again(begun))
            shutil.copytree(out, f"{out}.kept")
        finally:
            subprocess.run(["umount", out], check=True)
        Path(out).rmdir()
        Path(f"{out}.kept").rename(out)
        return found

    def slow_disk(self, out: str, count: int) -> Outcome:
        """Each fsync takes as long as on a disk that is overloaded; workers are killed as they wait for one."""
        with self.slower(self.random.uniform(0.02, 0.04)):
            return self.worker_killed(out, count)

    def torn_files(self, out: str, count: int) -> Outcome:
        """What a node leaves that lost power: halves of files, under temporary names and under their own."""
        names = self.random.sample([name for name in self.clean if name.startswith(("x/", "z/", "noise/"))], count)
        for number, name in enumerate(names):
            path = Path(out, name if number % 2 else f"{name}.{uuid.uuid4().hex}.tmp")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.clean[name][: self.random.randrange(1, len(self.clean[name]))])
        return Outcome(count, 0, self.encode(out).units_repeated)

    def damaged(self, out: str, count: int, damage: Callable[[Path], None]) -> Outcome:
        """Files of different units that were committed, while others are encoded."""
        hit: set[Path] = set()

        def strike() -> None:
            for _ in range(count):
                self.moment(out)
                commit = self.random.choice(sorted(set(self.done(out)) - hit))
                damage(Path(out, self.random.choice(json.loads(commit.read_text())["files"])["path"]))
                hit.add(commit)

        with self.meanwhile(strike):
            summary = self.encode(out)
        assert summary.units_damaged == len(hit)
        return Outcome(len(hit), len(hit), summary.units_repeated)

    def shard_deleted(self, out: str, count: int) -> Outcome:
        return self.damaged(out, count, Path.unlink)

    def shard_flipped(self, out: str, count: int) -> Outcome:
        def flip(path: Path) -> None:
            data = bytearray(path.read_bytes())
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            path.write_bytes(data)

        return self.damaged(out, count, flip)

    # Jobs

    def job(self, fault: str, count: int) -> Outcome:
        """One job with some faults, and the check that the store is that of a clean run. Where all of the faults would
        have come too late, the job is run again."""
        for _ in range(5):
            out = str(self.folder / "out")
            shutil.rmtree(out, ignore_errors=True)
            try:
                outcome: Outcome = getattr(self, fault.lower().replace(" ", "_"))(out, count)
            except MissedError:
                continue
            found = content(out)
            names = found.keys() | self.clean.keys()
            different = sorted(name for name in names if found.get(name) != self.clean.get(name))
            assert not different, f"{fault}: other bytes than a clean run in {different[:5]}"
            assert list(Store(out).find_faults()) == []
            if outcome.faults:
                return outcome
        raise AssertionError(f"{fault}: five times in a row it came too late to hit anything")


def again(begun: list[dict[Path, int]]) -> int:
    """How many of the units that were begun at some fault were written again after it."""
    return sum(path.stat().st_mtime_ns > at for state in begun for path, at in state.items())


def has_files_open(pids: list[int], folder: str) -> bool:
    """Whether one of the processes has a file in the folder open."""
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                if os.readlink(descriptor).startswith(f"{folder}/"):
                    return True
    return False


@contextmanager
def _stderr(file: Any) -> Iterator[None]:
    before, sys.stderr = sys.stderr, file
    try:
        yield
    finally:
        sys.stderr = before


def may_mount() -> bool:
    """Whether this process may mount a tmpfs, which a full disk needs."""
    folder = tempfile.mkdtemp()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode == 0
    if mounted:
        subprocess.run(["umount", folder], check=True)
    Path(folder).rmdir()
    return mounted


def schedule(faults: int, generator: random.Random) -> list[tuple[str, int]]:
    """Jobs with the faults of each, in an order of chance: PLAN, or the same shares of more faults, one a job."""
    plan = PLAN if may_mount() else {fault: jobs for fault, jobs in PLAN.items() if fault != "disk full"}
    if len(plan) < len(PLAN):
        print("no right to mount a tmpfs: no disk is full in this run", flush=True)
    whole = sum(jobs * each for jobs, each in PLAN.values())
    if faults <= whole:
        found = [(fault, each) for fault, (jobs, each) in plan.items() for _ in range(jobs)]
    else:
        found = [(fault, 1) for fault, (jobs, each) in plan.items() for _ in range(round(jobs * each * faults / whole))]
    generator.shuffle(found)
    return found


def table(outcomes: dict[str, list[Outcome]], seconds: dict[str, float]) -> str:
    lines = ["| fault | rounds | jobs | units lost | units encoded again | result | s a job |", "| --- " * 7 + "|"]
    for fault, found in sorted(outcomes.items(), key=lambda item: list(PLAN).index(item[0])):
        faults, lost, again = (sum(getattr(outcome, name) for outcome in found) for name in ("faults", "lost", "again"))
        each = seconds[fault] / len(found)
        lines.append(f"| {fault} | {faults} | {len(found)} | {lost} | {again} | bytes of a clean run | {each:.1f} |")
    every = [outcome for found in outcomes.values() for outcome in found]
    faults, lost, again = (sum(getattr(outcome, name) for outcome in every) for name in ("faults", "lost", "again"))
    return "\n".join([*lines, f"| all | {faults} | {len(every)} | {lost} | {again} | | |"])


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
                start = time.monotonic()
                outcome = soak.job(fault, count)
                outcomes.setdefault(fault, []).append(outcome)
                spent = time.monotonic() - start
                seconds[fault] = seconds.get(fault, 0.0) + spent
                print(f"job {number + 1}/{len(plan)} {fault}: {outcome}, {spent:.1f} s", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if outcomes:
            print(table(outcomes, seconds), flush=True)


if __name__ == "__main__":
    main()
