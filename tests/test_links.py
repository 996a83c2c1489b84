"""A link inside a store is not followed, whatever it leads to; a store that is itself behind a link is one."""

import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from nfm.storage_specs.format.names import COMMITS_FOLDER, LEASE_FILE
from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream
from nfm.storage_specs.reading.verify import find_faults
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import Root, split_url
from nfm.storage_specs.storage.local import MAX_DEPTH, open_folder
from nfm.storage_specs.writing.transfer import copy_store
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.small_run import Run
from tests.tools.stores import ignore_progress, tree

READ_ALWAYS = ["dataset.json", "versions", "versions/0001", "versions/0001/manifest.parquet"]
READ_BY_VERIFY = ["README.md", "croissant.json", "versions/0001.json", "versions/0001/z_sums.npy", "cost.json"]
COLUMNS = {
    "webdataset": ["z", "z/k001", "x/000000.tar"],
    "zarr": ["columns.zarr", "columns.zarr/z/c", "columns.zarr/z/zarr.json"],
}


@pytest.fixture
def store(run: Run, tmp_path: Path) -> Path:
    """A copy of a sound store, in a folder of its own."""
    return copy_of(run, "webdataset", tmp_path)


def copy_of(run: Run, layout: LayoutName, folder: Path) -> Path:
    return Path(shutil.copytree(run.couplings[layout], folder / "inside" / "store"))


def replace_by_link(path: Path, outside: Path) -> Path:
    """Move a file or folder to `outside` and leave a link to it. Returns where it is now."""
    outside.mkdir(exist_ok=True)
    target = outside / path.name
    path.rename(target)
    path.symlink_to(target)
    return target


def use_all(url: str, target: Path) -> None:
    """Everything that reads a store."""
    store = Store(url)
    for fault in find_faults(store):
        raise StoreError(fault.message)
    copy_store(store, str(target), ignore_progress, None)


@pytest.mark.parametrize("layout", ["webdataset", "zarr"])
def test_no_file_and_no_folder_is_read_through_a_link(run: Run, layout: LayoutName, tmp_path: Path) -> None:
    """Also where it leads to what the store needs."""
    for number, path in enumerate([*READ_ALWAYS, *READ_BY_VERIFY, *COLUMNS[layout]]):
        folder = tmp_path / str(number)
        store = copy_of(run, layout, folder)
        moved = replace_by_link(store / path, folder / "outside")
        before = tree(str(folder / "outside"))
        if path == "cost.json":
            with pytest.raises(StoreError, match=f"{moved.name} is a link"):
                _ = Store(str(store)).cost
            continue
        with pytest.raises(StoreError, match=f"{moved.name} is a link, and no link below .* is followed"):
            use_all(str(store), folder / "copy")
        assert tree(str(folder / "outside")) == before


@pytest.mark.parametrize("path", ["x", "z/k000/000001.tar"])
def test_training_reads_no_column_through_a_link(store: Path, tmp_path: Path, path: str) -> None:
    replace_by_link(store / path, tmp_path / "outside")
    with pytest.raises(StoreError, match="is a link"):
        for _ in zip(range(20), CouplingStream(str(store), 40, seed=0), strict=False):
            pass


def test_a_secret_that_a_card_leads_to_is_not_published(store: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("PRIVATE KEY")
    for name in ("README.md", "croissant.json"):
        (store / name).unlink()
        (store / name).symlink_to("../../key")
    with pytest.raises(StoreError, match="README.md is a link"):
        use_all(str(store), tmp_path / "copy")
    assert not any(b"PRIVATE" in data for data in tree(str(tmp_path / "copy")).values())


def test_nothing_is_deleted_behind_a_link(run: Run, store: Path, tmp_path: Path) -> None:
    other = copy_of(run, "webdataset", tmp_path / "other")
    (other / "commits" / f"file.{'0' * 32}.tmp").write_bytes(b"")
    before = tree(str(other))
    shutil.rmtree(store / "commits")
    (store / "commits").symlink_to(other / "commits")
    root = Root(str(store))
    for delete in (
        lambda: root.delete(f"{COMMITS_FOLDER}/spec.json"),
        lambda: root.list_names(COMMITS_FOLDER),
        lambda: root.exists(LEASE_FILE),
        lambda: StoreWriter(str(store), Store(str(store)).spec).read_back(),
    ):
        with pytest.raises(StoreError, match="commits is a link"):
            delete()
    root.delete_temporary_files(keep=LEASE_FILE)
    assert tree(str(other)) == before


def test_nothing_is_written_behind_a_link(store: Path, tmp_path: Path) -> None:
    moved = replace_by_link(store / "z", tmp_path / "outside")
    before = tree(str(moved))
    root = Root(str(store))
    for path in ("z/k000/000000.tar", "z/k009/000000.tar", "z/file"):
        with pytest.raises(StoreError, match="z is a link"):
            root.write(path, b"new")
    assert tree(str(moved)) == before
    (store / "README.md").unlink()
    (store / "README.md").symlink_to(moved / "k000" / "000000.tar")
    root.write("README.md", b"new")
    assert (store / "README.md").read_bytes() == b"new" and not (store / "README.md").is_symlink()
    assert tree(str(moved)) == before, "the link was replaced, and not what it led to"
    assert not any(path.startswith("z/") for path in root.list_file_sizes())


def test_a_write_changes_no_other_name_of_the_same_file(store: Path, tmp_path: Path) -> None:
    """A hard link is a file like others: it may be read, and it is never written in place."""
    os.link(store / "README.md", tmp_path / "other-name")
    before = (tmp_path / "other-name").read_bytes()
    assert not list(find_faults(Store(str(store))))
    Root(str(store)).write("README.md", b"new")
    assert (tmp_path / "other-name").read_bytes() == before


def test_a_store_behind_a_link_is_one(store: Path, tmp_path: Path) -> None:
    """What the user names is the user's choice, and so are the folders above it."""
    link = tmp_path / "link"
    link.symlink_to(store)
    use_all(str(link), tmp_path / "copy")
    use_all(f"{tmp_path}/inside/../link", tmp_path / "copy")
    root = Root(str(link))
    assert root.list_file_sizes().keys() == tree(str(store)).keys()
    root.write("new/file", b"new")
    assert (store / "new" / "file").read_bytes() == b"new"
    stream = CouplingStream(str(link), 8, seed=0)
    assert np.isfinite(next(stream).z.numpy()).all()
    stream.close()


def test_a_file_behind_a_link_that_the_user_names_is_read_and_written(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "model").write_bytes(b"old")
    (tmp_path / "latest").symlink_to("real/model")
    root, name = split_url(str(tmp_path / "latest"))
    assert root.read(name, 10) == b"old"
    root.write(name, b"new")
    assert (tmp_path / "latest").is_symlink() and (tmp_path / "real" / "model").read_bytes() == b"new"


def test_a_snapshot_of_the_hugging_face_client_is_refused_with_what_to_do(store: Path, tmp_path: Path) -> None:
    """Each of its files is a link into the folder `blobs` of its cache."""
    snapshot = tmp_path / "hub" / "datasets--lab--couplings" / "snapshots" / "abc"
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(tree(str(store)))):
        (blobs / f"{number:064d}").write_bytes((store / path).read_bytes())
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).symlink_to(os.path.relpath(blobs / f"{number:064d}", (snapshot / path).parent))
    with pytest.raises(StoreError, match=r"dataset.json is a link.*download the store with --local-dir"):
        Store(str(snapshot))


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path.name)],
    ids=["a pipe", "a folder", "a link to a device", "a loop"],
)
def test_what_is_no_file_is_refused_at_once(store: Path, make: Callable[[Path], object]) -> None:
    (store / "dataset.json").unlink()
    make(store / "dataset.json")
    with pytest.raises(StoreError, match="dataset.json"):
        Store(str(store))


def test_a_folder_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    """It takes no recursion, and no descriptor of each level."""
    url = tmp_path / "store"
    Root(str(url)).write("/".join("d" * MAX_DEPTH) + "/file", b"data")
    assert list(Root(str(url)).list_file_sizes().values()) == [4]
    with open_folder(str(url)) as top:
        descriptor = os.dup(top)
    for _ in range(1500):  # its path is longer than a system call takes
        with suppress(FileExistsError):
            os.mkdir("d", dir_fd=descriptor)
        child = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = child
    os.close(descriptor)
    with pytest.raises(StoreError, match=f"nested more than {MAX_DEPTH} deep .*, which no store has; move them away"):
        Root(str(url)).list_file_sizes()
    subprocess.run(["rm", "-r", url], check=True)  # pytest would do it by recursion
