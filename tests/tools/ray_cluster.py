"""Ray as users start it, for tests that kill it: `ray start`, node by node, in processes that bear a mark."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from contextlib import ExitStack, suppress
from pathlib import Path

MARK = "NFM_FAULTS_MARK"  # in the environment of every process of a node, so that no other is killed
SLOW_FILE = "NFM_FAULTS_SLOW"  # while the file it names is there, each fsync takes as many seconds as the file says now
SLOW_FSYNC = """
import os, time
_fsync = os.fsync
def seconds():
    try:
        with open(os.environ["NFM_FAULTS_SLOW"]) as file:
            return float(file.read() or 0)
    except FileNotFoundError:
        return 0.0
def fsync(descriptor):
    start = time.monotonic()
    while (remaining := start + seconds() - time.monotonic()) > 0:
        time.sleep(min(remaining, 0.01))
    _fsync(descriptor)
os.fsync = fsync
"""


def list_processes(mark: str, *names: str) -> list[int]:
    """Process ids of a node, or of those of its processes whose command line has one of the names."""
    pids = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if f"{MARK}={mark}\0".encode() in (process / "environ").read_bytes():
                command = (process / "cmdline").read_bytes().decode(errors="replace")
                if not names or any(name in command for name in names):
                    pids.add(int(process.name))
    return sorted(pids - {os.getpid()})


def kill_processes(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Cluster:
    """A head, and nodes that join it.

    `slow_file` is the file that makes the disk of its nodes slow (SLOW_FILE); with `jobs` it takes submitted jobs at
    the port `dashboard`; `environment` is that of its processes.
    """

    def __init__(
        self, cpus: int, slow_file: Path | None = None, jobs: bool = False, environment: dict[str, str] | None = None
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nfm-", dir="/tmp"))  # short: sockets lie below it
        self.cpus = cpus
        self.jobs = jobs
        self.environment = dict(environment or os.environ)
        with ExitStack() as probes:
            sockets = [probes.enter_context(socket.socket()) for _ in range(3)]
            for probe in sockets:
                probe.bind(("127.0.0.1", 0))
            self.port, self.dashboard, self.agent = (probe.getsockname()[1] for probe in sockets)
        self.address = f"127.0.0.1:{self.port}"
        self.nodes: list[str] = []
        if slow_file is not None:
            (self.folder / "sitecustomize.py").write_text(SLOW_FSYNC)
            self.environment |= {SLOW_FILE: str(slow_file), "PYTHONPATH": f"{self.folder}:{os.getcwd()}"}

    def start_node(self) -> str:
        """The head, or another node; returns its mark."""
        mark = uuid.uuid4().hex
        if self.nodes:
            options = [f"--address={self.address}"]
        else:
            options = ["--head", f"--port={self.port}", f"--temp-dir={self.folder}/ray"]
            options += [f"--dashboard-port={self.dashboard}", f"--dashboard-agent-listen-port={self.agent}"]
            if not self.jobs:
                options.append("--include-dashboard=false")
        log = self.folder / "start.log"
        ray = Path(sys.executable).with_name("ray")
        result = subprocess.run(
            [ray, "start", *options, f"--num-cpus={self.cpus}", "--object-store-memory=80000000"],
            env=self.environment | {MARK: mark},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        assert result.returncode == 0, log.read_text()
        self.nodes.append(mark)
        return mark

    def list_workers(self) -> list[int]:
        return [pid for mark in self.nodes for pid in list_processes(mark, "ray::Worker")]

    def kill_node(self, mark: str) -> None:
        self.nodes.remove(mark)
        while pids := list_processes(mark):
            kill_processes(pids)

    def stop(self) -> None:
        for mark in list(self.nodes):
            self.kill_node(mark)
        shutil.rmtree(self.folder, ignore_errors=True)  # what a dying process still writes there is of no use

    def __enter__(self) -> "Cluster":
        self.start_node()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
