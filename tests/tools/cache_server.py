"""A cache for tests, and remote files in memory that it fetches."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nfm.storage_specs.storage.cache import Cache
from nfm.storage_specs.storage.files import Root, sha256
from tests.tools.waiting import wait_for

DATA = bytes(range(256)) * 400
DIGEST = sha256(DATA)


class Server(Root):
    """Remote files in memory. It notes which were read."""

    def __init__(self, **files: bytes) -> None:
        super().__init__("memory://cache")
        self.files = {"file": DATA} | files
        self.reads: list[str] = []

    def read_range(self, path: str, start: int | None, end: int | None) -> bytes:
        self.reads.append(path)
        return self.files[path][start:end]


def fetch(folder: Path, server: Root, data: bytes = DATA, max_bytes: int = 10**9, path: str = "file") -> Path:
    """By a process that has not used the cache yet."""
    return Cache(folder, max_bytes).fetch(server, path, len(data), sha256(data))


def wait_for_tick(path: Path) -> None:
    """Until the clock of the file system has gone on since a file was changed: only then do times tell of a change."""

    def now() -> int:
        probe = path.parent.with_name("probe")
        probe.touch()
        return probe.stat().st_mtime_ns

    wait_for(lambda: now() > path.stat().st_ctime_ns, "the next tick of the file system's clock")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@contextmanager
def locked(folder: Path, digest: str = DIGEST) -> Iterator[None]:
    """The record of a file, locked by another process."""
    script = (
        "import fcntl, os, sys; record = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(record, fcntl.LOCK_EX); print('locked', flush=True); input()"
    )
    command = [sys.executable, "-c", script, f"{folder}/{digest}.record"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield
        process.kill()
