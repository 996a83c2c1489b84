"""The public face, `nfm`: what docs/api.md says of it, its errors, and that the package declares what it imports."""

import ast
import importlib
import pickle
import pydoc
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import torch

import nfm
from nfm.models.sit import SiT
from nfm.models.tarflow import TarFlow
from nfm.stages.checkpoint import Checkpoint, load, save
from nfm.stages.errors import StageError
from nfm.stages.frechet import FrechetDistance
from nfm.storage_specs.storage.errors import StoreError
from tests.tools.small_run import Run
from tests.tools.stores import sample_spec

ROOT = Path(__file__).parent.parent
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = ("models", "stages", "pipeline", "storage_specs")
# Distributions that no `import` statement of the package names, and what loads them.
PLUGINS = {
    "s3fs": "fsspec, for s3:// URLs",
    "gcsfs": "fsspec, for gs:// URLs",
    "torch-fidelity": "torchmetrics, for Inception features",
}


def test_every_public_name_is_documented_and_every_documented_name_is_public() -> None:
    assert sorted(re.findall(r"^### `nfm\.(\w+)`$", API, re.MULTILINE)) == sorted(nfm.__all__)
    used = set(re.findall(r"\bnfm\.([A-Za-z_]\w*)", "\n".join(re.findall(r"```python\n(.*?)```", API, re.DOTALL))))
    assert used - set(FOLDERS) <= set(nfm.__all__)


def test_every_package_that_the_project_was_asked_to_use_has_its_place() -> None:
    packages = re.findall(r"^\| ([a-z]+) \| .{10,} \|$", API, re.MULTILINE)
    asked = "torch ray pyarrow webdataset zarr numcodecs diffusers click torchmetrics fsspec"
    assert packages == asked.split()


def test_names_are_those_of_their_modules() -> None:
    """Whether they are taken one by one, all at once, or by those who go through `dir`."""
    names: dict[str, object] = {}
    exec("from nfm import *", names)
    assert set(nfm.__all__) <= set(names)
    assert set(dir(nfm)) == set(nfm.__all__)
    for name in set(nfm.__all__) - {"__version__"}:
        value = getattr(nfm, name)
        assert value is names[name] is getattr(importlib.import_module(value.__module__), value.__name__)
    assert nfm.__version__ == version("nfm")


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match=r"'nfm' has no attribute 'Stream'; its names are CouplingStream, Source"):
        nfm.Stream  # type: ignore[attr-defined]  # noqa: B018  (that it has no such name is what is tested)
    with pytest.raises(ImportError, match="cannot import name 'Stream'"):
        exec("from nfm import Stream")


def test_help_shows_every_name() -> None:
    text = pydoc.plain(pydoc.render_doc(nfm))
    for name in ("CouplingStream", "Source", "Store", "StreamState"):
        assert f"class {name}(" in text
    assert "load_any_network(url: str)" in text
    assert nfm.__version__ in text


def test_states_and_sources_travel_between_processes_and_streams_do_not(run: Run) -> None:
    state = nfm.StreamState(epoch=2, position=7)
    source = nfm.Source("s3://bucket/couplings", 0.5, {"anon": True})
    script = "import pickle, sys; print(pickle.load(sys.stdin.buffer))"
    done = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps((state, source)), capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == str((state, source))
    stream = nfm.CouplingStream(run.couplings["zarr"], 32, 0)
    for value in (stream, nfm.Store(run.couplings["zarr"])):
        with pytest.raises(TypeError, match="cannot pickle"):
            pickle.dumps(value)
    stream.close()


def test_load_gives_the_network_of_a_teacher_or_a_student(run: Run, student: str) -> None:
    for url, network_class in ((run.teacher, TarFlow), (student, SiT)):
        network = nfm.load(url)
        assert type(network) is network_class
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert {str(parameter.device) for parameter in network.parameters()} == {"cpu"}


def test_load_says_what_is_wrong(run: Run, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"missing\.safetensors"):
        nfm.load(f"{tmp_path}/missing.safetensors")
    with pytest.raises(StageError, match=re.escape(f"got a folder, expected a file; the model in it is {run.teacher}")):
        nfm.load(str(Path(run.teacher).parent))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG and more")
    with pytest.raises(StageError, match=r"picture\.png: got no checkpoint of nfm .* expected a safetensors file that"):
        nfm.load(f"{tmp_path}/picture.png")
    save(f"{tmp_path}/state.safetensors", Checkpoint({}, {"run": {"teacher": {}}}))
    with pytest.raises(StageError, match=r"state\.safetensors: got a checkpoint without an architecture, expected"):
        nfm.load(f"{tmp_path}/state.safetensors")


def test_load_takes_the_architecture_from_the_checkpoint(run: Run, tmp_path: Path) -> None:
    """And not from the sections of its run."""
    checkpoint = load(run.teacher)
    save(f"{tmp_path}/teacher.safetensors", Checkpoint(checkpoint.tensors, checkpoint.document | {"run": {}}))
    assert isinstance(nfm.load(f"{tmp_path}/teacher.safetensors"), TarFlow)
    document = checkpoint.document | {"architecture": {"name": "UNet"}}
    save(f"{tmp_path}/other.safetensors", Checkpoint(checkpoint.tensors, document))
    with pytest.raises(StageError, match="got a checkpoint of 'UNet', expected one of TarFlow or SiT"):
        nfm.load(f"{tmp_path}/other.safetensors")


def test_streams_and_stores_say_what_is_wrong(run: Run, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no dataset\.json, and nothing of a store"):
        nfm.Store(str(tmp_path))
    with pytest.raises(StoreError, match="got a folder of stores, expected one of them"):
        nfm.CouplingStream(run.samples, 32, 0)
    with pytest.raises(StoreError, match="got a store of samples, expected one of couplings"):
        nfm.CouplingStream(f"{run.samples}/train", 32, 0)
    with pytest.raises(ValueError, match="got global batch 33; expected a positive multiple of the world size 2"):
        nfm.CouplingStream(run.couplings["zarr"], 33, 0, world_size=2)


def test_inception_features_name_the_extra_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(StageError, match=r"needs torch-fidelity .*; install nfm\[fid\], or use 'pixels'"):
        FrechetDistance("inception", 8, sample_spec(), torch.device("cpu"))


def imported_packages(paths: list[Path]) -> set[str]:
    """Top-level packages that the files import, at any depth, without the standard library and this project's own."""
    names: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"nfm", "tests"}


def distributions(packages: set[str]) -> set[str]:
    """The distributions that the packages come from: pillow for PIL, and so on."""
    providers = packages_distributions()
    return {normalize(name) for package in packages for name in providers.get(package, [package])}


def declared(requirements: list[str]) -> set[str]:
    """Names of the distributions in a list of requirements."""
    return {normalize(re.split(r"[\[<>=!~ ;]", requirement)[0]) for requirement in requirements}


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_package_declares_exactly_what_it_imports() -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")] + [*(ROOT / "nfm").glob("*.py")]
    assert distributions(imported_packages(paths)) == declared(PYPROJECT["project"]["dependencies"])


def test_tests_import_only_what_is_declared() -> None:
    """What the benchmarks compare with runs in an environment of its own."""
    apart = {"peers.py", "peers_formats.py", "swift_launcher.py"}
    paths = [path for path in (ROOT / "tests").rglob("*.py") if path.name not in apart]
    extras = PYPROJECT["project"]["optional-dependencies"]
    requirements = [*PYPROJECT["project"]["dependencies"], *extras["dev"]]
    assert distributions(imported_packages(paths)) <= declared(requirements)


def test_extras_are_plugins_that_other_packages_load() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    requirements = [requirement for name, listed in extras.items() if name != "dev" for requirement in listed]
    assert declared(requirements) == set(PLUGINS)
    assert re.findall(r"`nfm\[(\w+)\]` \(([\w-]+)\)", API) == [
        (name, *declared(listed)) for name, listed in extras.items() if name != "dev"
    ]
