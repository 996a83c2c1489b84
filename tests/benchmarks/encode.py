"""`make bench-encode`: what the encode job costs beside its teacher. Writes docs/benchmarks/encode.md.

The baseline is the bare forward pass: as many processes and threads as the job has workers, each with its share of the
same noisy images ready in RAM, in the same batches, and nothing else to do.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree
from typing import Any

import fsspec
import numpy as np
import torch

from nfm.models.tarflow import TarFlow, forward_flops
from nfm.pipeline.config import StorageConfig
from nfm.pipeline.encode_job import encode_couplings
from nfm.pipeline.ray_session import ray_session
from nfm.stages.checkpoint import Checkpoint, architecture, save
from nfm.stages.encode import EncodeConfig, UnitEncoder, output_spec
from nfm.storage_specs.format.pixels import to_float
from nfm.storage_specs.format.schema import PixelSpec, Spec
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.files import set_file_system_options
from nfm.storage_specs.writing.units import Unit
from nfm.storage_specs.writing.writer import StoreWriter
from tests.benchmarks import encode_teacher
from tests.benchmarks.encode_teacher import SMALL, random_teacher
from tests.tools.object_store import ObjectStore

WORKERS, IMAGES, BLOCK_ROWS, DRAWS = 2, 512, 32, 6
COMMITS = (10, 1_000, 100_000)
PAGE = Path("docs/benchmarks/encode.md")
CONFIG = EncodeConfig(draws=DRAWS, workers=WORKERS)


def prepare(root: Path) -> tuple[str, str]:
    """A sample store of random images and a teacher of random weights: both cost what real ones cost."""
    samples, teacher = str(root / "samples"), str(root / "teacher" / "model.safetensors")
    rng = np.random.default_rng(0)
    _, config = SMALL
    spec = Spec(
        kind="samples",
        layout="webdataset",
        rows=IMAGES,
        block_rows=BLOCK_ROWS,
        shape=(config.channels, *config.image_sides),
        x=PixelSpec(dtype="uint8"),
        views=["plain"],
        num_classes=config.num_classes,
        class_names=[str(label) for label in range(config.num_classes)],
        names=False,
        preprocessing={},
    )
    writer = StoreWriter(samples, spec)
    writer.initialize()
    if not writer.is_complete():
        for block in range(spec.num_blocks):
            x = rng.integers(0, 256, (BLOCK_ROWS, *spec.shape), dtype=np.uint8)
            writer.write_block(block, {"x": x, "label": rng.integers(0, 10, BLOCK_ROWS)}, None, None)
        writer.finalize()
    flow: TarFlow = random_teacher(config, torch.device("cpu"))
    document = {
        "architecture": architecture(flow),
        "run": {"teacher": {"eta": 0.1}},
        "training": {"images": 0, "val": 0.0},
    }
    save(teacher, Checkpoint({f"model.{name}": value for name, value in flow.state_dict().items()}, document))
    return samples, teacher


def make_encoder(samples: str, teacher: str, out: str) -> UnitEncoder:
    spec, _ = output_spec(CONFIG, Store(samples), teacher, out)
    return UnitEncoder(samples, teacher, out, spec.model_dump(mode="json"))


def bare_worker(root: Path, share: int) -> None:
    """One process of the baseline: prints "ready", waits for a line, runs, and prints how many seconds it took."""
    torch.set_num_threads(1)
    encoder = make_encoder(*prepare(root), str(root / "bare"))
    blocks = range(share, encoder.writer.spec.num_blocks, WORKERS)
    batches = []
    for block in blocks:
        x = to_float(encoder.samples.column("x", block), encoder.samples.spec.x)
        y = torch.from_numpy(encoder.samples.column("label", block))
        batches += [(encoder.add_noise(block, draw, x)[1], y) for draw in range(DRAWS)]
    encoder.forward(*batches[0])
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    for noisy, y in batches:
        encoder.forward(noisy, y)
    print(time.perf_counter() - start, flush=True)


def bare(root: Path) -> float:
    """Seconds of the bare forward passes, of the slowest process."""
    command = [sys.executable, "-m", "tests.benchmarks.encode", "--root", str(root)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    workers = [subprocess.Popen([*command, "--bare", str(share)], **pipes) for share in range(WORKERS)]
    for worker in workers:
        assert worker.stdout and worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin
        worker.stdin.write("go\n")
        worker.stdin.flush()
    times = [float(worker.communicate()[0]) for worker in workers]
    return max(times)


def job(samples: str, teacher: str, out: str, options: dict[str, Any]) -> tuple[float, float]:
    """Seconds of the whole job from its first ready worker to the finished store; and until that worker was ready."""
    summary = encode_couplings(CONFIG, samples, teacher, out, StorageConfig(options={"s3": options}))
    assert summary.pairs_encoded == IMAGES * DRAWS
    return summary.seconds - summary.start_seconds, summary.start_seconds


def end_to_end(root: Path, rounds: int) -> dict[str, Any]:
    """Rounds of: bare, to the local disk, to S3."""
    samples, teacher = prepare(root)
    local = root / "couplings"
    times: dict[str, list[float]] = {"bare": [], "local": [], "S3": [], "start": []}  # seconds by round
    os.environ["OMP_NUM_THREADS"] = "1"
    with ObjectStore(root / "objects") as store, ray_session(print):
        set_file_system_options({"s3": store.options})
        url = f"{store.bucket('bench')}/couplings"
        fs = fsspec.filesystem("s3", **store.options)
        for _ in range(rounds):
            times["bare"].append(bare(root))
            rmtree(local, ignore_errors=True)
            seconds, start = job(samples, teacher, str(local), store.options)
            times["local"].append(seconds)
            times["start"].append(start)
            if fs.exists(url):
                fs.rm(url, recursive=True)
            times["S3"].append(job(samples, teacher, url, store.options)[0])
            print({name: round(values[-1], 2) for name, values in times.items()}, flush=True)
    size = Store(str(local)).dataset.totals.bytes
    name, config = SMALL
    return times | {"pairs": IMAGES * DRAWS, "flops": forward_flops(config), "bytes": size, "teacher": name}


def resume(root: Path, repeats: int) -> list[dict[str, Any]]:
    """What the driver does before it gives out the first unit, with one unit missing among many that are done."""
    samples, teacher = prepare(root)
    spec, _ = output_spec(CONFIG, Store(samples), teacher, str(root / "none"))
    rows = []
    for commits in COMMITS:
        folder = root / f"resume-{commits}"
        larger_spec = spec.model_copy(update={"rows": (commits + 1) * BLOCK_ROWS})
        writer = StoreWriter(str(folder), larger_spec)
        writer.initialize()
        for block in range(commits):
            (folder / Unit(block, 0, DRAWS).commit_file).touch()  # no more than its name is looked at
        times = []
        for _ in range(repeats):
            started_at = time.perf_counter()
            resumed = StoreWriter(str(folder), larger_spec)
            resumed.initialize()
            assert not resumed.is_complete()
            assert resumed.list_missing_units() == [Unit(commits, 0, DRAWS)]
            times.append(time.perf_counter() - started_at)
        rows.append({"commits": commits, "seconds": statistics.median(times), "low": min(times), "high": max(times)})
        rmtree(folder)
    return rows


def faults() -> str:
    """The table of `python -m tests.tools.faults`."""
    done = subprocess.run([sys.executable, "-m", "tests.tools.faults"], stdout=subprocess.PIPE, text=True, check=True)
    return "\n".join(line for line in done.stdout.splitlines() if line.startswith("|"))


def write(results: dict[str, Any]) -> None:
    machine = results["machine"]
    lines = [
        "# Encoding",
        "",
        "```sh",
        "make bench-encode",
        "```",
        "",
        f"On {machine['cores']} cores of {machine['cpu']}, Linux {machine['kernel']}, Python {machine['python']}, "
        + ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
        + ". Parts may be measured at different times (`--parts`); every ratio is within one.",
        "",
    ]
    if "end" in results:
        lines += end_to_end_section(results["end"])
    if "teacher" in results:
        lines += ["## The teacher's forward pass", "", *encode_teacher.table(results["teacher"])]
        if "gpu" not in results["teacher"]:
            lines += [
                "No GPU was available: `make bench-encode ARGS='--parts teacher'` adds its table where one is.",
                "",
            ]
    if "resume" in results:
        lines += [
            "## Resuming",
            "",
            "What the driver does on a local disk before it gives out the first unit: one missing, the others done. "
            "It opens no commit record; what grows is the listing of their names.",
            "",
            "| units done | ms | range |",
            "| ---: | ---: | ---: |",
            *(
                f"| {row['commits']:,} | {1e3 * row['seconds']:.1f} | {1e3 * row['low']:.1f} to "
                f"{1e3 * row['high']:.1f} |"
                for row in results["resume"]
            ),
            "",
        ]
    if "faults" in results:
        lines += [
            "## Faults",
            "",
            "`make soak` (60 by default, `ROUNDS=600` for more): "
            "real processes are killed, disks filled and files damaged "
            "while a store of 23 blocks with 8 draws is encoded, "
            "and then all of its bytes are compared with those of a clean run. "
            "A round is one fault; a unit is lost when it was in flight at a fault, or damaged by it.",
            "",
            results["faults"],
            "",
        ]
    PAGE.write_text("\n".join(lines))


def end_to_end_section(results: dict[str, Any]) -> list[str]:
    rows = []
    for name, title in (("bare", "bare forward"), ("local", "job, local disk"), ("S3", "job, S3 on the same cores")):
        median = statistics.median(results[name])
        ratios = [bare / seconds for bare, seconds in zip(results["bare"], results[name], strict=True)]
        rows.append(
            f"| {title} | {results['pairs'] / median:.2f} | {median:.1f} | {statistics.median(ratios):.3f} | "
            f"{min(ratios):.3f} to {max(ratios):.3f} |"
        )
    return [
        "## The job beside its teacher",
        "",
        f"{results['pairs']:,} pairs of {results['teacher']} ({results['flops'] / 1e9:.1f} GFLOP each), float32, "
        f"on {WORKERS} workers of one thread; {results['bytes'] / 1e6:.0f} MB are written, and read back. "
        "The job's time is from its first ready worker to dataset.json; "
        f"before that it took {statistics.median(results['start']):.1f} s to start its workers. "
        "The bare forward has as many processes and threads, its noisy images in RAM, and nothing else to do. "
        f"Medians of {len(results['bare'])} rounds, in which the three take turns.",
        "",
        "| | pairs/s | s | of the bare forward | range |",
        "| --- | ---: | ---: | ---: | ---: |",
        *rows,
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/bench-encode"), help="where data is kept")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["end", "teacher", "resume", "faults"])
    parser.add_argument("--bare", type=int, help="be one process of the baseline (used by the benchmark itself)")
    args = parser.parse_args()
    if args.bare is not None:
        bare_worker(args.root, args.bare)
        return
    root = args.root.absolute()
    root.mkdir(parents=True, exist_ok=True)
    path = root / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = {
        "cpu": Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t: "),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "ray", "numpy", "s3fs")},
    }
    parts: dict[str, Callable[[], Any]] = {
        "end": lambda: end_to_end(root, args.rounds),
        "teacher": lambda: encode_teacher.measure(quick=False),
        "resume": lambda: resume(root, args.rounds),
        "faults": faults,
    }
    for part in args.parts:
        results[part] = parts[part]()
        path.write_text(json.dumps(results, indent=1))
        write(results)


if __name__ == "__main__":
    main()
