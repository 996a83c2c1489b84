"""The README's picture and table of numbers, from a finished demo: `make docs-pictures`.

`python -m tests.tools.docs_pictures runs/demo` copies the demo's report.png to docs/ and writes the numbers of its
metrics.json between the README's markers, so that both are those of one run.
"""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARKERS = "<!-- numbers of the demo: make docs-pictures -->\n", "<!-- end of the demo's numbers -->\n"
STUDENTS = {"FM": "independent", "NFM": "nfm"}
CURVATURE_SAMPLERS = {"Heun 31": "heun31", "Euler 5": "euler5"}
DISTANCE_SAMPLERS = {"Heun 31": "heun31", "Heun 7": "heun7", "Euler 5": "euler5", "Euler 3": "euler3"}


def numbers(metrics: dict[str, Any]) -> str:
    """The table of the README, and the sentence below it, in Markdown."""
    columns = ["", "loss"]
    columns += [f"κ, {title}" for title in CURVATURE_SAMPLERS]
    columns += [f"FD, {title}" for title in DISTANCE_SAMPLERS]
    rows = [columns, ["---"] * len(columns)]
    for title, name in STUDENTS.items():
        student = metrics["students"][name]
        row = [title, f"{student['loss']:.3f}"]
        row += [f"{student[sampler]['curvature']:.3f}" for sampler in CURVATURE_SAMPLERS.values()]
        row += [f"{student[sampler]['fd']:.3f}" for sampler in DISTANCE_SAMPLERS.values()]
        rows.append(row)
    table = "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in rows)
    distance = metrics["fd"]
    return (
        f"{table}\nκ is the curvature of the paths, FD the Fréchet distance of {distance['samples']:,} samples over "
        f"{distance['features']};\nthe teacher itself has {metrics['teacher']['fd']:.3f}, and "
        f"{distance['resampled']['samples']:,} training images drawn with replacement "
        f"{distance['resampled']['fd']:.3f}.\n"
    )


def insert(readme: str, text: str) -> str:
    """The README with `text` between its markers."""
    start, end = MARKERS
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    assert len(pattern.findall(readme)) == 1, f"README.md has no {start.strip()} or no {end.strip()}"
    return pattern.sub(lambda _: start + text + end, readme)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="folder of a finished demo")
    demo = parser.parse_args().demo
    shutil.copyfile(demo / "report.png", ROOT / "docs" / "report.png")
    readme = ROOT / "README.md"
    readme.write_text(insert(readme.read_text(), numbers(json.loads((demo / "metrics.json").read_text()))))


if __name__ == "__main__":
    main()
