"""Sixty faults in real processes, and the job submitted as a user does: tests/tools/faults.py, docs/encode.md."""

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.ray_cluster import Cluster
from tests.tools.small_run import Run
from tests.tools.stores import content
from tests.tools.waiting import wait_for

ROOT = Path(__file__).parent.parent
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_after_every_fault_the_bytes_are_those_of_a_clean_run() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.tools.faults"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    assert done.returncode == 0, "its output above names the fault"
    rounds = re.search(r"^\| all \| (\d+) ", done.stdout, re.MULTILINE)
    assert rounds and int(rounds[1]) >= 60  # of 66: kills that came after the end of a job are not counted


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """In which to speak to a Ray head with its job server, started as on a cluster."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    environment["PATH"] = f"{Path(RAY).parent}:{environment['PATH']}"  # where a job finds its python
    with Cluster(2, jobs=True, environment=environment) as head:
        yield environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{head.dashboard}"}


@pytest.mark.long
def test_the_job_can_be_submitted_to_a_ray_head(environment: dict[str, str], run: Run, tmp_path: Path) -> None:
    """As docs/encode.md says: the working directory travels, the nodes have the dependencies."""
    arguments = ["--samples", f"{run.samples}/train", "--teacher", run.teacher, "--out", str(tmp_path / "out")]
    submit = [RAY, "job", "submit", "--working-dir", ".", "--", "python", "-m", "nfm", "encode", *arguments]

    def run_job() -> "subprocess.CompletedProcess[str] | None":
        command = [*submit, "--draws", "3", "--json-progress"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        return None if "No available agent" in done.stderr else done  # the head answers before it takes jobs

    done = wait_for(run_job, "an agent that takes jobs")
    assert done is not None
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(next(line for line in done.stdout.splitlines() if '"event": "summary"' in line))
    assert (summary["units_encoded"], summary["pairs_encoded"]) == (6, 537)
    assert content(str(tmp_path / "out")) == content(run.couplings["webdataset"])
