"""Writers that crash, readers that meet broken stores: one clear error that names the file."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from nfm.storage_specs.format.layouts import LAYOUTS
from nfm.storage_specs.format.manifest import FileKey
from nfm.storage_specs.format.schema import LayoutName, Spec
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream
from nfm.storage_specs.reading.verify import find_faults
from nfm.storage_specs.storage.errors import OutageError, StoreError
from nfm.storage_specs.storage.files import Root, check_relative_path, sha256
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.random_couplings import write_random_couplings
from tests.tools.small_run import Run
from tests.tools.stores import LAYOUT_NAMES, block_of, damage, edit, flip, reseal, sample_spec, tree


def write(url: str, spec: Spec, blocks: list[int]) -> StoreWriter:
    writer = StoreWriter(url, spec)
    writer.initialize()
    for block in blocks:
        writer.write_block(block, block_of(spec, block), None, None)
    return writer


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_bytes_depend_on_neither_order_nor_interruption(tmp_path: Path, layout: LayoutName) -> None:
    first, second = f"{tmp_path}/a", f"{tmp_path}/b"
    write(first, sample_spec(layout), [0, 1, 2]).finalize()
    write(second, sample_spec(layout), [2])
    resumed = StoreWriter(second, sample_spec(layout))
    resumed.initialize()
    assert [unit.block for unit in resumed.list_missing_units()] == [0, 1]
    write(second, sample_spec(layout), [1, 0, 1]).finalize()
    assert tree(first) == tree(second)


def test_nothing_is_a_store_before_it_is_complete(tmp_path: Path) -> None:
    write(str(tmp_path), sample_spec(), [0, 1])
    with pytest.raises(StoreError, match="no dataset.json"):
        Store(str(tmp_path))


def test_another_spec_at_the_same_url_is_refused_with_both_values(tmp_path: Path) -> None:
    write(str(tmp_path), sample_spec(rows=70), [0])
    before = tree(str(tmp_path))
    with pytest.raises(StoreError, match="rows: existing 70, requested 71"):
        StoreWriter(str(tmp_path), sample_spec(rows=71)).initialize()
    assert tree(str(tmp_path)) == before


def test_labels_outside_the_range_are_not_written(tmp_path: Path) -> None:
    writer = write(str(tmp_path), sample_spec(), [])
    columns = block_of(sample_spec(), 0)
    columns["label"] = columns["label"] + 1
    with pytest.raises(StoreError, match="got label 3, expected 0 to 2"):
        writer.write_block(0, columns, None, None)
    assert len(writer.list_missing_units()) == writer.spec.num_blocks


def test_z_that_is_not_finite_is_not_written(run: Run, tmp_path: Path) -> None:
    store = Store(run.couplings["webdataset"])
    writer = StoreWriter(str(tmp_path), store.spec)
    writer.initialize()
    shape = (store.spec.num_draws, store.spec.rows_of(0), *store.spec.shape)
    z, noise = np.ones(shape, np.float32), np.zeros(shape, np.float16)
    base = {"x": store.column("x", 0), "label": store.column("label", 0)}
    for bad in (np.inf, np.nan, 70_000.0):  # the last is finite, but not as float16
        z[1, 7, 0, 3, 3] = bad
        with pytest.raises(FloatingPointError, match="z of image 7, draw 1, .*draw was not written"):
            writer.write_block(0, base, z, noise, store.image_names_of(0))
    written = set(tree(str(tmp_path)))
    assert not any("k001" in path for path in written)
    assert {path for path in written if path.startswith("commits/")} == {"commits/spec.json"}


BROKEN = {
    "truncated file": ("x/000001.tar", lambda data: data[:-600], "truncated"),
    "overlong file": ("x/000001.tar", lambda data: data + b"\0" * 512, "overlong"),
    "empty file": ("x/000001.tar", lambda data: b"", "got 0 bytes"),
    "one bit": ("x/000001.tar", flip(5), "sha256"),
    "manifest": ("versions/0001/manifest.parquet", flip(40), "manifest.parquet.*sha256"),
    "not json": ("dataset.json", lambda data: b"hello", "not a JSON document"),
    "future version": ("dataset.json", edit(schema_version="2.0"), "install nfm 2.x"),
    "huge shape": ("dataset.json", edit(spec__shape=[3, 1 << 20, 1 << 20]), "bytes a row"),
    "negative rows": ("dataset.json", edit(spec__rows=-1), "spec.rows"),
    "more rows than files": ("dataset.json", edit(spec__rows=700), "expected the 22 of"),
    "absurdly many rows": ("dataset.json", edit(spec__rows=1 << 47, spec__block_rows=1), "spec.rows"),
    "very many rows": ("dataset.json", edit(spec__rows=10**12, spec__block_rows=1), "larger blocks make fewer"),
    "label counts of no class": ("dataset.json", edit(totals__label_counts={"99": 1}), "class 99"),
    "another shape": ("dataset.json", edit(spec__shape=[1, 4, 8]), "records"),
    "unknown key": ("dataset.json", edit(spec__secret=1), "secret"),
    "other totals": ("dataset.json", edit(totals__bytes=1), "dataset.json: its totals are not those of the manifest"),
    "other id": ("dataset.json", edit(id="0" * 64), "dataset.json: its id is not that of its spec and files"),
    "other class names": ("dataset.json", edit(spec__class_names=["a", "b", "d"]), "its id is not that of"),
    "a document elsewhere": (
        "dataset.json",
        edit(documents__readme__path="../README.md"),
        "documents.readme: got path",
    ),
    "a document of z": ("dataset.json", edit(documents__sigma_f={"path": "x", "sha256": "0" * 64}), "got documents"),
}


@pytest.mark.parametrize(("path", "change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_store_ends_in_an_error_that_names_it(
    tmp_path: Path, path: str, change: Callable[[bytes], bytes], message: str
) -> None:
    write(str(tmp_path), sample_spec(), [0, 1, 2]).finalize()
    with closing(CouplingStream(str(tmp_path), 70, 0, "samples")) as stream:
        assert next(stream).x.shape == (70, 1, 4, 4)
    damage(tmp_path, path, change)
    with pytest.raises(StoreError, match=message):
        next(CouplingStream(str(tmp_path), 70, 0, "samples"))


STRUCTURE = {
    "member name": ("x/000001.tar", flip(5), "tar headers"),
    "npy header": ("x/000001.tar", flip(512 + 20), "npy headers"),
    "label digit": ("x/000001.tar", lambda data: data.replace(b"00000", b"0000x"), "damaged"),
    "label out of range": ("x/000000.tar", lambda data: data.replace(b"000002\0", b"000003\0"), "got label 3"),
    "padding": ("x/000001.tar", flip(512 + 128 + 16), "padding"),
    "end": ("x/000001.tar", flip(-1), "does not end as a tar"),
}


@pytest.mark.parametrize(("path", "change", "message"), STRUCTURE.values(), ids=STRUCTURE.keys())
def test_the_structure_is_checked_whatever_the_hashes_say(
    tmp_path: Path, path: str, change: Callable[[bytes], bytes], message: str
) -> None:
    write(str(tmp_path), sample_spec(), [0, 1, 2]).finalize()
    store = Store(str(tmp_path))
    data = change((tmp_path / path).read_bytes())
    with pytest.raises(StoreError, match=rf"{path}.*{message}"):
        store.parse_columns(FileKey("x", int(path[-5])), np.frombuffer(data, np.uint8), sha256_checked=True)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_verify_finds_one_flipped_bit_in_any_file(run: Run, tmp_path: Path, layout: LayoutName) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run.couplings[layout], copy)
    assert list(find_faults(Store(str(copy)))) == []
    path = LAYOUTS[layout].file_path("z", 2, 1)
    damage(copy, path, flip(700))
    ((_, fault),) = find_faults(Store(str(copy)))
    assert path in fault
    assert "sha256" in fault


@pytest.mark.parametrize("change", [lambda data: data[:-4], lambda data: data.replace(b"<f4", b"|O8")])
def test_a_sigma_f_that_is_none_is_refused(run: Run, tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    """Also by a store whose hashes agree with it: nothing is unpickled, nothing allocated by its own word. A hash that
    agrees while the id does not is refused before."""
    copy, path = tmp_path / "copy", "versions/0001/sigma_f.npy"
    shutil.copytree(run.couplings["webdataset"], copy)
    damage(copy, path, change)
    with pytest.raises(StoreError, match=r"sigma_f\.npy.*sha256"):
        CouplingStream(str(copy), 8, 0)
    damage(copy, "dataset.json", edit(documents__sigma_f__sha256=sha256((copy / path).read_bytes())))
    with pytest.raises(StoreError, match=r"its id is not that of its spec and files"):
        CouplingStream(str(copy), 8, 0)
    reseal(copy)
    with pytest.raises(StoreError, match=r"sigma_f\.npy: expected an npy file"):
        CouplingStream(str(copy), 8, 0)


def test_verify_reads_what_is_not_in_the_manifest_too(run: Run, tmp_path: Path) -> None:
    """Every document, the copies of those of the newest version, and the metadata of stock readers. What the id covers
    is refused at opening."""
    changes: dict[str, Callable[[bytes], bytes]] = {
        "versions/0001/names.parquet": flip(200),
        "columns.zarr/zarr.json": lambda data: b"{}",
        "columns.zarr/z/zarr.json": lambda data: b"{}",
        "README.md": flip(200),
        "croissant.json": flip(200),
        "versions/0001.json": edit(id="0" * 64),
        "versions/0001/sigma_f.npy": flip(200),
        "versions/0001/z_sums.npy": flip(200),
        "versions/0001/z_class_sums.npy": flip(200),
    }
    for path, change in changes.items():
        copy = tmp_path / path.replace("/", "-")
        shutil.copytree(run.couplings["zarr"], copy)
        damage(copy, path, change)
        faults = list(find_faults(Store(str(copy))))
        assert faults and all(path in fault.message for fault in faults), path


def test_a_damaged_scale_is_found_behind_a_damaged_sigma_f(tmp_path: Path) -> None:
    write_random_couplings(str(tmp_path), "webdataset", (1, 4, 4), 40, draws=1, z_dtype="int8")
    names = ["versions/0001/sigma_f.npy", "z_scale.npy"]
    for name in names:
        damage(tmp_path, name, flip(150))
    faults = list(find_faults(Store(str(tmp_path))))
    assert [fault.file for fault in faults] == names
    assert all(str(fault.file) in fault.message for fault in faults)


def test_storage_that_is_away_is_no_fault_of_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repair would otherwise queue sound blocks."""
    url = "memory://away"
    write_random_couplings(url, "zarr", (1, 4, 4), 40, draws=1)
    original = Root.read
    for away in ("versions/0001/sigma_f.npy", "columns.zarr/z/zarr.json", "columns.zarr/z/c/0/1/0/0/0"):

        def read(self: Root, path: str, max_bytes: int, away: str = away) -> bytes:
            if path == away:
                raise OutageError(f"{path}: tried for 300 s")
            return original(self, path, max_bytes)

        monkeypatch.setattr(Root, "read", read)
        with pytest.raises(OutageError, match=away):
            list(find_faults(Store(url)))
    Root(url).fs.rm("/away", recursive=True)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize(
    ("column", "block", "draw", "message"),
    [
        ("y", 0, -1, "got column 'y' of a store of couplings; expected one of x, label, index, z, noise"),
        ("x", 99, -1, r"got block 99; expected 0 to \d+"),
        ("x", -1, -1, "got block -1"),
        ("x", 0, 0, "got draw 0 of x, which has no draws"),
        ("z", 0, -1, "got draw -1 of z; expected 0 to 2"),
        ("noise", 0, 3, "got draw 3 of noise; expected 0 to 2"),
    ],
)
def test_what_a_store_does_not_have_is_named(
    run: Run, layout: LayoutName, column: str, block: int, draw: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Store(run.couplings[layout]).column(column, block, draw)


def test_samples_have_no_z(run: Run) -> None:
    store = Store(f"{run.samples}/train")
    with pytest.raises(ValueError, match="got column 'z' of a store of samples; expected one of x, label, index"):
        store.z(0, 0)
    with pytest.raises(ValueError, match="which has no σ_f"):
        _ = store.sigma_f
    assert store.z_scale is None
    with pytest.raises(ValueError, match=f"got row {store.spec.rows}; expected 0 to {store.spec.rows - 1}"):
        store.images(np.array([0, store.spec.rows]))


def test_paths_stay_inside_the_store() -> None:
    for path in ("../x", "/etc/passwd", "a/../../b", "a//b", "", "a\\b", "./a", "a\0b"):
        with pytest.raises(StoreError, match="relative path"):
            check_relative_path(path)
    assert check_relative_path("z/k000/000001.tar") == "z/k000/000001.tar"


def test_a_remote_store_is_read_through_a_checked_cache(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setenv("NFM_CACHE", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    fs.put(run.couplings["webdataset"], "/remote", recursive=True)
    remote, local = Store("memory://remote"), Store(run.couplings["webdataset"])
    assert np.array_equal(remote.column("z", 1, 2), local.column("z", 1, 2))
    fs.rm("/remote/z/k002/000001.tar")
    assert np.array_equal(Store("memory://remote").column("z", 1, 2), local.column("z", 1, 2)), "cached by content"
    bad = bytearray(fs.cat_file("/remote/z/k000/000000.tar"))
    bad[700] ^= 1
    fs.pipe_file("/remote/z/k000/000000.tar", bytes(bad))
    with pytest.raises(StoreError, match=r"z/k000/000000\.tar.*sha256"):
        remote.columns(FileKey("z", 0, 0))
    fs.rm("/remote", recursive=True)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Root(str(tmp_path))
    root.write("a/b", b"old")

    def broken(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match=f"No space left on device.*{tmp_path}/a/b"):
        root.write("a/b", b"new")
    assert tree(str(tmp_path)) == {"a/b": b"old"}


@pytest.mark.long
def test_a_program_that_ends_at_a_bad_store_is_not_aborted(tmp_path: Path) -> None:
    """Threads of Arrow, which read Parquet by default, ended every second such program on one core with SIGABRT."""
    write_random_couplings(str(tmp_path), "webdataset", (1, 4, 4), 40, draws=1)
    damage(tmp_path, "dataset.json", edit(id="0" * 64))
    program = (
        "import os, sys, torch\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from nfm.storage_specs.reading.store import Store\n"
        "Store(sys.argv[1])\n"
    )
    for _ in range(8):
        ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
        assert ended.returncode == 1 and "its id is not that" in ended.stderr
