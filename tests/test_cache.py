"""The cache of remote files: whose folder it is, what it may delete, what it believes, and what becomes of faults."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from nfm.pipeline.config import load_storage
from nfm.pipeline.errors import ConfigError
from nfm.storage_specs.storage import cache_files
from nfm.storage_specs.storage.cache import RANGE_BYTES, Cache, cache_directory
from nfm.storage_specs.storage.cache_files import MARKER_FILE
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import Root, sha256
from tests.tools.stores import tree
from tests.tools.waiting import PATIENCE, wait_for

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def server() -> Server:
    return Server()


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


def test_a_new_folder_is_private_and_marked(folder: Path, server: Server) -> None:
    old_umask = os.umask(0)
    try:
        path = fetch(folder, server)
    finally:
        os.umask(old_umask)
    assert path.read_bytes() == DATA and path.parent == folder
    assert names(folder) == {MARKER_FILE, DIGEST, f"{DIGEST}.record"}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o077 == 0 for file in folder.iterdir())


def test_an_empty_folder_is_taken_and_made_private(folder: Path, server: Server) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    fetch(folder, server)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_named_by_a_link_is_the_choice_of_the_user(tmp_path: Path, folder: Path, server: Server) -> None:
    (tmp_path / "disk").mkdir()
    folder.symlink_to(tmp_path / "disk")
    assert fetch(folder, server).parent == tmp_path / "disk"


def make_sources(folder: Path) -> None:
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "main.c").write_text("int main() {}")


def make_old_cache(folder: Path) -> None:
    (folder / DIGEST[:2]).mkdir(parents=True)
    (folder / DIGEST[:2] / DIGEST).write_bytes(DATA)


def make_unmarked(folder: Path) -> None:
    folder.mkdir()
    (folder / DIGEST).write_bytes(b"?" * len(DATA))


def make_marked_by_a_link(folder: Path) -> None:
    folder.mkdir()
    (folder / MARKER_FILE).symlink_to("/etc/hostname")


def make_writable(folder: Path) -> None:
    fetch(folder, Server())
    folder.chmod(0o770)


def make_foreign(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / MARKER_FILE).touch()
    os.chown(folder, 12345, -1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_sources, r"holds other files \(src\), expected a new or an empty one"),
        (make_old_cache, "holds other files"),
        (make_unmarked, "holds other files"),
        (make_marked_by_a_link, "holds other files"),
        (make_writable, "other users may write to it"),
        pytest.param(
            make_foreign,
            "a folder of the user with id 12345, expected your own",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away"),
        ),
        (lambda folder: folder.write_text("file"), "File exists"),
        (lambda folder: folder.symlink_to(folder), "File exists"),  # a link to itself
    ],
)
def test_a_folder_that_is_none_of_the_cache_is_refused_and_stays(
    folder: Path, server: Server, make: Callable[[Path], None], message: str
) -> None:
    make(folder)
    before = tree(str(folder.parent))
    with pytest.raises(StoreError, match=rf"^cache .*{message}.*set NFM_CACHE or storage\.cache") as error:
        fetch(folder, server, max_bytes=1)
    assert "\n" not in str(error.value)
    assert tree(str(folder.parent)) == before and not server.reads


def test_eviction_deletes_nothing_but_entries(folder: Path, server: Server) -> None:
    """Whatever else lies in the folder, a stray file breaks nothing."""
    fetch(folder, server)
    strays = ["notes.txt", "a" * 63, "A" * 64, f"{'a' * 64}.txt", f"{'a' * 64}.part.part", "ab", "\N{SNOWMAN}"]
    for name in strays:
        (folder / name).write_bytes(bytes(1000))
    for name in ("b" * 64, f"{'c' * 64}.part", f"{'d' * 64}.record", "ab.d"):
        (folder / name).mkdir()
    (folder / ("e" * 64)).symlink_to(folder / "notes.txt")
    os.mkfifo(folder / f"{'f' * 64}.record")
    make_sources(folder / "tree")
    others = names(folder) - {DIGEST, f"{DIGEST}.record"}
    data = DATA[::-1]
    server.files["other"] = data
    fetch(folder, server, data, max_bytes=len(DATA) + 20_000, path="other")
    assert names(folder) == others | {sha256(data), f"{sha256(data)}.record"}
    assert (folder / "tree" / "src" / "main.c").exists()


@pytest.mark.parametrize("suffix", ["", ".part"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_what_a_link_leads_to_is_never_written(
    tmp_path: Path, folder: Path, server: Server, suffix: str, link: Callable[[Path, Path], None]
) -> None:
    victim = tmp_path / "key"
    victim.write_bytes(b"a private key")
    Cache(folder).directory  # noqa: B018  (makes the folder)
    link(victim, folder / f"{DIGEST}{suffix}")
    assert fetch(folder, server).read_bytes() == DATA
    assert victim.read_bytes() == b"a private key"
    assert not (folder / DIGEST).is_symlink()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("/etc/hostname"), "Too many levels of symbolic links"),
        (lambda path: path.mkdir(), "directory"),
        (os.mkfifo, "no regular file"),
        (lambda path: path.hardlink_to(path.parent / MARKER_FILE), "a second name of another file"),
    ],
)
def test_a_record_that_is_no_file_is_named(
    folder: Path, server: Server, make: Callable[[Path], None], message: str
) -> None:
    Cache(folder).directory  # noqa: B018
    make(folder / f"{DIGEST}.record")
    with pytest.raises(StoreError, match=rf"{DIGEST}\.record .*{message}.*; delete it"):
        fetch(folder, server)


def change_bytes(path: Path) -> None:
    """In place, with the times set back: only the change time tells."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.write(b"?")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def change_bytes_and_record(path: Path) -> None:
    change_bytes(path)
    path.with_suffix(".record").write_bytes(b"\xff" * 300)


def replace(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"?" * len(DATA))


@pytest.mark.parametrize(
    "damage",
    [
        change_bytes,
        replace,
        lambda path: os.truncate(path, 5),
        Path.unlink,
        change_bytes_and_record,
    ],
)
def test_a_damaged_file_is_brought_again(folder: Path, server: Server, damage: Callable[[Path], None]) -> None:
    cache = Cache(folder)
    path = cache.fetch(server, "file", len(DATA), DIGEST)
    wait_for_tick(path)
    damage(path)
    assert cache.fetch(server, "file", len(DATA), DIGEST).read_bytes() == DATA
    assert server.reads == ["file"] * 2


@pytest.mark.parametrize(
    "touch",
    [
        lambda path: path.touch(),
        lambda path: path.with_suffix(".record").unlink(),
        lambda path: path.with_suffix(".record").write_bytes(b""),
    ],
)
def test_a_file_is_hashed_once_for_all_and_again_when_its_state_changed(
    folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch, touch: Callable[[Path], None]
) -> None:
    hashed: list[int] = []
    hash_file = cache_files._hash_file

    def count(descriptor: int) -> str:
        hashed.append(descriptor)
        return hash_file(descriptor)

    monkeypatch.setattr(cache_files, "_hash_file", count)
    path = fetch(folder, server)
    for _ in range(3):
        fetch(folder, server)
    assert not hashed, "it was hashed when it arrived"
    wait_for_tick(path)
    touch(path)
    for _ in range(3):
        assert fetch(folder, server) == path
    assert len(hashed) == 1 and server.reads == ["file"]


def test_a_manifest_that_lies_about_a_size_harms_no_cached_file(folder: Path, server: Server) -> None:
    path = fetch(folder, server)
    with pytest.raises(StoreError, match="got 102400 bytes .* expected 102399 bytes"):
        Cache(folder).fetch(server, "file", len(DATA) - 1, DIGEST)
    assert fetch(folder, server) == path and server.reads == ["file"] * 2
    for digest in ("../../key", DIGEST + "\n", DIGEST.upper(), ""):
        with pytest.raises(StoreError, match="expected 64 hexadecimal digits"):
            Cache(folder).fetch(server, "file", len(DATA), digest)


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


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-1", "0", "1e300", "many", "1,5"])
def test_a_limit_that_is_none_is_one_line(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NFM_CACHE_GB", text)
    with pytest.raises(StoreError, match="^got NFM_CACHE_GB='.*'; expected a finite number of GB above 0, such as 50$"):
        Cache()


@pytest.mark.parametrize("override", ["cache_gb=nan", "cache_gb=inf", "cache_gb=0", 'cache=""'])
def test_a_config_without_sense_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=rf"storage\.{override.split('=')[0]}"):
        load_storage([f"storage.{override}"])


def test_the_default_is_in_the_home_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NFM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    for caches, expected in (("", ".cache"), ("relative", ".cache"), (f"{tmp_path}/xdg", "xdg")):
        monkeypatch.setenv("XDG_CACHE_HOME", caches)
        assert cache_directory() == tmp_path / expected / "nfm" / "files"
    monkeypatch.setenv("NFM_CACHE", "~/mine")
    assert cache_directory() == tmp_path / "mine"
    monkeypatch.setenv("NFM_CACHE", "s3://bucket/cache")
    with pytest.raises(StoreError, match="expected a folder on a local disk"):
        cache_directory()


def test_a_relative_folder_in_the_config_is_the_same_for_processes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NFM_CACHE", "")
    monkeypatch.chdir(tmp_path)
    load_storage(["storage.cache=mine"]).apply()
    assert cache_directory() == tmp_path / "mine"
