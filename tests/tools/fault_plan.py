"""Which faults hit which jobs, and the table of what they did."""

import random
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Jobs of each kind of 66 faults, and how often each is hit before its bytes are looked at: most of a job is the start
# of its workers. A soak hits each job once.
PLAN = {
    "worker killed": (3, 4),  # at most as often as the job retries one unit
    "driver killed": (1, 2),
    "driver told to end": (1, 2),
    "Ray head killed": (1, 1),
    "Ray node killed": (1, 1),
    "object store killed": (1, 2),
    "disk full": (1, 4),
    "slow disk": (1, 2),
    "torn files": (1, 16),
    "file deleted": (2, 6),
    "bit flipped": (2, 6),
}


@dataclass
class Outcome:
    """What the faults of one job did."""

    faults: int
    units_lost: int  # in flight at the faults, or damaged by them
    units_repeated: int  # encoded again


def can_mount() -> bool:
    """Whether this process may mount a tmpfs, which a full disk needs."""
    folder = tempfile.mkdtemp()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode == 0
    if mounted:
        subprocess.run(["umount", folder], check=True)
    Path(folder).rmdir()
    return mounted


def schedule(num_faults: int, generator: random.Random) -> list[tuple[str, int]]:
    """Jobs in random order, each with its kind of fault and how often it is hit.

    These are the jobs of PLAN, or, for more faults than it has, jobs of one fault each in the same proportions.
    """
    plan = dict(PLAN)
    if not can_mount():
        print("no right to mount a tmpfs: no disk is full in this run", flush=True)
        del plan["disk full"]
    faults_of_plan = sum(num_jobs * num_hits for num_jobs, num_hits in PLAN.values())
    jobs: list[tuple[str, int]] = []
    for fault, (num_jobs, num_hits) in plan.items():
        if num_faults <= faults_of_plan:
            jobs += [(fault, num_hits)] * num_jobs
        else:
            jobs += [(fault, 1)] * round(num_jobs * num_hits * num_faults / faults_of_plan)
    generator.shuffle(jobs)
    return jobs


def table(outcomes: dict[str, list[Outcome]], seconds: dict[str, float]) -> str:
    """Markdown of the outcomes and the seconds of all jobs of each kind of fault."""
    lines = ["| fault | rounds | jobs | units lost | units encoded again | result | s a job |", "| --- " * 7 + "|"]
    for fault in PLAN:
        if fault in outcomes:
            counts = count_outcomes(outcomes[fault])
            seconds_per_job = seconds[fault] / len(outcomes[fault])
            lines.append(f"| {fault} | {counts} | bytes of a clean run | {seconds_per_job:.1f} |")
    all_outcomes = [outcome for outcomes_of_fault in outcomes.values() for outcome in outcomes_of_fault]
    return "\n".join([*lines, f"| all | {count_outcomes(all_outcomes)} | | |"])


def count_outcomes(outcomes: list[Outcome]) -> str:
    """The cells of a row: faults, jobs, units lost and units encoded again."""
    faults = sum(outcome.faults for outcome in outcomes)
    units_lost = sum(outcome.units_lost for outcome in outcomes)
    units_repeated = sum(outcome.units_repeated for outcome in outcomes)
    return f"{faults} | {len(outcomes)} | {units_lost} | {units_repeated}"
