"""The package as others get it: the wheel and the sdist hold what they should, and the wheel runs in a fresh
environment, in a folder whose own `models.py`, `stages.py` and `pipeline/` it must not touch."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import nfm

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
UV = (sys.executable, "-m", "uv")
EXCLUDED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "runs", "tests")
INFO = f"nfm-{nfm.__version__}.dist-info"

IMPORT_EVERY_MODULE = """
import importlib, pkgutil, sys
import nfm
names = [module.name for module in pkgutil.walk_packages(nfm.__path__, "nfm.")]
for name in names:
    importlib.import_module(name)
assert not {"models", "stages", "pipeline", "storage_specs"} & set(sys.modules)
print(len(names))
"""
USE_EVERY_NAME = """
from nfm import *
from nfm import CouplingStream, Source, Store, StreamState, __version__, load
assert load.__module__ == "nfm.stages.checkpoint"
store = Store("samples/val")
print(__version__, store.spec.rows, next(CouplingStream("samples/train", 4, 0, view="samples")).x.shape[0])
"""
TYPED = """
import nfm

stream = nfm.CouplingStream("store", batch_size=8, seed=0)
reveal_type(next(stream).x)
reveal_type(stream.state)
reveal_type(nfm.Store("store").spec.rows)
reveal_type(nfm.load("model.safetensors"))
nfm.CouplingStream("store", batch_size="8", seed=0)
nfm.Stream
"""


def execute(*command: object, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
    """Run a command and return its stdout; the test fails with its output where the command does."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_checkout(target: Path) -> Path:
    """A copy of the checkout, links kept as links, in which builds may leave what they like."""
    shutil.copytree(ROOT, target, symlinks=True, ignore=EXCLUDED)
    return target


def build(source: Path, kind: str, out: Path) -> Path:
    """The wheel or the sdist of a source folder, or of an sdist."""
    execute(*UV, "build", f"--{kind}", "--build-constraint", ROOT / "constraints.txt", "--out-dir", out, source)
    (built,) = [*out.glob("*.whl"), *out.glob("*.tar.gz")]
    return built


def package_files() -> set[str]:
    """The files of the package in the checkout, through its links."""
    paths: set[str] = set()
    for folder, folders, names in os.walk(ROOT / "nfm", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        paths.update(str((Path(folder) / name).relative_to(ROOT)) for name in names)
    return paths


def wheel_files(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel by path; none may be a link."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            assert (info.external_attr >> 28) in (0, 0o10), f"{info.filename} is not a regular file"
        return {info.filename: archive.read(info) for info in archive.infolist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build(copy_checkout(folder / "checkout"), "wheel", folder / "dist")


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    files = wheel_files(wheel)
    assert {path.partition("/")[0] for path in files} == {"nfm", INFO}
    assert {path for path in files if path.startswith("nfm/")} == package_files()
    for path in package_files():
        assert files[path] == (ROOT / path).read_bytes(), path
    assert files[f"{INFO}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    for path in (
        "nfm/py.typed",
        "nfm/models/tarflow.py",
        "nfm/stages/prepare.py",
        "nfm/pipeline/presets/digits.toml",
        "nfm/pipeline/templates/report.html",
        "nfm/storage_specs/format/schema.py",
        "nfm/storage_specs/reading/stream.py",
        "nfm/storage_specs/storage/files.py",
        "nfm/storage_specs/writing/writer.py",
    ):
        assert path in files


def test_a_wheel_built_from_the_sdist_is_the_same(wheel: Path, tmp_path: Path) -> None:
    sdist = build(copy_checkout(tmp_path / "checkout"), "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members), "an sdist with links unpacks nowhere else"
    names = {member.name.partition("/")[2].partition("/")[0] for member in members} - {""}
    metadata = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "nfm.egg-info", "pyproject.toml", "setup.cfg"}
    assert names == {"nfm", *metadata}
    rebuilt = wheel_files(build(sdist, "wheel", tmp_path / "wheel"))
    record = f"{INFO}/RECORD"
    assert rebuilt.keys() == wheel_files(wheel).keys()
    assert {path for path, data in wheel_files(wheel).items() if rebuilt[path] != data} <= {record}


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and a folder beside it that has modules with the names of this project's folders."""

    bin: Path
    folder: Path
    variables: dict[str, str]

    def run(self, name: str, *arguments: object) -> str:
        """Run a program of the environment in the folder."""
        return execute(self.bin / name, *arguments, cwd=self.folder, environment=self.variables)


def make_environment(root: Path) -> Environment:
    """An environment with torch, as the Makefile installs it, and nothing else."""
    folder = root / "other project"
    (folder / "pipeline").mkdir(parents=True)
    for name in ("models.py", "stages.py", "storage_specs.py", "pipeline/__init__.py"):
        (folder / name).write_text("raise ImportError('this module is somebody else\\'s')\n")
    ignored = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    variables = {name: value for name, value in os.environ.items() if name not in ignored}
    execute(*UV, "venv", "--python", sys.executable, root / "venv")
    environment = Environment(root / "venv" / "bin", folder, variables)
    config = (sys.executable, "-m", "pip", "config", "get", "global.find-links")
    links = subprocess.run(config, capture_output=True, text=True).stdout.strip()  # empty where none is configured
    torch = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert torch is not None
    install(environment, *(["--find-links", links] if links else []), torch[1])
    return environment


def install(environment: Environment, *arguments: object) -> None:
    execute(*UV, "pip", "install", "--python", environment.bin / "python", *arguments)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel and its declared dependencies."""
    environment = make_environment(tmp_path_factory.mktemp("installed"))
    install(environment, "--constraint", ROOT / "constraints.txt", wheel)
    return environment


def test_the_wheel_runs_beside_other_peoples_modules(installed: Environment) -> None:
    assert "prepare" in installed.run("nfm", "--help")
    assert installed.run("python", "-m", "nfm", "--version").split()[-1] == nfm.__version__
    where = installed.run("python", "-c", "import nfm; print(nfm.__file__)")
    assert Path(where.strip()).is_relative_to(installed.bin.parent)
    prepare = ("prepare", "--preset", "digits", "--set", "data.holdout=0.9", "--out", "samples")
    assert "are complete" in installed.run("nfm", *prepare)
    assert installed.run("python", "-c", USE_EVERY_NAME).split() == [nfm.__version__, "1618", "4"]


def test_every_module_of_the_wheel_finds_its_dependencies(installed: Environment) -> None:
    modules = [path for path in package_files() if path.endswith(".py") and path != "nfm/__init__.py"]
    assert int(installed.run("python", "-c", IMPORT_EVERY_MODULE)) == len(modules)
    freeze = execute(*UV, "pip", "freeze", "--python", installed.bin / "python")
    assert not re.search(r"^(pytest|mypy|ruff|uv|webdataset|datasets|s3fs|gcsfs|diffusers)==", freeze, re.MULTILINE)


def test_the_wheel_is_typed(installed: Environment) -> None:
    (installed.folder / "typed.py").write_text(TYPED)
    command = (sys.executable, "-m", "mypy", "--strict", "--python-executable", installed.bin / "python", "typed.py")
    environment = {**installed.variables, "MYPY_CACHE_DIR": str(installed.folder / "mypy")}
    done = subprocess.run(
        [str(part) for part in command], cwd=installed.folder, env=environment, capture_output=True, text=True
    )
    assert re.findall(r'Revealed type is "([^"]+)"', done.stdout) == [
        "torch._tensor.Tensor",
        "nfm.storage_specs.reading.stream.StreamState",
        "int",
        "nfm.models.sit.SiT | nfm.models.tarflow.TarFlow",
    ], done.stdout
    errors = re.findall(r"^typed\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    assert errors == [("9", "arg-type"), ("10", "attr-defined")], done.stdout


def test_an_editable_install_runs_beside_other_peoples_modules(tmp_path: Path) -> None:
    """As `make install` makes it; the dependencies are those of the other tests."""
    checkout = copy_checkout(tmp_path / "checkout")
    environment = make_environment(tmp_path)
    install(environment, "--constraint", ROOT / "constraints.txt", "--editable", checkout)
    assert "prepare" in environment.run("nfm", "--help")
    assert environment.run("python", "-m", "nfm", "--version").split()[-1] == nfm.__version__
    where = environment.run("python", "-c", "import nfm.models; print(nfm.__file__, nfm.models.__file__)")
    assert where.split() == [str(checkout / "nfm" / "__init__.py"), str(checkout / "nfm" / "models" / "__init__.py")]
    assert "are complete" in environment.run("nfm", "prepare", "--set", "data.holdout=0.9", "--out", "samples")
