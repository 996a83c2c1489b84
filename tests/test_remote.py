"""Stores on remote storage: a real S3 server that is killed, a plain web server, and the cache between them and us."""

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from nfm.pipeline.cli import main
from nfm.pipeline.config import load_storage
from nfm.pipeline.errors import ConfigError
from nfm.stages.checkpoint import load
from nfm.storage_specs.format.layouts import LAYOUTS
from nfm.storage_specs.format.manifest import FileKey
from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.reading.batches import Batch
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream
from nfm.storage_specs.reading.verify import find_faults
from nfm.storage_specs.storage import files
from nfm.storage_specs.storage.cache import RANGE_BYTES, Cache
from nfm.storage_specs.storage.cache_files import MARKER_FILE
from nfm.storage_specs.storage.errors import OutageError, StoreError
from nfm.storage_specs.storage.files import Root, set_file_system_options, sha256
from nfm.storage_specs.writing.transfer import copy_store
from nfm.storage_specs.writing.units import Unit
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.object_store import ObjectStore
from tests.tools.small_run import Run
from tests.tools.stores import content, ignore_progress, tree, without_times
from tests.tools.waiting import PATIENCE


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("NFM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def s3(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The running S3 server, with its endpoint in the configuration as a run has it."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {})
    set_file_system_options({"s3": object_store.options | {"config_kwargs": {"retries": {"max_attempts": 0}}}})
    monkeypatch.setattr(files, "RETRY_SECONDS", PATIENCE)  # a server that is slow is not away
    return object_store


@pytest.fixture
def failure(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once any remote operation has failed and is about to be tried again."""
    failure = threading.Event()

    class Pause(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            failure.set()
            return super().wait(timeout)

    monkeypatch.setattr(files, "Event", Pause)  # on which every Root waits between its attempts
    return failure


@contextmanager
def outage(server: ObjectStore, begin: threading.Event, failure: threading.Event) -> Iterator[threading.Event]:
    """Beside the block, the server is killed once `begin` is set, and started again once a client has met its absence.
    Gives an event that is set when it has been killed."""
    killed = threading.Event()

    def kill_and_start() -> None:
        assert begin.wait(PATIENCE)
        server.kill()
        killed.set()
        try:
            assert failure.wait(PATIENCE), "nobody met the outage"
        finally:
            server.start()

    with ThreadPoolExecutor(1) as executor:
        done = executor.submit(kill_and_start)
        yield killed
        done.result()


def cached(cache: Path) -> list[Path]:
    """The complete files in the cache."""
    return list(cache.glob("?" * 64))


def batches(stream: CouplingStream, count: int) -> list[Batch]:
    result = [next(stream) for _ in range(count)]
    stream.close()
    return result


def same(actual: list[Batch], expected: list[Batch]) -> bool:
    return all(
        torch.equal(a, b)
        for actual_batch, expected_batch in zip(actual, expected, strict=True)
        for a, b in zip(vars(actual_batch).values(), vars(expected_batch).values(), strict=True)
    )


@pytest.mark.parametrize("layout", ["webdataset", pytest.param("zarr", marks=pytest.mark.long)])
def test_a_store_on_s3_streams_what_the_local_one_does(
    s3: ObjectStore, run: Run, cache: Path, layout: LayoutName
) -> None:
    url = f"{s3.bucket(f'same-{layout}')}/couplings"
    local = Store(run.couplings[layout])
    copy_store(local, url, ignore_progress, None)
    assert Root(url).list_file_sizes() == {name: len(data) for name, data in tree(local.url).items()}
    assert list(find_faults(Store(url))) == [] and not cached(cache), "verify reads the store, not the cache"
    for window in (None, 2):
        expected = batches(CouplingStream(local.url, 40, seed=3, window_blocks=window), 90)
        assert same(batches(CouplingStream(url, 40, seed=3, window_blocks=window), 90), expected)
    assert all(sha256(path.read_bytes()) == path.name for path in cached(cache))


@pytest.mark.long
def test_a_window_needs_only_a_small_cache(
    s3: ObjectStore, run: Run, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = Store(run.couplings["webdataset"])
    url = f"{s3.bucket('small')}/couplings"
    copy_store(local, url, ignore_progress, None)
    window = sum(LAYOUTS["webdataset"].file_size(local.spec, kind, local.spec.block_rows) for kind in ("x", "z"))
    monkeypatch.setenv("NFM_CACHE_GB", str(2.2 * window / 1e9))
    expected = batches(CouplingStream(local.url, 40, seed=3, window_blocks=1), 30)
    assert same(batches(CouplingStream(url, 40, seed=3, window_blocks=1), 30), expected)
    cached_bytes = 0
    for path in cached(cache):
        with suppress(FileNotFoundError):  # a download that was under way still makes room for itself
            cached_bytes += path.stat().st_size
    assert cached_bytes <= 2.2 * window
    with pytest.raises(StoreError, match="raise storage.cache_gb, or set a smaller window_blocks"):
        CouplingStream(url, 40, seed=3, window_blocks=4)


def test_reading_goes_on_when_the_server_was_killed(
    s3: ObjectStore, run: Run, cache: Path, failure: threading.Event
) -> None:
    local = Store(run.couplings["webdataset"])
    url = f"{s3.bucket('killed-reading')}/couplings"
    copy_store(local, url, ignore_progress, None)
    expected = batches(CouplingStream(local.url, 16, seed=1, window_blocks=1), 60)
    stream = CouplingStream(url, 16, seed=1, window_blocks=1)
    actual = [next(stream) for _ in range(5)]
    begin = threading.Event()
    with outage(s3, begin, failure) as killed:
        begin.set()
        assert killed.wait(PATIENCE)
        actual += [next(stream) for _ in range(55)]
    stream.close()
    assert same(actual, expected)


@pytest.mark.long
def test_writing_goes_on_when_the_server_was_killed(
    s3: ObjectStore, run: Run, cache: Path, failure: threading.Event
) -> None:
    """It is killed while the second block is written, and at the latest before the last one."""
    local = Store(run.couplings["webdataset"])
    url = f"{s3.bucket('killed-writing')}/couplings"
    writer = StoreWriter(url, local.spec)
    writer.initialize()

    def write(block: int) -> None:
        writing = writer.unit_writer(Unit(block, 0, local.spec.num_draws), local.column("label", block))
        writing.write_base({"x": local.column("x", block)}, local.image_names_of(block))
        for k in range(local.spec.num_draws):
            error = local.files[FileKey("z", block, k)].squared_error
            assert error is not None
            z, noise = (np.ascontiguousarray(local.column(name, block, k)) for name in ("z", "noise"))
            writing.write_stored_draw(k, z, noise, error)
        writing.commit()

    begin = threading.Event()
    with outage(s3, begin, failure) as killed:
        for block in range(local.spec.num_blocks):
            if block == 1:
                begin.set()
            if block == local.spec.num_blocks - 1:
                assert killed.wait(PATIENCE)
            write(block)
    assert not writer.list_missing_units()
    writer.finalize()
    assert Store(url).dataset.id == local.dataset.id
    assert list(find_faults(Store(url))) == []
    root = Root(url)
    written = without_times({name: root.read(name, 1 << 30) for name in root.list_file_sizes()})
    assert written == content(local.url), "the bytes of the local store"


def test_a_server_that_stays_away_ends_in_one_clear_error(
    s3: ObjectStore, run: Run, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3.bucket('away')}/couplings"
    copy_store(Store(run.couplings["zarr"]), url, ignore_progress, None)
    store = Store(url)
    _ = store.files
    monkeypatch.setattr(files, "RETRY_SECONDS", 1.0)
    s3.kill()
    try:
        with pytest.raises(StoreError, match=r"tried for \d+\.\d s\. The same command continues"):
            store.columns(FileKey("z", 0, 0))
    finally:
        s3.start()
    assert np.array_equal(store.column("z", 0, 0), Store(run.couplings["zarr"]).column("z", 0, 0))


def test_an_outage_says_how_long_the_request_was_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where `stop_retrying` ended the attempts."""
    root = Root("memory://outage")

    def fail(path: str) -> int:
        raise TimeoutError("no answer")

    monkeypatch.setattr(root.fs, "size", fail)
    for stopped, times, message in ((True, [100.0, 112.5], "12.5 s"), (False, [100.0, 399.95], "299.9 s|300.0 s")):
        monkeypatch.setattr(files, "time", SimpleNamespace(monotonic=iter(times).__next__))
        root.stop_retrying = threading.Event()
        if stopped:
            root.stop_retrying.set()
        with pytest.raises(OutageError, match=f"file: no answer; tried for ({message}). The same command continues"):
            root.size("file")


def test_s3_without_credentials_is_one_clear_error(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": s3.endpoint})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreError, match="expected credentials"):
        Store("s3://nobody/couplings")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda fs, path: fs.rm(path), "is missing"),
        (lambda fs, path: fs.pipe_file(path, fs.cat_file(path)[:-1]), "got .* bytes with sha256"),
        (lambda fs, path: fs.pipe_file(path, b"?" + fs.cat_file(path)[1:]), "sha256"),
    ],
    ids=["missing", "truncated", "another byte"],
)
def test_training_stops_at_a_bad_file_and_names_it(
    s3: ObjectStore,
    run: Run,
    cache: Path,
    damage: Callable[[Any, str], None],
    message: str,
    request: pytest.FixtureRequest,
) -> None:
    url = f"{s3.bucket('bad-' + request.node.callspec.id.replace(' ', '-'))}/couplings"
    copy_store(Store(run.couplings["webdataset"]), url, ignore_progress, None)
    damage(fsspec.filesystem("s3"), f"{url}/z/k001/000002.tar")
    stream = CouplingStream(url, 40, seed=0)
    with pytest.raises(StoreError, match=rf"z/k001/000002\.tar.*{message}"):
        deque(stream, maxlen=0)  # until it stops
    with pytest.raises(StoreError, match=r"z/k001/000002\.tar"):
        next(stream)  # and not the batch after it
    stream.close()
    assert not [path for path in cached(cache) if sha256(path.read_bytes()) != path.name]


@pytest.fixture
def web(run: Run) -> Iterator[str]:
    """A plain web server, which does not support range requests."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=run.couplings["webdataset"]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_store_on_a_plain_web_server_streams(run: Run, cache: Path, web: str) -> None:
    expected = batches(CouplingStream(run.couplings["webdataset"], 40, seed=3), 20)
    assert same(batches(CouplingStream(web, 40, seed=3), 20), expected)


def test_a_version_of_a_store_at_the_root_of_a_server_is_no_other_host(web: str) -> None:
    store = Store(web)
    assert store.version_url == f"{web}@v1"
    assert Store(store.version_url).dataset == store.dataset


@pytest.mark.parametrize("size", [1, RANGE_BYTES, RANGE_BYTES + 1, 3 * RANGE_BYTES + 17])
def test_files_of_many_parts_arrive_whole(s3: ObjectStore, cache: Path, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    root = Root(f"{s3.bucket('parts')}/folder")
    root.write("file", data)
    path = Cache().fetch(root, "file", size, sha256(data))
    assert path.read_bytes() == data
    assert {path, path.with_suffix(".record"), cache / MARKER_FILE} == set(cache.iterdir()), "no part is left"


@pytest.mark.long
def test_processes_share_a_cache(s3: ObjectStore, run: Run, cache: Path) -> None:
    url = f"{s3.bucket('shared')}/couplings"
    copy_store(Store(run.couplings["zarr"]), url, ignore_progress, None)
    script = (
        "import json, sys; from nfm.storage_specs.storage.files import set_file_system_options\n"
        "from nfm.storage_specs.reading.stream import CouplingStream\n"
        "set_file_system_options({'s3': json.loads(sys.argv[2])}); s = CouplingStream(sys.argv[1], 32, 0)\n"
        "print(sum(float(next(s).z.double().sum()) for _ in range(60))); s.close()"
    )
    command = [sys.executable, "-c", script, url, json.dumps(s3.options)]
    environment = {**os.environ, "NFM_CACHE": str(cache)}
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    sums = {reader.communicate(timeout=PATIENCE)[0] for reader in readers}
    assert len(sums) == 1 and float(sums.pop())
    assert all(sha256(path.read_bytes()) == path.name for path in cached(cache))


def test_the_commands_take_storage_options_and_train_from_s3(
    object_store: ObjectStore, run: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store is copied to S3 and a student trained from there, with nothing but options: the same student, bit for
    bit.
    """
    monkeypatch.setitem(fsspec.config.conf, "s3", {})
    url = f"{object_store.bucket('commands')}/couplings"
    storage = [f"storage.options.s3.{name}={value}" for name, value in object_store.options.items()]
    small = [f"student.{name}" for name in ("size=SiT-1x16h2/2", "train.images=320", "train.checkpoint_images=320")]

    def nfm(*arguments: str, overrides: list[str]) -> None:
        options = [part for override in overrides for part in ("--set", override)]
        monkeypatch.setattr("sys.argv", ["nfm", *arguments, *options])
        main()

    nfm("store", "copy", run.couplings["zarr"], url, overrides=storage)
    nfm("store", "verify", url, overrides=storage)
    for name, couplings in (("local", run.couplings["zarr"]), ("remote", url)):
        nfm("train-student", "--couplings", couplings, "--out", f"{tmp_path}/{name}", overrides=[*storage, *small])
    models = [load(f"{tmp_path}/{name}/model.safetensors").group("model") for name in ("local", "remote")]
    assert models[0] and all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_storage_options_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    with pytest.raises(ConfigError, match="expected storage.key=value"):
        load_storage(["student.size=3"])
    with pytest.raises(ConfigError, match="storage.cache_gb"):
        load_storage(["storage.cache_gb=-1"])
    with pytest.raises(StoreError, match="cannot open"):
        Root("nosuch://bucket/store")


@pytest.mark.long
def test_closing_does_not_wait_for_a_server_that_is_away(
    s3: ObjectStore, run: Run, cache: Path, failure: threading.Event
) -> None:
    """Which would be tried for as long as PATIENCE."""
    url = f"{s3.bucket('closing')}/couplings"
    copy_store(Store(run.couplings["webdataset"]), url, ignore_progress, None)
    stream = CouplingStream(url, 16, seed=1, window_blocks=1)
    next(stream)

    def read_on() -> None:
        with suppress(StoreError, ValueError, CancelledError, RuntimeError):  # closed, perhaps in the middle of a batch
            deque(stream, maxlen=0)

    s3.kill()
    try:
        threading.Thread(target=read_on, daemon=True).start()
        assert failure.wait(PATIENCE)
        closing = threading.Thread(target=stream.close, daemon=True)
        closing.start()
        closing.join(PATIENCE / 2)
        assert not closing.is_alive()
    finally:
        s3.start()
