"""The README is executed: its Python as it stands, its `nfm` lines for real on a small demo or as a dry run, its `make`
targets looked up."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from nfm.pipeline.cli import main
from nfm.storage_specs.format.card import bytes_per_row
from nfm.storage_specs.format.schema import NetworkSpec, NfmCoupling, NoiseSpec, PixelSpec, Spec
from nfm.storage_specs.reading.store import Store

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """(where, code) of each fenced block."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    texts = {path.name: path.read_text() for path in DOCS}
    return [
        (f"{name}:{text[: match.start()].count(chr(10)) + 2}", match[1])
        for name, text in texts.items()
        for match in fence.finditer(text)
    ]


STOCK = blocks("python stock")
PYTHON = blocks("python")
LINES = [(where, line.partition("  #")[0].strip()) for where, block in blocks("sh") for line in block.splitlines()]
NFM = [(where, line) for where, line in LINES if line.startswith(("nfm ", "torchrun "))]
MAKE = [(where, line) for where, line in LINES if re.match(r"(\w+=\S+ )*make ", line)]


def test_the_docs_have_blocks_of_each_kind() -> None:
    assert len(PYTHON) >= 4
    assert len(STOCK) == 5
    assert len(NFM) >= 5
    assert len(MAKE) >= 4
    assert len(NFM) + len(MAKE) == len(LINES), "a line that no test runs"


@pytest.mark.parametrize(("where", "code"), PYTHON, ids=[where for where, _ in PYTHON])
def test_python_runs_as_it_stands(home: Path, monkeypatch: pytest.MonkeyPatch, where: str, code: str) -> None:
    monkeypatch.chdir(home)
    exec(compile(code, where, "exec"), {"__name__": "docs"})


@pytest.mark.parametrize(("where", "code"), STOCK, ids=[where for where, _ in STOCK])
def test_stock_readers_get_exactly_what_ours_does(
    home: Path, monkeypatch: pytest.MonkeyPatch, where: str, code: str
) -> None:
    """Ten lines each, without our code: x, z, noise and label of block 0 with draw 0."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = [line for line in code.splitlines() if line]
    assert len(lines) <= 10 or "memmap" in code
    names: dict[str, Any] = {"__name__": "docs"}
    exec(compile(code, where, "exec"), names)
    store = Store("runs/demo/couplings-zarr")
    for column, draw in (("x", -1), ("z", 0), ("noise", 0), ("label", -1)):
        ours = store.column(column, 0, draw)
        assert np.array_equal(np.asarray(names[column]), ours), column
        assert column in ("x", "label") or np.asarray(names[column]).dtype == ours.dtype


@pytest.mark.parametrize(("where", "line"), NFM, ids=[line[:40] for _, line in NFM])
def test_nfm_lines_run(home: Path, monkeypatch: pytest.MonkeyPatch, where: str, line: str) -> None:
    """On the small demo where they name it; the rest, for clusters, up to their resolved config."""
    monkeypatch.chdir(home)
    arguments = shlex.split(line.partition("-m nfm ")[2] if line.startswith("torchrun") else line[4:])
    if "runs/demo" not in line and arguments[0] != "config":
        arguments.append("--dry-run")
    elif arguments[0] == "encode" and "--workers" not in arguments:
        arguments += ["--workers", "1"]  # the tests stay below 2 GiB
    monkeypatch.setattr(sys, "argv", ["nfm", *arguments])
    main()


@pytest.mark.parametrize(("where", "line"), MAKE, ids=[line[:40] for _, line in MAKE])
def test_make_lines_resolve_to_commands(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str, line: str
) -> None:
    """`make -n` prints what a target would run; where that is a stage, its options must be right."""
    arguments = shlex.split(line[line.index("make ") + 5 :])
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    printed = subprocess.run(
        ["make", "-n", "-o", ".venv/.ready", *arguments],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},  # and not the variables of a make that runs this test
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    commands = [command for command in printed.splitlines() if command.startswith(".venv/bin/nfm ")]
    if arguments[0] in ("encode-couplings", "train-student", "demo"):
        assert commands
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["nfm", *shlex.split(command)[1:], "--dry-run"])
        main()


def test_the_kubernetes_job_runs_a_command_that_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    ((_, text),) = blocks("yaml")
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group["template"]["spec"]["terminationGracePeriodSeconds"] for group in workers] == [60]
    monkeypatch.setattr(sys, "argv", [*shlex.split(job["spec"]["entrypoint"]), "--dry-run"])
    main()


def test_every_target_named_in_the_docs_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for path in DOCS:
        for target in re.findall(r"`make ([a-z-]+)", path.read_text()):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{path.name} names make {target}"


def test_the_costs_in_the_docs_are_those_of_the_layout() -> None:
    text = (ROOT / "docs" / "store.md").read_text()
    noise = {"law": "philox-as241-v1", "seed": 0, "dtype": "float16"}
    teacher = NetworkSpec(architecture={}, sha256="0" * 64, training={})
    for row in re.findall(r"^\| (float\d+|bfloat16|int8) \| (\w+).*? \| ([\d,]+) \|", text, re.MULTILINE):
        coupling = NfmCoupling(
            kind="nfm",
            draws=8,
            eta=0.1,
            precision="fp32",
            z_dtype=row[0],
            z_scale_sha256="0" * 64 if row[0] == "int8" else None,
            noise=NoiseSpec.model_validate(noise | {"stored": row[1] == "stored"}),
            teacher=teacher,
            source="0" * 64,
        )
        spec = Spec(
            kind="couplings",
            layout="webdataset",
            rows=10_240,
            block_rows=1024,
            shape=(3, 64, 64),
            x=PixelSpec(dtype="uint8"),
            views=["plain"],
            num_classes=1,
            class_names=["a"],
            names=False,
            preprocessing={},
            coupling=coupling,
        )
        file_bytes = {kind: row_bytes.file for kind, row_bytes in bytes_per_row(spec).items()}
        assert row[2] == f"{round(file_bytes.pop('x') / 8 + sum(file_bytes.values())):,}"
