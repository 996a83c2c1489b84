"""The cache of remote files: what becomes of locks, full disks, killed processes and failed downloads."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nfm.storage_specs.storage import cache_files
from nfm.storage_specs.storage.cache import RANGE_BYTES, Cache
from nfm.storage_specs.storage.cache_files import MARKER_FILE
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import Root, sha256
from tests.tools.cache_server import DATA, DIGEST, Server, fetch, locked, names, wait_for_tick
from tests.tools.waiting import PATIENCE, wait_for


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def server() -> Server:
    return Server()


def test_a_lock_that_is_kept_ends_in_an_error(folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_files, "LOCK_SECONDS", 0.2)
    Cache(folder).directory  # noqa: B018
    with locked(folder):
        with pytest.raises(StoreError, match=rf"{DIGEST}\.record: another process .*end that process .*set NFM_CACHE"):
            fetch(folder, server)
        other = DATA[::-1]
        server.files["other"] = other
        assert fetch(folder, server, other, path="other").read_bytes() == other, "others are not held up"
        server.stop_retrying.set()
        monkeypatch.setattr(cache_files, "LOCK_SECONDS", PATIENCE)
        with pytest.raises(StoreError, match="stopped waiting"):  # as a stream that is closed does
            fetch(folder, server)
        server.stop_retrying.clear()
    assert fetch(folder, server).read_bytes() == DATA, "a killed process leaves no lock"


def test_a_download_that_goes_on_is_waited_for(folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than LOCK_SECONDS, as long as bytes arrive."""
    monkeypatch.setattr(cache_files, "LOCK_SECONDS", 0.4)
    Cache(folder).directory  # noqa: B018
    started = time.monotonic()
    with locked(folder), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fetch, folder, server)
        while time.monotonic() < started + 1.2:
            (folder / f"{DIGEST}.part").write_bytes(b"more")
            time.sleep(0.02)
        assert not waiting.done()
        server.stop_retrying.set()
        with pytest.raises(StoreError, match="stopped waiting"):
            waiting.result()


def test_ctrl_c_ends_the_wait_for_a_lock(folder: Path) -> None:
    Cache(folder).directory  # noqa: B018
    script = (
        "import sys; from pathlib import Path; from nfm.storage_specs.storage.cache import Cache\n"
        "from nfm.storage_specs.storage.files import Root\n"
        "cache = Cache(Path(sys.argv[1])); print(cache.directory, flush=True)\n"
        "cache.fetch(Root('memory://x'), 'file', 5, sys.argv[2])"
    )
    with (
        locked(folder),
        subprocess.Popen(
            [sys.executable, "-c", script, folder, DIGEST], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process,
    ):
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        wait_for(lambda: f"{DIGEST}.record" in open_files(process.pid), "the file to be opened")
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().strip().endswith("KeyboardInterrupt")


def open_files(pid: int) -> set[str]:
    """The names of the files that a process has open. Linux."""
    descriptors = Path(f"/proc/{pid}/fd").iterdir()
    return {Path(os.readlink(descriptor)).name for descriptor in descriptors if descriptor.is_symlink()}


def test_a_full_disk_is_named_and_publishes_nothing(
    folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is nearly full takes a part of what it is given, and refuses the rest."""
    write, free = os.pwrite, [1000]

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if not free[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, data[: free[0]], offset)
        free[0] -= written
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)
    message = rf"{folder}/{DIGEST}\.part .*No space left on device; free space there, .*NFM_CACHE"
    with pytest.raises(StoreError, match=message) as error:
        fetch(folder, server)
    assert "sha256" not in str(error.value) and server.url not in str(error.value), "the server is not to blame"
    assert names(folder) <= {MARKER_FILE, f"{DIGEST}.record"}
    free[0] = 10**9
    assert fetch(folder, server).read_bytes() == DATA


def test_short_writes_are_continued(folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, data[:999], offset))
    assert fetch(folder, server).read_bytes() == DATA


def test_a_folder_that_is_deleted_meanwhile_is_made_again(folder: Path, server: Server) -> None:
    cache = Cache(folder)
    cache.fetch(server, "file", len(DATA), DIGEST)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert cache.fetch(server, "file", len(DATA), DIGEST).read_bytes() == DATA
    assert names(folder) == {MARKER_FILE, DIGEST, f"{DIGEST}.record"}


def test_what_killed_processes_left_is_deleted_and_what_lives_is_not(folder: Path, server: Server) -> None:
    fetch(folder, server)
    dead, alive = "a" * 64, "b" * 64
    for digest in (dead, alive):
        (folder / f"{digest}.record").touch()
        (folder / f"{digest}.part").write_bytes(bytes(50_000))
    (folder / f"{'c' * 64}.record").touch()
    server.files["other"] = DATA[::-1]
    with locked(folder, alive):
        fetch(folder, server, DATA[::-1], path="other")
    digests = {name.partition(".")[0] for name in names(folder)} - {MARKER_FILE}
    assert digests == {DIGEST, sha256(DATA[::-1]), alive}
    assert (folder / f"{alive}.part").exists()


def test_failed_downloads_take_no_room(folder: Path) -> None:
    """Neither on the disk nor in the accounts: files are not evicted for them."""
    server = Server(bad=b"?" * len(DATA))
    cache = Cache(folder, max_bytes=3 * len(DATA))
    path = cache.fetch(server, "file", len(DATA), DIGEST)
    for digest in ("0" * 64, "1" * 64, "2" * 64, "3" * 64):
        with pytest.raises(StoreError, match="sha256"):
            cache.fetch(server, "bad", len(DATA), digest)
    assert path.exists() and cache._used_bytes < 2 * len(DATA)
    assert not [name for name in names(folder) if name.endswith(".part")]


def test_the_folder_keeps_to_its_limit_and_drops_what_is_oldest(folder: Path) -> None:
    contents = [bytes([i]) * 100_000 for i in range(8)]
    server = Server(**{str(i): data for i, data in enumerate(contents)})
    cache = Cache(folder, max_bytes=450_000)

    def use(i: int) -> Path:
        path = cache.fetch(server, str(i), 100_000, sha256(contents[i]))
        wait_for_tick(path.with_suffix(".record"))  # its time is that of the last use
        return path

    paths = [use(i) for i in range(4)]
    use(0)
    use(4)
    assert [path.exists() for path in paths] == [True, False, True, True]
    assert use(1).read_bytes() == contents[1]
    for i in range(8):
        use(i)
        assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) <= 450_000


def test_threads_with_a_small_cache_of_their_own_get_every_file(folder: Path) -> None:
    """Two caches on one folder that holds a third of the files, each with many threads."""
    contents = {str(i): bytes([i]) * 50_000 for i in range(24)}
    server = Server(**contents)
    caches = [Cache(folder, max_bytes=8 * 60_000) for _ in range(2)]

    def use(number: int) -> None:
        name = str(number * 7 % len(contents))
        for _ in range(20):  # another thread may delete it before it is opened
            path = caches[number % 2].fetch(server, name, 50_000, sha256(contents[name]))
            try:
                assert path.read_bytes() == contents[name]
            except FileNotFoundError:
                continue
            return
        raise AssertionError("evicted again and again")

    with ThreadPoolExecutor(8) as pool:
        deque(pool.map(use, range(150)), maxlen=0)
    fetch(folder, server, max_bytes=8 * 60_000)
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) <= 8 * 60_000
    assert not [name for name in names(folder) if name.endswith(".part")]


def test_a_failed_range_leaves_nothing_that_still_writes(folder: Path, tmp_path: Path) -> None:
    """Of many ranges one fails at once and the others come late: none may write into a file opened since."""
    opened_since, late = threading.Event(), deque[int]()

    class Slow(Root):
        def read_range(self, path: str, start: int | None, end: int | None) -> bytes:
            assert start is not None and end is not None
            if start == 0:
                raise StoreError("gone")
            late.append(start)
            assert opened_since.wait(PATIENCE)
            return b"?" * (end - start)

    cache = Cache(folder)
    with ThreadPoolExecutor(1) as pool:
        failing = pool.submit(cache.fetch, Slow("memory://late"), "file", 4 * RANGE_BYTES, DIGEST)
        with pytest.raises(StoreError, match="gone"):
            failing.result(PATIENCE)
        with open(tmp_path / "later", "w+b") as later_file:
            later_file.write(b"mine")
            later_file.flush()
            opened_since.set()
            cache._range_pool.shutdown()  # waits for all threads
            assert late and os.fstat(later_file.fileno()).st_size == 4
    assert not list(folder.glob("*.part"))
