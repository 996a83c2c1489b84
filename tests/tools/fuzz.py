"""Fuzzes stores, checkpoints and caches: `python -m tests.tools.fuzz --cases 1000 --seed 0`, or `make fuzz N=1000`.

Each seed is a case: a sound folder, some changes, and the commands that read it (fuzz_trial.py). Cases run one after
the other in a process of their own, which another watches: one that takes longer than 20 seconds, or that ends the
process, is a finding like all others. Every finding names its seed: `make fuzz SEED=… N=1` runs it again.
"""

import argparse
import faulthandler
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

SECONDS = 20.0  # that a case may take
GROWTH_MIB = 1024  # by which a case may make the process grow
MAX_DATA = 6 << 30  # of the process: bytes of RLIMIT_DATA


def run_cases(seeds: range, seconds: float) -> None:
    """Run cases in this process, and print one line of JSON about each. One that takes longer ends the process."""
    import torch

    from nfm.storage_specs.storage import lease
    from tests.tools.fuzz_cases import make_case
    from tests.tools.fuzz_subjects import Subjects
    from tests.tools.fuzz_trial import run_trial
    from tests.tools.memory import forget_peak, peak_bytes

    torch.set_num_threads(1)
    for name in ("fsync", "fdatasync"):  # which take most of the time
        setattr(os, name, lambda descriptor: None)
    lease.CONFIRM_SECONDS, lease.RENEW_SECONDS, lease.LEASE_SECONDS = 0.0, 0.5, 1.0  # no other driver lives
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA, MAX_DATA))
    results = os.fdopen(os.dup(1), "w")
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="nfm-fuzz-", dir=in_memory) as folder:
        (subjects_folder := Path(folder, "subjects")).mkdir()
        subjects = Subjects(subjects_folder)
        for seed in seeds:
            faulthandler.dump_traceback_later(seconds, exit=True)
            print(json.dumps({"seed": seed}), file=results, flush=True)
            before, start = forget_peak(), time.monotonic()
            case = make_case(seed, subjects)
            finding = run_trial(case, Path(folder, f"{seed}"))
            grown = (peak_bytes() - before) >> 20
            if not finding and grown > GROWTH_MIB:
                finding = f"the process grew by {grown} MiB"
            faulthandler.cancel_dump_traceback_later()
            line = {"seed": seed, "name": case.name, "sealed": case.sealed, "changes": case.changes}
            line |= {"finding": finding, "seconds": round(time.monotonic() - start, 3)}
            print(json.dumps(line), file=results, flush=True)


def fuzz(seeds: range, seconds: float = SECONDS) -> list[dict[str, Any]]:
    """Run cases in processes that are watched. Returns what is known of each case; one with a "finding" failed."""
    ends: list[dict[str, Any]] = []
    start = seeds.start
    while start < seeds.stop:
        command = [sys.executable, "-m", "tests.tools.fuzz", "--run", f"{start}:{seeds.stop}:{seconds}"]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            assert process.stdout is not None
            running: int | None = None
            for text in process.stdout:
                line = json.loads(text)
                if "finding" not in line:
                    running = line["seed"]
                    continue
                running = None
                ends.append(line)
                if line["finding"]:
                    print(describe(line), flush=True)
            code = process.wait()
            errors.seek(0)
            tail = errors.read()[-60_000:]
        if running is None and code == 0:
            break
        if running is None:
            raise RuntimeError(f"the fuzzer failed with {code}:\n{tail}")
        why = f"took more than {seconds:g} s" if "Timeout" in tail else f"ended the process with {code}"
        finding = f"{why}: {_innermost_frames(tail)}"
        ends.append({"seed": running, "name": "", "sealed": None, "changes": [], "finding": finding})
        print(describe(ends[-1]), flush=True)
        start = running + 1
    return ends


def _innermost_frames(text: str) -> str:
    """Where the main thread was, from what faulthandler printed; all of the text if that does not say it."""
    threads = [block for block in text.split("\n\n") if "run_trial" in block]
    if not threads or "Traceback" in text:
        return text[-3000:]
    frames = re.findall(r'File "[^"]*/([^/"]+)", line ([0-9]+) in (\S+)', threads[-1])
    return " < ".join(f"{name}:{line} {function}" for name, line, function in frames[:8])


def describe(end: dict[str, Any]) -> str:
    """A finding, and how to repeat it."""
    lines = [f"make fuzz SEED={end['seed']} N=1: {end['name']}{', sealed' if end['sealed'] else ''}"]
    lines += [f"    {change!r:.200}" for change in end["changes"]]
    return "\n".join([*lines, f"    → {end['finding']}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument(
        "--run", metavar="START:STOP:SECONDS", help="run cases here and now, as the process that is watched"
    )
    arguments = parser.parse_args()
    if arguments.run:
        start, stop, seconds = arguments.run.split(":")
        run_cases(range(int(start), int(stop)), float(seconds))
        return
    ends = fuzz(range(arguments.seed, arguments.seed + arguments.cases))
    findings = [end for end in ends if end["finding"]]
    roles = Counter(end["name"].split(" ")[0] for end in ends)
    seconds = sum(end.get("seconds", 0) for end in ends)
    print(f"{len(ends)} cases in {seconds:.0f} s, {len(findings)} findings; {dict(roles)}")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
