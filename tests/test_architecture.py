"""Data flows one way, and a newcomer finds a line's home from the folder names: the imports are held to that."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "storage_specs": set(),
    "models": set(),
    "stages": {"storage_specs", "models"},
    "pipeline": {"storage_specs", "models", "stages"},
}
VERBS = {"prepare", "train_teacher", "encode", "train_student", "sample", "evaluate"}
FILES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).glob("**/*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of everything the file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    heads = {name.split(".")[0] for name in imports(path)}
    assert not (heads & MAY_IMPORT.keys()) - MAY_IMPORT[folder] - {folder}
    if folder != "pipeline":
        assert not heads & {"ray", "click"}
    if folder == "models":
        assert not heads & {"fsspec", "zarr", "pyarrow", "pathlib", "os"}, "models do no I/O"
    if folder == "stages" and path.stem in VERBS:
        others = {name.split(".")[1] for name in imports(path) if name.startswith("stages.")}
        assert not others & VERBS, "stages meet only through stores and checkpoints"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "import pickle" not in text
    assert " torch.load" not in text
    assert "allow_pickle=True" not in text
