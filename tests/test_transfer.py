"""Whole stores moved about: nothing is lost, nothing half-copied is trusted."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from nfm.pipeline.encode_job import encode_couplings
from nfm.stages.reencode import verify_by_reencoding
from nfm.storage_specs.format.image_names import ImageName
from nfm.storage_specs.format.layouts import Columns
from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.verify import find_faults
from nfm.storage_specs.storage.documents import canonical_json
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import Root, sha256
from nfm.storage_specs.writing.repair import repair_store
from nfm.storage_specs.writing.transfer import convert_store, copy_store
from nfm.storage_specs.writing.tuples import export_tuples
from nfm.storage_specs.writing.units import UnitWriter
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.random_couplings import write_random_couplings
from tests.tools.small_run import Run, encode_in_process
from tests.tools.stores import LAYOUT_NAMES, content, damage, edit, flip, ignore_progress, tree

OTHER: dict[LayoutName, LayoutName] = {"webdataset": "zarr", "zarr": "webdataset"}


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_converting_and_converting_back_gives_the_same_bytes(run: Run, tmp_path: Path, layout: LayoutName) -> None:
    converted, back = f"{tmp_path}/converted", f"{tmp_path}/back"
    convert_store(Store(run.couplings[layout]), converted, OTHER[layout], ignore_progress, None)
    assert list(find_faults(Store(converted))) == []
    assert Store(converted).dataset.id == Store(run.couplings[OTHER[layout]]).dataset.id, "as if encoded in that layout"
    convert_store(Store(converted), back, layout, ignore_progress, None)
    assert content(back) == content(run.couplings[layout])
    assert Store(back).cost == Store(run.couplings[layout]).cost


def test_a_conversion_continues_where_it_stopped(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, written = str(tmp_path), []
    original = UnitWriter.write_base

    def failing(self: UnitWriter, columns: Columns, names: list[ImageName] | None) -> None:
        written.append(self.unit.block)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        original(self, columns, names)

    monkeypatch.setattr(UnitWriter, "write_base", failing)
    with pytest.raises(OSError, match="No space"):
        convert_store(Store(run.couplings["webdataset"]), out, "zarr", ignore_progress, None)
    convert_store(Store(run.couplings["webdataset"]), out, "zarr", ignore_progress, None)
    assert written == [0, 1, 2, *range(2, Store(out).spec.num_blocks)]
    assert Store(out).dataset.id == Store(run.couplings["zarr"]).dataset.id


def test_a_damaged_source_is_not_converted(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(run.couplings["webdataset"], source)
    damage(source, "z/k001/000002.tar", flip(700))
    with pytest.raises(StoreError, match=r"z/k001/000002\.tar.*sha256"):
        convert_store(Store(str(source)), f"{tmp_path}/out", "zarr", ignore_progress, None)


def test_tuples_hold_all_of_a_pair_in_one_sample(run: Run, tmp_path: Path) -> None:
    store = Store(run.couplings["zarr"])
    export_tuples(store, str(tmp_path), ignore_progress, None)
    for block, draw in ((0, 0), (3, 2)):
        samples = list(wds.WebDataset(f"{tmp_path}/k{draw:03d}/{block:06d}.tar", shardshuffle=False).decode())
        assert len(samples) == store.spec.rows_of(block)
        for i, sample in enumerate(samples):
            assert sample["__key__"] == f"{store.spec.indices(block)[i]:012d}_k{draw:03d}"
            assert np.array_equal(sample["x.npy"], store.column("x", block)[i])
            assert np.array_equal(sample["z.npy"], store.column("z", block, draw)[i])
            assert np.array_equal(sample["noise.npy"], store.column("noise", block, draw)[i])
            assert sample["cls"] == store.column("label", block)[i]
    readme = (tmp_path / "README.md").read_text()
    assert "z = f(x + η·ε′, label)" in readme and "stored" not in readme, "what z means, not how the store holds it"
    before = tree(str(tmp_path))
    (tmp_path / "k001" / "000001.tar").unlink()
    export_tuples(store, str(tmp_path), ignore_progress, None)
    assert tree(str(tmp_path)) == before
    with tarfile.open(tmp_path / "k001" / "000001.tar") as tar:
        assert len(tar.getmembers()) == 4 * store.spec.rows_of(1)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_a_copy_is_the_same_bytes_and_continues(run: Run, tmp_path: Path, layout: LayoutName) -> None:
    store, out = Store(run.couplings[layout]), str(tmp_path)
    assert copy_store(store, out, ignore_progress, None) == len(store.files)
    assert tree(out) == tree(store.url)
    files = list(store.files.values())
    (tmp_path / "dataset.json").unlink()
    shutil.rmtree(tmp_path / "commits")
    (tmp_path / "copy.json").write_bytes(canonical_json({"of": sha256(store.document)}))
    (tmp_path / files[1].path).unlink()
    damage(tmp_path, files[4].path, lambda data: data[:-1])
    damage(tmp_path, files[6].path, flip(70))  # of the right size: found at the end
    assert copy_store(store, out, ignore_progress, None) == 3
    assert tree(out) == tree(store.url)


def test_a_copy_of_a_conversion_says_what_it_was_converted_from(run: Run, tmp_path: Path) -> None:
    converted, copy = f"{tmp_path}/converted", f"{tmp_path}/copy"
    convert_store(Store(run.couplings["zarr"]), converted, "webdataset", ignore_progress, None)
    copy_store(Store(converted), copy, ignore_progress, None)
    assert tree(copy) == tree(converted)
    assert b"converted_from" in tree(copy)["commits/spec.json"]


@pytest.mark.parametrize("name", ["photo.jpg", "commits/notes.txt", ".", "z_scale.npy.txt"])
def test_nothing_is_written_into_a_folder_of_other_things(run: Run, tmp_path: Path, name: str) -> None:
    """Also not into a store, whose readers would find more files than they should."""
    store = Store(run.couplings["webdataset"])
    out = tmp_path / "out"
    if name == ".":  # inside a store
        shutil.copytree(store.url, out)
        out = out / "zarr"
        message = "lies inside"
    else:
        (out / name).parent.mkdir(parents=True)
        (out / name).write_bytes(b"mine")
        (out / ".hidden").touch()
        message = f"holds {name}; expected an empty folder"
    before = tree(str(tmp_path))
    for write in (
        lambda: copy_store(store, str(out), ignore_progress, None),
        lambda: convert_store(store, str(out), "zarr", ignore_progress, None),
        lambda: export_tuples(store, str(out), ignore_progress, None),
        lambda: StoreWriter(str(out), store.spec).initialize(),
    ):
        with pytest.raises(StoreError, match=message):
            write()
    assert tree(str(tmp_path)) == before
    if name == "photo.jpg":
        assert {path.name for path in out.iterdir()} == {"photo.jpg", ".hidden"}


def test_a_store_is_not_converted_onto_itself(run: Run) -> None:
    store = Store(run.couplings["webdataset"])
    with pytest.raises(StoreError, match="got the store itself as output"):
        convert_store(store, f"{store.url}/", "zarr", ignore_progress, None)


def test_the_progress_of_a_copy_counts_files_that_exist(run: Run, tmp_path: Path) -> None:
    """Every file twice: once it is written or exists, and once it was read back."""
    store, out = Store(run.couplings["zarr"]), str(tmp_path)
    for _ in range(3):
        steps: list[int] = []
        copy_store(store, out, steps.append, None)
        assert sum(steps) == 2 * store.dataset.totals.bytes
        files = list(store.files.values())
        (tmp_path / files[1].path).unlink()
        damage(tmp_path, files[6].path, flip(70))  # written a second time, and counted once


def test_a_copy_over_another_store_is_refused(run: Run, tmp_path: Path) -> None:
    copy_store(Store(run.couplings["zarr"]), str(tmp_path), ignore_progress, None)
    with pytest.raises(StoreError, match="holds store"):
        copy_store(Store(run.couplings["webdataset"]), str(tmp_path), ignore_progress, None)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(StoreError, match="holds a store that is being written"):
        copy_store(Store(run.couplings["webdataset"]), str(tmp_path), ignore_progress, None)


def test_an_interrupted_copy_is_never_called_complete(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any kind of write: no commit record names a file that was not read back, a copy of another store to the
    same URL is refused, and the same call continues."""
    store, original = Store(run.couplings["webdataset"]), Root.write
    last_commit = max(path for path in tree(store.url) if path.startswith("commits/0"))
    last_file = list(store.files.values())[-1].path
    versions = ("versions/0001/manifest.parquet", "versions/0001.json", "README.md", "dataset.json")
    for number, stop_at in enumerate((last_file, "commits/spec.json", last_commit, *versions)):
        out = tmp_path / str(number)

        def failing(self: Root, path: str, data: bytes, stop_at: str = stop_at) -> None:
            if path == stop_at:
                raise OSError(28, "No space left on device")
            original(self, path, data)

        with monkeypatch.context() as patch:
            patch.setattr(Root, "write", failing)
            with pytest.raises(OSError, match="No space"):
                copy_store(store, str(out), ignore_progress, None)
        assert not (out / "dataset.json").exists()
        assert (out / "commits").exists() <= (stop_at not in (last_file, "commits/spec.json"))
        with pytest.raises(StoreError, match="holds an unfinished copy of a store"):
            copy_store(Store(run.couplings["zarr"]), str(out), ignore_progress, None)
        with pytest.raises(StoreError, match="holds (an unfinished copy of a store|a store that is being written)"):
            export_tuples(store, str(out), ignore_progress, None)
        copy_store(store, str(out), ignore_progress, None)
        assert tree(str(out)) == tree(store.url)


@pytest.mark.parametrize("name", ["sigma_f.npy", "z_sums.npy", "z_class_sums.npy", "README.md", "croissant.json"])
def test_damaged_documents_are_not_copied(run: Run, tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(run.couplings["webdataset"], source)
    damage(source, f"versions/0001/{name}", flip(300))
    with pytest.raises(StoreError, match=rf"versions/0001/{name}.*nothing was copied"):
        copy_store(Store(str(source)), f"{tmp_path}/out", ignore_progress, None)
    assert not (tmp_path / "out").exists()


def test_a_document_that_differs_from_its_version_is_not_copied(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(run.couplings["webdataset"], source)
    damage(source, "dataset.json", edit(attribution__notes="not what was published"))
    with pytest.raises(StoreError, match=r"versions/0001\.json: .*nothing was copied"):
        copy_store(Store(str(source)), f"{tmp_path}/out", ignore_progress, None)
    assert not (tmp_path / "out").exists()


def test_a_damaged_source_is_not_copied(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(run.couplings["webdataset"], source)
    damage(source, "z/k001/000002.tar", flip(700))
    with pytest.raises(StoreError, match=r"z/k001/000002\.tar.*repair it first"):
        copy_store(Store(str(source)), f"{tmp_path}/out", ignore_progress, None)
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize("layout", ["webdataset", pytest.param("zarr", marks=pytest.mark.long)])
def test_repair_queues_the_bad_blocks_and_the_job_writes_them_again(
    ray_cluster: None, run: Run, tmp_path: Path, layout: LayoutName
) -> None:
    shutil.copytree(run.couplings[layout], tmp_path, dirs_exist_ok=True)
    store = Store(str(tmp_path))
    before = content(store.url)
    files = {(key.column, key.block, key.draw): record.path for key, record in store.files.items()}
    damage(tmp_path, files["z", 2, 1], flip(700))
    (tmp_path / files["x", 4, -1]).unlink()
    faults, blocks, is_complete = repair_store(store.url, ignore_progress)
    assert (blocks, is_complete) == ([2, 4], False)
    assert {path for path in (files["z", 2, 1], files["x", 4, -1]) if any(path in fault for fault in faults)} == {
        files["z", 2, 1],
        files["x", 4, -1],
    }
    with pytest.raises(StoreError, match="no dataset.json"):
        Store(str(tmp_path))
    config = run.config.encode.model_copy(update={"layout": layout, "workers": 1})
    encode_couplings(config, f"{run.samples}/train", run.teacher, str(tmp_path))
    assert content(store.url) == before
    assert Store(str(tmp_path)).dataset.id == Store(run.couplings[layout]).dataset.id
    assert repair_store(str(tmp_path), ignore_progress) == ([], [], True)


def test_repair_of_a_broken_manifest_needs_no_block(run: Run, tmp_path: Path) -> None:
    """The commit records have all that it held, so version 1 is written again as it was."""
    shutil.copytree(run.couplings["zarr"], tmp_path, dirs_exist_ok=True)
    sound = Store(run.couplings["zarr"])
    damage(tmp_path, "versions/0001/manifest.parquet", flip(40))
    damage(tmp_path, "columns.zarr/z/zarr.json", lambda data: b"{}")
    faults, blocks, is_complete = repair_store(str(tmp_path), ignore_progress)
    assert len(faults) == 1 and "manifest.parquet" in faults[0] and (blocks, is_complete) == ([], True)
    repaired = Store(str(tmp_path))
    assert list(find_faults(repaired)) == []
    assert repaired.document == sound.document
    assert content(str(tmp_path)) == content(run.couplings["zarr"])


def test_repair_reads_every_file_when_documents_are_damaged(run: Run, tmp_path: Path) -> None:
    """Nothing that a damaged document says is used: the files are compared with the commit records."""
    shutil.copytree(run.couplings["webdataset"], tmp_path, dirs_exist_ok=True)
    before = content(str(tmp_path))
    damage(tmp_path, "dataset.json", lambda data: data[:100])
    damage(tmp_path, "z/k001/000002.tar", flip(700))
    damage(tmp_path, "noise/k002/000003.tar", flip(70))
    (tmp_path / "sums/000004.k000-003.npy").unlink()
    faults, blocks, is_complete = repair_store(str(tmp_path), ignore_progress)
    assert blocks == [2, 3, 4] and not is_complete and len(faults) == 4
    for unit in StoreWriter(str(tmp_path), Store(run.couplings["webdataset"]).spec).list_missing_units():
        assert unit.block in blocks
    encode_in_process(run.config, f"{run.samples}/train", run.teacher, str(tmp_path), "webdataset")
    assert content(str(tmp_path)) == before


def test_repair_without_commit_records_says_what_to_do(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.couplings["zarr"], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "commits")
    damage(tmp_path, "versions/0001/manifest.parquet", flip(40))
    with pytest.raises(StoreError, match="copy it again from its source"):
        repair_store(str(tmp_path), ignore_progress)
    assert (tmp_path / "dataset.json").exists()


def test_repair_without_a_sound_scale_says_what_to_do(tmp_path: Path) -> None:
    """Also behind another fault: dataset.json stays, as no command could write it again."""
    write_random_couplings(str(tmp_path), "webdataset", (1, 4, 4), 40, draws=1, z_dtype="int8")
    for name in ("versions/0001/sigma_f.npy", "z_scale.npy"):
        damage(tmp_path, name, flip(150))
    with pytest.raises(StoreError, match=r"z_scale\.npy: its sha256 .* cannot be repaired; copy it again"):
        repair_store(str(tmp_path), ignore_progress)
    assert (tmp_path / "dataset.json").exists()


def test_encoding_again_finds_z_that_is_not_the_teachers(run: Run, tmp_path: Path) -> None:
    store = Store(run.couplings["zarr"])
    assert verify_by_reencoding(store, run.teacher, 40, seed=0).largest_difference < 5e-3
    writer = StoreWriter(str(tmp_path), store.spec)
    writer.initialize()
    for block in range(store.spec.num_blocks):
        z = np.stack([store.z(block, draw) for draw in range(store.spec.num_draws)])
        noise = np.stack([store.column("noise", block, draw) for draw in range(store.spec.num_draws)])
        base = {"x": store.column("x", block), "label": store.column("label", block)}
        names = store.image_names_of(block)
        writer.write_block(block, base, z[::-1] if block == 1 else z, noise, names)  # the draws of a block mixed up
    writer.finalize()
    mixed_up = Store(str(tmp_path))
    assert list(find_faults(mixed_up)) == [], "only the teacher can tell"
    with pytest.raises(StoreError, match="is not what its spec says"):
        verify_by_reencoding(mixed_up, run.teacher, store.spec.rows * store.spec.num_draws, seed=0)
