"""Kill and resume with real processes: the global sequence goes on bit for bit, at any world size and thread count."""

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nfm.storage_specs.reading.stream import CouplingStream, Source, StreamState
from tests.tools.small_run import Run
from tests.tools.waiting import wait_for

BATCH = 24
READER = """
import hashlib, json, sys, time, torch
from nfm.storage_specs.reading.stream import CouplingStream, Source, StreamState
job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])
sources = [Source(**source) for source in job["sources"]]
place = {"rank": job["rank"], "world_size": job["world"], "window_blocks": job["window"]}
stream = CouplingStream(sources, job["batch"], 7, **place)
stream.state = StreamState(*job["state"])
with open(job["log"], "a") as log:
    while True:
        batch = next(stream)
        keys = list(zip(batch.source.tolist(), batch.index.tolist(), batch.draw.tolist()))
        pairs = zip(batch.x.numpy(), batch.z.numpy())
        sha = [hashlib.sha256(x.tobytes() + z.tobytes()).hexdigest() for x, z in pairs]
        line = {"keys": keys, "sha": sha, "state": [stream.state.epoch, stream.state.position]}
        log.write(json.dumps(line) + "\\n")
        log.flush()
        time.sleep(0.005)
"""


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a killed writer may leave half a one."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def run_and_kill(folder: Path, sources: list[dict[str, Any]], window: int | None, state: list[int], world: int) -> None:
    """`world` real processes read on from `state`, until each has read some batches and all are killed at once."""
    logs = [folder / f"{rank}.log" for rank in range(world)]
    folder.mkdir()
    processes = []
    for rank, log in enumerate(logs):
        job: dict[str, Any] = {
            "sources": sources,
            "window": window,
            "state": state,
            "rank": rank,
            "world": world,
            "batch": BATCH,
        }
        job |= {"log": str(log), "threads": 1 + rank % 2}
        processes.append(subprocess.Popen([sys.executable, "-c", READER, json.dumps(job)]))
    try:

        def all_have_read() -> bool:
            assert all(process.poll() is None for process in processes), "a reader died by itself"
            return min(len(lines(log)) for log in logs) >= 12

        wait_for(all_have_read, "twelve batches of each reader")
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait()


KINDS = [pytest.param("one store", marks=pytest.mark.long), pytest.param("windows", marks=pytest.mark.long), "mixture"]


@pytest.mark.parametrize("kind", KINDS)
def test_killed_readers_resume_the_same_sequence(run: Run, tmp_path: Path, kind: str) -> None:
    urls = list(run.couplings.values())
    weights = {urls[0]: 3.0, urls[1]: 1.0}
    sources: list[dict[str, Any]] = [
        {"url": url, "weight": weights[url]} for url in (urls if kind == "mixture" else urls[:1])
    ]
    window = 2 if kind == "windows" else None
    keys: list[Any] = []
    digests: list[str] = []
    state = [0, 0]
    for world in (1, 3, 2):
        folder = tmp_path / str(world)
        run_and_kill(folder, sources, window, state, world)
        ranks = [lines(folder / f"{rank}.log") for rank in range(world)]
        common = min(map(len, ranks))  # what every rank finished is what a checkpoint would know of
        for step in range(common):
            for rank in ranks:
                keys += [tuple(key) for key in rank[step]["keys"]]
                digests += rank[step]["sha"]
        assert len({json.dumps(rank[common - 1]["state"]) for rank in ranks}) == 1
        state = ranks[0][common - 1]["state"]
    assert len(keys) > 36 * BATCH - 1
    stream = CouplingStream([Source(**source) for source in sources], BATCH, 7, window_blocks=window)
    expected_keys: list[Any] = []
    expected: list[str] = []
    while len(expected) < len(digests):
        batch = next(stream)
        expected_keys += zip(batch.source.tolist(), batch.index.tolist(), batch.draw.tolist(), strict=True)
        expected += [
            hashlib.sha256(x.tobytes() + z.tobytes()).hexdigest()
            for x, z in zip(batch.x.numpy(), batch.z.numpy(), strict=True)
        ]
    assert keys == expected_keys
    assert digests == expected
    assert stream.state == StreamState(*state)
    stream.close()
