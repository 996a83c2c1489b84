"""The parts of the streaming benchmark beside formats: scaling, object storage, and training."""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch

from nfm.pipeline.config import load_config
from nfm.stages.prepare import prepare
from nfm.stages.train_student import train_student
from nfm.storage_specs.reading.order import choose_epoch_draws
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream
from nfm.storage_specs.storage.files import IO_THREADS, set_file_system_options
from nfm.storage_specs.writing.transfer import copy_store
from nfm.storage_specs.writing.writer import StoreWriter
from tests.benchmarks.stores import CASES, spec_of, write_arrays, write_repeated, write_store
from tests.benchmarks.stream import BATCH, measured
from tests.tools.object_store import ObjectStore

WINDOWS = (1, 2, 4, 8, 16, 32, None)
SIZES = (1, 10, 100)
SMALL_BLOCKS = 8


def _ours(url: str, seconds: float, window: int | None = None) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.stream",
        "--ours",
        url,
        "--seconds",
        str(seconds),
        "--repeats",
        "1",
    ]
    return command if window is None else [*command, "--window", str(window)]


def _cifar(root: Path) -> Path:
    folder = root / CASES[0].name
    write_arrays(CASES[0], folder)
    for layout in ("webdataset", "zarr"):
        write_store(str(folder / f"ours-{layout}"), folder, layout)
    return folder


def scaling(root: Path, rounds: int, seconds: float, core: int) -> dict[str, Any]:
    """Pairs per second against the window, and against the number of blocks; memory over ten epochs."""
    folder = _cifar(root)
    windows: dict[str, list[float]] = {str(window): [] for window in WINDOWS}
    for _ in range(rounds):
        for window in WINDOWS:
            result = measured(_ours(str(folder / "ours-webdataset"), seconds, window), core)
            windows[str(window)] += result["pairs_per_s"]
    source, sizes = Store(str(folder / "ours-zarr")), {}
    for size in SIZES:
        url = str(root / f"repeated-{size}")
        write_repeated(url, source, size * SMALL_BLOCKS)
        blocks = str(size * SMALL_BLOCKS)
        sizes[blocks] = [measured(_ours(url, seconds), core)["pairs_per_s"][0] for _ in range(rounds)]
        print(f"{blocks} blocks: {statistics.median(sizes[blocks]):,.0f} pairs/s", flush=True)
    return {
        "windows": {window: statistics.median(rates) for window, rates in windows.items()},
        "blocks": {blocks: statistics.median(rates) for blocks, rates in sizes.items()},
        "memory": memory(str(folder / "ours-webdataset")),
    }


def memory(url: str) -> list[float]:
    """Anonymous memory of a reader after each of ten epochs, in MB, in a process of its own."""
    script = (
        "import json; from contextlib import closing; from tests.benchmarks.stream import *\n"
        f"with closing(CouplingStream({url!r}, BATCH, 0)) as stream:\n"
        "    megabytes = []\n"
        "    for _ in range(10):\n"
        "        for _ in range(stream.spec.rows // BATCH): next(stream)\n"
        "        megabytes.append(status('RssAnon'))\n"
        "print(json.dumps(megabytes))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    megabytes: list[float] = json.loads(done.stdout)
    return megabytes


def remote(root: Path, rounds: int, seconds: float, core: int) -> dict[str, Any]:
    """An epoch from an S3 server on this machine into an empty cache, against a bare download of the same objects; then
    again with the cache, against the local store. In turn, all cores: the server has its share of them."""
    local = str(_cifar(root) / "ours-webdataset")
    rates: dict[str, list[float]] = {"cold": [], "cold, windows of 8": [], "bare, to disk": [], "bare, thrown away": []}
    with ObjectStore(root / "object-store") as server:
        set_file_system_options({"s3": server.options})
        url = f"{server.bucket('bench')}/couplings"
        copy_store(Store(local), url, lambda _bytes: None, None)
        for _ in range(rounds):
            rates["bare, thrown away"].append(_download(url, None))
            rates["bare, to disk"].append(_download(url, root / "download"))
            for name, window in (("cold", None), ("cold, windows of 8", 8)):
                rates[name].append(_cold_epoch(root / "cache", url, window))
            print({name: round(values[-1] / 2**20) for name, values in rates.items()}, flush=True)
        warm: dict[str, list[float]] = {"warm cache": [], "local": []}
        os.environ["NFM_CACHE"] = str(root / "cache")
        for _ in range(rounds):
            for name, source_url in (("warm cache", url), ("local", local)):
                warm[name].append(_steady(source_url, seconds))
    return {name: statistics.median(values) for name, values in (rates | warm).items()} | {
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    }


def _first_epoch(store: Store) -> dict[str, int]:
    """The files that the first epoch of seed 0 reads, with their bytes."""
    draws = choose_epoch_draws(store.spec.num_blocks, store.spec.num_draws, 0, 0)
    files = store.files.items()
    return {record.path: record.bytes for key, record in files if key.draw in (-1, draws[key.block])}


def _download(url: str, folder: Path | None) -> float:
    """Bytes per second of the objects that a first epoch needs, IO_THREADS at a time, into files or thrown away."""
    paths = _first_epoch(Store(url))
    fs = fsspec.filesystem("s3")
    shutil.rmtree(folder or "/nonexistent", ignore_errors=True)

    def get(path: str) -> int:
        data: bytes = fs.cat_file(f"{url}/{path}")
        if folder is not None:
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                file.write(data)
                os.fdatasync(file.fileno())
        return len(data)

    start = time.perf_counter()
    with ThreadPoolExecutor(IO_THREADS) as pool:
        total = sum(pool.map(get, paths))
    return total / (time.perf_counter() - start)


def _cold_epoch(cache: Path, url: str, window: int | None) -> float:
    """Bytes per second that a stream brings into an empty cache: to the last batch of the first epoch; or, where the
    whole store is shuffled and so must be there first, to the first batch."""
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["NFM_CACHE"] = str(cache)
    os.environ["NFM_CACHE_GB"] = "0.7" if window else "200"  # of windows: room for two, and nothing of the next epoch
    start = time.perf_counter()
    with closing(CouplingStream(url, BATCH, seed=0, window_blocks=window)) as stream:
        store = stream.stores[0]
        for _ in range(store.spec.rows // BATCH if window else 1):
            next(stream)
        seconds = time.perf_counter() - start
    del os.environ["NFM_CACHE_GB"]
    return sum(_first_epoch(store).values()) / seconds


def _steady(url: str, seconds: float) -> float:
    """Pairs per second once every file is open."""
    with closing(CouplingStream(url, BATCH, seed=0)) as stream:
        for _ in range(stream.spec.rows * stream.spec.num_draws // BATCH):
            next(stream)
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            next(stream)
            count += BATCH
        return count / (time.perf_counter() - start)


def training(root: Path, rounds: int, seconds: float, core: int) -> dict[str, Any]:
    """The share of the time in which a student waits for data: on digits, and on CIFAR-10 shapes."""
    torch.set_num_threads(1)  # as the demo does: on two busy cores, more wait for each other
    folder = _cifar(root)
    results: dict[str, Any] = {}
    config = load_config("digits", ["student.train.images=19200"])
    digits = root / "digits"
    prepare(config.data, str(digits / "samples"))
    write_store_of_samples(str(digits / "samples" / "train"), str(digits / "couplings"))
    jobs = {
        "digits": (config.student, str(digits / "couplings")),
        CASES[0].name: (
            load_config("cifar10", ["student.size=SiT-4x128h4/4", "student.train.images=6400"]).student,
            str(folder / "ours-webdataset"),
        ),
    }
    for name, (student, couplings) in jobs.items():
        waits = []
        for _ in range(min(rounds, 3)):  # a minute each
            shutil.rmtree(root / "student", ignore_errors=True)
            waits.append(train_student(student, couplings, str(root / "student"))["training"])
        results[name] = {
            "data_wait": statistics.median(wait["data_wait"] for wait in waits),
            "first_batch_seconds": statistics.median(wait["first_batch_seconds"] for wait in waits),
            "seconds": statistics.median(wait["seconds_since_resume"] for wait in waits),
            "images": waits[0]["images"],
        }
        print(name, results[name], flush=True)
    return results


def write_store_of_samples(samples: str, out: str) -> None:
    """Couplings of a sample store with random z: what training reads, without a teacher."""
    source = Store(samples)
    spec = spec_of("webdataset", source.spec.rows, source.spec.shape, 4).model_copy(
        update={"block_rows": source.spec.block_rows}
    )
    writer, rng = StoreWriter(out, spec), np.random.default_rng(0)
    writer.initialize()
    for block in sorted({unit.block for unit in writer.list_missing_units()}):
        base = {name: source.column(name, block) for name in ("x", "label")}
        z = rng.standard_normal((spec.num_draws, spec.rows_of(block), *spec.shape), dtype=np.float32)
        writer.write_block(block, base, z, None)
    writer.finalize()
