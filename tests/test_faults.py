"""Sixty faults in real processes, and the job submitted as a user does: see tests/faults.py and docs/encode.md."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import Run, content

ROOT = Path(__file__).parent.parent
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.mark.timeout(900)
def test_after_every_fault_the_bytes_are_those_of_a_clean_run() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.faults"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    assert done.returncode == 0, "its output above names the fault"
    rounds = re.search(r"^\| all \| (\d+) ", done.stdout, re.MULTILINE)
    assert rounds and int(rounds[1]) >= 60  # of 66: kills that came after the end of a job are not counted


@pytest.fixture
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Ray head with its job server, started as on a cluster, and the environment in which to speak to it."""
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(3)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        port, dashboard, agent = (probe.getsockname()[1] for probe in sockets)
    mark = uuid.uuid4().hex
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex, "NFM_FAULTS_MARK": mark}
    environment["PATH"] = f"{Path(RAY).parent}:{environment['PATH']}"  # where a job finds its python
    environment.pop("RAY_ADDRESS", None)
    folder = tmp_path_factory.mktemp("h")
    limits = ["--num-cpus=2", "--object-store-memory=80000000", f"--temp-dir=/tmp/nfm-{mark[:8]}"]
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command = [RAY, "start", "--head", *ports, *limits]
    started = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert started.returncode == 0, started.stdout + started.stderr
    yield environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    from tests.faults import alive, kill

    while pids := alive(mark):
        kill(pids)
    shutil.rmtree(f"/tmp/nfm-{mark[:8]}", ignore_errors=True)


def test_the_job_can_be_submitted_to_a_ray_head(head: dict[str, str], run: Run, tmp_path: Path) -> None:
    """As docs/encode.md says: the working directory travels, the nodes have the dependencies."""
    arguments = ["--samples", f"{run.samples}/train", "--teacher", run.teacher, "--out", str(tmp_path / "out")]
    submit = [RAY, "job", "submit", "--working-dir", ".", "--", "python", "-m", "pipeline", "encode", *arguments]
    for _ in range(30):
        command = [*submit, "--draws", "3", "--json-progress"]
        done = subprocess.run(command, cwd=ROOT, env=head, capture_output=True, text=True)
        if "No available agent" not in done.stderr:  # the head answers some seconds before it takes jobs
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(next(line for line in done.stdout.splitlines() if '"event": "summary"' in line))
    assert (summary["units"], summary["draws"]) == (6, 537)
    assert content(str(tmp_path / "out")) == content(run.couplings["webdataset"])
