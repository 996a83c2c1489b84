"""The cache of remote files: whose folder it is, what it may delete, and what it believes."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nfm.pipeline.config import load_storage
from nfm.pipeline.errors import ConfigError
from nfm.storage_specs.storage import cache as cache_module
from nfm.storage_specs.storage import cache_files
from nfm.storage_specs.storage.cache import Cache, cache_directory
from nfm.storage_specs.storage.cache_files import MARKER_FILE
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import sha256
from tests.tools.cache_server import DATA, DIGEST, Server, fetch, names, wait_for_tick
from tests.tools.stores import tree


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def server() -> Server:
    return Server()


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


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            10**9 + 1,
            r"memory://.*/other: got a file of 1000000001 bytes for a cache of 1000000000; raise storage\.cache_gb",
        ),
        (10**9 - 1, "got 102400 bytes for a range of"),
    ],
)
def test_a_manifest_that_lies_about_a_size_evicts_no_other_file(
    folder: Path, server: Server, size: int, message: str
) -> None:
    """Room is made for bytes that arrive, and never for a file that is larger than the whole cache."""
    cache = Cache(folder, max_bytes=10**9)
    path = cache.fetch(server, "file", len(DATA), DIGEST)
    server.files["other"] = DATA
    with pytest.raises(StoreError, match=message):
        cache.fetch(server, "other", size, "0" * 64)
    assert path.exists() and cache._used_bytes < 2 * len(DATA)


def test_room_is_made_while_ranges_arrive(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file that is what the manifest says takes the place of those used longest ago."""
    monkeypatch.setattr(cache_module, "RANGE_BYTES", 10_000)
    server = Server(other=DATA[::-1])
    limit = len(DATA) + 20_000
    cache = Cache(folder, limit)
    cache.fetch(server, "file", len(DATA), DIGEST)
    assert cache.fetch(server, "other", len(DATA), sha256(DATA[::-1])).read_bytes() == DATA[::-1]
    assert not (folder / DIGEST).exists() and cache._used_bytes <= limit


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
