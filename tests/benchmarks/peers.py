"""Other ways to keep (x, z, label) pairs and to read them as shuffled training batches, on one core.

    python peers.py write --root DIR --peer NAME    # that peer's own format, in DIR/NAME
    python peers.py read --root DIR --peer NAME     # its speed, as one line of JSON

DIR holds x.npy (uint8: N, C, H, W), z.npy (float16: K, N, C, H, W), label.npy (int64: N) and sigma_f.npy (float32:
C, H, W). A sample is one pair, an image with one of its K draws; an epoch is all N·K pairs. Each reader yields batches
of raw arrays, as stored, and `to_batch` ends all of them with the same float32 product where that is asked for, so only
the reading differs. The files are read once before the clock starts: what is timed comes from the page cache.

Runs in an environment of its own (requirements-peers.txt) and imports nothing of this project.
"""

import argparse
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "LITDATA_DISABLE_VERSION_CHECK": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import torch
from peers_formats import PEERS, Case, library

warnings.filterwarnings("ignore")  # of tensors over read-only memory, which are only read


@dataclass(frozen=True)
class Buffers:
    x: torch.Tensor
    z: torch.Tensor
    sigma_f: torch.Tensor


def to_batch(x: Any, z: Any, label: Any, buffers: Buffers) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x in [-1, 1] and z / σ_f as float32, in the buffers, and label as int64."""
    rows = len(label)
    images = buffers.x[:rows].copy_(torch.as_tensor(x)).div_(127.5).sub_(1)
    codes = buffers.z[:rows].copy_(torch.as_tensor(z)).div_(buffers.sigma_f)
    return images, codes, torch.as_tensor(label, dtype=torch.int64)


def files(case: Case, name: str) -> list[Path]:
    if PEERS[name].write is None:
        return [case.root / f"{array}.npy" for array in ("x", "z", "label")]
    return [path for path in sorted((case.root / PEERS[name].folder).rglob("*")) if path.is_file()]


def warm(paths: list[Path]) -> None:
    buffer = bytearray(1 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def peak_rss_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def write(case: Case, name: str) -> None:
    peer = PEERS[name]
    folder, complete = case.root / peer.folder, case.root / f"{peer.folder}.complete"
    if peer.write is None or complete.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    peer.write(case, folder)
    complete.touch()


def batches(case: Case, name: str, batch: int, epochs: int, product: str) -> Iterator[int]:
    """The size of each batch, once it is made."""
    sigma_f = torch.from_numpy(case.load("sigma_f"))
    buffers = Buffers(torch.empty(batch, *case.shape), torch.empty(batch, *case.shape), sigma_f)
    for raw in PEERS[name].read(case, case.root / PEERS[name].folder, batch, epochs):
        if isinstance(raw, int):
            yield raw
        else:
            yield len(raw[2] if product == "stored" else to_batch(*raw, buffers)[2])


def read(case: Case, name: str, batch: int, epochs: int, product: str, seconds: float, repeats: int) -> dict[str, Any]:
    """`repeats` rates one after the other, each over `seconds`; there must be enough epochs for them."""
    torch.set_num_threads(1)
    for module in PEERS[name].modules:
        library(module)
    paths = files(case, name)
    warm(paths)
    opened = time.perf_counter()
    source = batches(case, name, batch, epochs, product)
    next(source)
    first = time.perf_counter() - opened
    rates: list[float] = []
    while len(rates) < repeats:
        pairs, start = 0, time.perf_counter()
        for rows in source:
            pairs += rows
            if time.perf_counter() - start > seconds:
                break
        rates.append(pairs / (time.perf_counter() - start))
    return {
        "peer": name,
        "pairs_per_s": [round(rate, 1) for rate in rates],
        "first_batch_s": round(first, 4),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "bytes_on_disk": sum(path.stat().st_size for path in paths),
        "versions": {package: version(package) for package in ("numpy", "torch", *PEERS[name].packages)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["write", "read"])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--product", choices=["stored", "float32"], default="float32")
    args = parser.parse_args()
    case = Case.open(args.root)
    if args.command == "write":
        write(case, args.peer)
    else:
        timing = args.epochs, args.product, args.seconds, args.repeats
        print(json.dumps(read(case, args.peer, args.batch, *timing)))


if __name__ == "__main__":
    main()
