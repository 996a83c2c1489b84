"""Data flows one way, and a newcomer finds a line's home from the folder names: the imports are held to that."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The folders at the root, and the rooms of storage_specs: what each may import beside itself.
FOLDERS = {
    "storage_specs": set[str](),
    "models": set[str](),
    "stages": {"storage_specs", "models"},
    "pipeline": {"storage_specs", "models", "stages"},
}
ROOMS = {
    "storage": set[str](),
    "format": {"storage"},
    "reading": {"storage", "format"},
    "writing": {"storage", "format", "reading"},
}
VERBS = {"prepare", "train_teacher", "encode", "train_student", "sample", "evaluate"}
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("**/*.py"))
EVERY_FILE = sorted([*FILES, *(ROOT / "nfm").glob("*.py"), *(ROOT / "tests").glob("**/*.py")])
LINES = 450


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> list[tuple[str, ...]]:
    """Dotted names of everything the file imports, split at the dots."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [tuple(name.split(".")) for name in names]


@pytest.mark.parametrize("path", EVERY_FILE, ids=relative)
def test_the_folders_are_imported_as_nfm(path: Path) -> None:
    """A module imported under two names exists twice."""
    bare = [".".join(name) for name in imports(path) if name[0] in FOLDERS]
    assert not bare, f"import {bare} from nfm"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    names = imports(path)
    folders = {name[1] for name in names if name[0] == "nfm" and name[1] != "__version__"}
    assert not folders - FOLDERS[folder] - {folder}
    packages = {name[0] for name in names}
    if folder != "pipeline":
        assert not packages & {"ray", "click"}
    if folder == "models":
        assert not packages & {"fsspec", "zarr", "pyarrow", "pathlib", "os"}, "models do no I/O"
    if folder == "stages" and path.stem in VERBS:
        others = {name[2] for name in names if name[:2] == ("nfm", "stages")} - {path.stem}
        assert not others & VERBS, "stages meet only through stores and checkpoints"


FORKING = {"multiprocessing", "fork", "forkpty", "pty", "DataLoader", "preexec_fn", "ProcessPoolExecutor"}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_forks(path: Path) -> None:
    """Arrow, torch and fsspec have threads, whose locks a forked process would wait for without end. Ray and
    `subprocess` start programs anew."""
    used = {part for name in imports(path) for part in name}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        used |= {node.attr} if isinstance(node, ast.Attribute) else set()
        used |= {node.arg or ""} if isinstance(node, ast.keyword) else set()
    assert not used & FORKING


@pytest.mark.parametrize("path", sorted((ROOT / "storage_specs").glob("*/*.py")), ids=relative)
def test_the_rooms_of_storage_specs_stand_on_each_other(path: Path) -> None:
    room = path.relative_to(ROOT).parts[1]
    rooms = {name[2] for name in imports(path) if name[:2] == ("nfm", "storage_specs")}
    assert not rooms - ROOMS[room] - {room}


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("**/*.py")), ids=relative)
def test_no_test_file_imports_another(path: Path) -> None:
    """What several share lies in tests/tools."""
    others = [name[1] for name in imports(path) if name[0] == "tests" and name[1].startswith(("test_", "conftest"))]
    assert not others


def test_every_folder_is_a_package_inside_nfm() -> None:
    """By a link, so that a checkout, an editable install and a wheel all have it."""
    links = {path.name: path.readlink() for path in (ROOT / "nfm").iterdir() if path.is_symlink()}
    assert links == {folder: Path("..") / folder for folder in FOLDERS}


@pytest.mark.parametrize("command", ["import nfm; nfm.__version__; dir(nfm)", "import sys; sys.argv[1:] = ['--help']"])
def test_help_and_import_answer_at_once(command: str) -> None:
    """They load none of the packages that take seconds."""
    program = (
        "import sys\n"
        f"{command}\n"
        "if len(sys.argv) > 1:\n"
        "    import contextlib, nfm.__main__\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        nfm.__main__.main()\n"
        "slow = {'torch', 'ray', 'pyarrow', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_unpickles(path: Path) -> None:
    """But for torch.load, which is told each time to take tensors alone."""
    assert not {name[0] for name in imports(path)} & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
    safe_loads = 0
    loads = 0
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "numpy.lib.format.read_array", f"line {node.lineno}"
            loads += ast.unparse(node) == "torch.load"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe_loads += "weights_only" in [keyword.arg for keyword in node.keywords]
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            safe = {"allow_pickle": "False", "weights_only": "True"}[node.arg]
            assert ast.unparse(node.value) == safe, f"line {node.value.lineno}"
    assert loads == safe_loads
