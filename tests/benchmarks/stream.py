"""How fast stores stream, beside other formats, RAM and plain reads, in one run: `make bench-stream`.

Rows of one table are measured in turn, round after round, each in a process of its own on one core that measures
several times; the table has the median of all. Every reader gives the same product: batches of 256 shuffled pairs, as
stored (x uint8, z float16) or as training takes them (x in [-1, 1] and z / σ_f, float32). Peers run in an environment
of their own (peers.py).

    python -m tests.benchmarks.stream --root runs/bench-stream --rounds 1 --repeats 5
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.reading.stream import CouplingStream
from tests.benchmarks.stores import CASES, Case, write_arrays, write_store

BENCHMARKS_FOLDER = Path(__file__).parent
BATCH = 256
OURS: dict[str, LayoutName] = {"ours, webdataset layout": "webdataset", "ours, zarr layout": "zarr"}
PEERS = {
    "webdataset": "webdataset, .npy members",
    "webdataset-raw": "webdataset, raw members",
    "mds": "MosaicML Streaming",
    "mds-raw": "MosaicML Streaming, bytes",
    "litdata": "LitData",
    "litdata-raw": "LitData, bytes",
    "datasets": "HF datasets",
    "datasets-tuned": "HF datasets, hand-tuned",
    "zarr": "zarr-python, random rows",
    "zarr-chunks": "zarr-python, runs of chunks",
    "parquet": "Parquet, hand-tuned",
    "arrow-ipc": "Arrow IPC, mapped, hand-tuned",
    "ram-torch": "RAM, torch indexing",
    "ram-numpy": "RAM, NumPy indexing",
    "ram-preallocated": "RAM, into preallocated outputs",
    "read": "read() of as many bytes, in order",
}
LIBRARIES = ("webdataset", "webdataset-raw", "mds", "litdata", "datasets")  # as their documentation uses them


def status(field: str) -> float:
    """A field of this process's memory, in MB."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) / 1024


def read_ours(url: str, product: str, seconds: float, repeats: int, window: int | None) -> dict[str, Any]:
    """Pairs per second: over the first K epochs, in which every file is opened and checked once, and after them
    `repeats` times."""
    torch.set_num_threads(1)
    opened = time.perf_counter()
    with closing(CouplingStream(url, BATCH, seed=0, window_blocks=window, stored=product == "stored")) as stream:
        next(stream)
        first = time.perf_counter() - opened
        spec = stream.spec
        passes = spec.rows * spec.num_draws // BATCH
        start = time.perf_counter()
        for _ in range(passes):
            next(stream)
        fresh = passes * BATCH / (time.perf_counter() - start)
        rates = []
        for _ in range(repeats):
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < seconds:
                next(stream)
                count += BATCH
            rates.append(count / (time.perf_counter() - start))
        size = stream.stores[0].dataset.totals.bytes
    return {
        "pairs_per_s": rates,
        "first_passes": fresh,
        "first_batch_s": first,
        "peak_rss_mb": status("VmHWM"),
        "anonymous_mb": status("RssAnon"),
        "bytes_on_disk": size,
    }


def python_of_peers() -> Path:
    """The interpreter of the peers' environment, which is made on first use."""
    folder = Path(".venv-peers")
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        uv = [sys.executable, "-m", "uv"]
        pip = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
        links = subprocess.run(pip, capture_output=True, text=True, check=False).stdout.strip()
        install = [*uv, "pip", "install", "--quiet", "--python", str(python)]
        subprocess.run([*uv, "venv", "--quiet", "--clear", str(folder)], check=True)
        torch_build = [*(["--find-links", links] if links else []), "torch==2.13.0"]
        subprocess.run([*install, *torch_build], check=True)
        subprocess.run([*install, "--no-deps", "-r", str(BENCHMARKS_FOLDER / "requirements-peers.txt")], check=True)
        ready.touch()
    return python


def measured(command: list[str], core: int) -> dict[str, Any]:
    """The JSON that a command prints last, run on one core."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pinned = ["taskset", "-c", str(core), *command]
    done = subprocess.run(pinned, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def run_case(case: Case, root: Path, rounds: int, repeats: int, seconds: float, core: int) -> dict[str, Any]:
    """Every row in turn, `rounds` times, with `repeats` measurements each: {product: {name: medians}}."""
    folder = root / case.name
    write_arrays(case, folder)
    timing = ["--seconds", str(seconds), "--repeats", str(repeats)]
    commands: dict[tuple[str, str], list[str]] = {}
    peers = [str(python_of_peers()), str(BENCHMARKS_FOLDER / "peers.py")]
    for product in ("float32", "stored"):
        for name, layout in OURS.items():
            url = str(folder / f"ours-{layout}")
            write_store(url, folder, layout)
            ours = [sys.executable, "-m", "tests.benchmarks.stream", "--ours", url]
            commands[product, name] = [*ours, "--product", product, *timing]
        for peer, name in PEERS.items():
            if peer == "read" and product == "float32":
                continue
            peer_arguments = ["--root", str(folder), "--peer", peer]
            subprocess.run([*peers, "write", *peer_arguments], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            read = [*peers, "read", *peer_arguments]
            commands[product, name] = [*read, "--product", product, "--epochs", "1000", *timing]
    results: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in commands}
    for number in range(rounds):
        for (product, name), command in commands.items():
            results[product, name].append(measured(command, core))
            rate = statistics.median(results[product, name][-1]["pairs_per_s"])
            print(f"{case.name} {number + 1}/{rounds} {product:8} {name:34} {rate:10,.0f} pairs/s", flush=True)
    table: dict[str, Any] = {"float32": {}, "stored": {}}
    for (product, name), measurements in results.items():
        numbers = [key for key, value in measurements[0].items() if isinstance(value, int | float)]
        table[product][name] = {key: statistics.median(entry[key] for entry in measurements) for key in numbers}
        rates = [rate for entry in measurements for rate in entry["pairs_per_s"]]
        table[product][name] |= {"pairs_per_s": statistics.median(rates), "low": min(rates), "high": max(rates)}
        if "versions" in measurements[0]:
            table[product][name]["versions"] = measurements[0]["versions"]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/bench-stream"), help="where data is kept (30 GB)")
    parser.add_argument("--rounds", type=int, default=1, help="in which the rows take turns")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of a row in a round")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--parts", nargs="+", default=["formats", "scaling", "remote", "training"])
    parser.add_argument("--ours", metavar="URL", help="measure one store and print JSON (used by the benchmark itself)")
    parser.add_argument("--product", choices=["float32", "stored"], default="float32")
    parser.add_argument("--window", type=int)
    args = parser.parse_args()
    if args.ours:
        print(json.dumps(read_ours(args.ours, args.product, args.seconds, args.repeats, args.window)))
        return
    from tests.benchmarks import stream_extra, stream_report

    args.root.mkdir(parents=True, exist_ok=True)
    path = args.root / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = {
        "cpu": Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t: "),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "versions": {name: version(name) for name in ("numpy", "torch", "zarr", "pyarrow", "s3fs")},
        "rounds": args.rounds,
        "repeats": args.repeats,
    }
    for part in args.parts:
        if part == "formats":
            results[part] = {
                case.name: run_case(case, args.root, args.rounds, args.repeats, args.seconds, args.core)
                for case in CASES
            }
        else:
            results[part] = getattr(stream_extra, part)(args.root, 5, args.seconds, args.core)
        path.write_text(json.dumps(results, indent=1))
    stream_report.write(results)


if __name__ == "__main__":
    main()
