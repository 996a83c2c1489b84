"""A real S3 server for tests and benchmarks: OpenStack Swift, in an environment of its own, on 127.0.0.1.

Objects lie on the disk, so that `kill()` followed by `start()` shows what survives the sudden death of the store.
Conditional puts (If-None-Match) are answered, but are not atomic here: nothing may use them as a lock.
"""

import fcntl
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import fsspec

SWIFT = "swift==2.38.3"
ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-swift"
LAUNCHER = Path(__file__).resolve().with_name("swift_launcher.py")
PORTS = range(20_000, 32_000)


def swift_python() -> Path:
    """The interpreter of Swift's environment, which the first call makes: its dependencies are no business of ours."""
    ENVIRONMENT.mkdir(exist_ok=True)
    venv = ENVIRONMENT / "env"
    python, ready = venv / "bin" / "python", venv / ".ready"
    with (ENVIRONMENT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until closed, by the death of this process too
        if not (python.exists() and ready.exists() and ready.read_text() == SWIFT):
            uv = [sys.executable, "-m", "uv"]
            subprocess.run([*uv, "venv", "--quiet", "--clear", "--python", sys.executable, venv], check=True)
            subprocess.run(
                [*uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", python, SWIFT], check=True
            )
            ready.write_text(SWIFT)
    return python


def free_ports(count: int) -> list[int]:
    """Ports below those the kernel gives to clients, which could take one of those while the store is down."""
    ports: list[int] = []
    generator = random.SystemRandom()  # a seed of the tests must not lead two sessions to the same ports
    while len(ports) < count:
        port = generator.choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in ports:
                ports.append(port)
    return ports


def require_xattrs(folder: Path) -> None:
    """Swift keeps an object's metadata in extended attributes; without them it starts, and fails at the first write."""
    probe = folder / ".xattr-probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.swift.metadata", b"probe")
    except OSError as error:
        raise RuntimeError(
            f"{folder} cannot hold an object store: its file system has no user extended attributes ({error.strerror})"
        ) from error
    finally:
        probe.unlink()


class ObjectStore:
    """An S3 server whose data is in `folder`; as a context manager it runs inside the block."""

    key = "test:tester"

    def __init__(self, folder: str | Path, secret: str = "testing") -> None:
        self.secret = secret
        self.folder = Path(folder).resolve()
        self._ports = free_ports(4)  # for life: a restarted server is found where it was
        self._launcher: subprocess.Popen[str] | None = None
        self._processes: list[int] = []  # as pidfds, which no process started later can be mistaken for

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def options(self) -> dict[str, Any]:
        """Storage options for fsspec. No region: s3fs would ask for buckets there, and Swift refuse."""
        return {"key": self.key, "secret": self.secret, "endpoint_url": self.endpoint}

    def start(self) -> None:
        """Returns when all servers answer."""
        assert self._launcher is None, "already running"
        self.folder.mkdir(parents=True, exist_ok=True)
        require_xattrs(self.folder)
        log = self.folder / "launcher.log"
        with log.open("w") as stderr:
            self._launcher = self._launch(stderr)
        assert self._launcher.stdout
        ready = self._launcher.stdout.readline()
        # The proxy is first: once it is dead, nothing done by the others can be acknowledged any more.
        pids = [*json.loads(ready or "[]"), self._launcher.pid]
        self._processes = [os.pidfd_open(pid) for pid in pids]
        if not ready:
            self.kill()
            raise RuntimeError(f"Swift did not start: {log.read_text().strip()}")

    def _launch(self, stderr: IO[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [swift_python(), LAUNCHER, self.folder, *map(str, self._ports)],
            stdin=subprocess.PIPE,  # held open by this process, so closed by its death
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"OBJECT_STORE_SECRET": self.secret},
            start_new_session=True,  # Ctrl-C is for the tests, which may still need the store to end in order
        )

    def kill(self) -> None:
        """All processes at once, in the middle of whatever they do; returns when they are gone."""
        if self._launcher is None:
            return
        with self._launcher:
            for process in self._processes:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
            for process in self._processes:
                gone = select.poll()
                gone.register(process, select.POLLIN)
                gone.poll()
                os.close(process)
        self._launcher, self._processes = None, []

    def stop(self) -> None:
        """The same: what Swift has acknowledged is on the disk, and there is no farewell to wait for."""
        self.kill()

    def bucket(self, name: str) -> str:
        """URL of the bucket, created if it is not there; names have at least three characters."""
        fsspec.filesystem("s3", **self.options).makedirs(name, exist_ok=True)
        return f"s3://{name}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
