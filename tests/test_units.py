"""Which units a store still needs, and which count as committed."""

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from nfm.storage_specs.format.layouts import LAYOUTS
from nfm.storage_specs.format.manifest import FileKey, expected_keys
from nfm.storage_specs.format.schema import Spec
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.errors import OutageError, StoreError
from nfm.storage_specs.storage.files import Root
from nfm.storage_specs.writing.units import Unit, find_faults, list_committed_units, list_missing_units, read_commit
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.random_couplings import random_coupling_spec
from tests.tools.small_run import Run
from tests.tools.stores import flip, sample_spec, tree


def couplings_spec(run: Run, draws: int) -> Spec:
    spec = Store(run.couplings["webdataset"]).spec
    return spec.model_copy(update={"coupling": spec.nfm.model_copy(update={"draws": draws})})


@pytest.mark.parametrize("seed", range(20))
def test_missing_and_committed_units_contain_each_file_once(run: Run, seed: int) -> None:
    """By the definition: every file of the store is in exactly one unit."""
    generator, spec = random.Random(seed), couplings_spec(run, 12)
    committed = set()
    for block in range(spec.num_blocks):
        cuts = sorted(generator.sample(range(13), generator.randrange(2, 6)))
        committed |= {Unit(block, a, b) for a, b in pairwise(cuts) if generator.random() < 0.5}
    units = [*committed, *list_missing_units(spec, committed)]
    for key in expected_keys(spec, LAYOUTS[spec.layout]):
        assert sum(unit.contains(key) for unit in units) == 1, key
    assert list_missing_units(spec, units) == []


def test_a_sample_store_has_one_unit_a_block() -> None:
    assert list_missing_units(sample_spec(), [Unit(1, 0, 0)]) == [Unit(0, 0, 0), Unit(2, 0, 0)]
    assert Unit(1, 0, 0).contains(FileKey("x", 1))


def test_names_survive_the_listing(tmp_path: Path) -> None:
    spec = random_coupling_spec("webdataset", (1, 1, 1), rows=1000, draws=64, block_rows=1)
    units = [Unit(0, 0, 8), Unit(7, 0, 64), Unit(999, 8, 64)]
    for unit in units:
        Root(str(tmp_path)).write(unit.commit_file, b"")
    for name in ("spec.json", "driver.json", "000001.json", "x.k000-001.json"):
        Root(str(tmp_path)).write(f"commits/{name}", b"")
    for unit in (Unit(1000, 0, 1), Unit(3, 0, 65), Unit(2, 0, 0)):  # of other stores
        Root(str(tmp_path)).write(unit.commit_file, b"")
    assert list_committed_units(Root(str(tmp_path)), spec) == units
    assert list_committed_units(Root(str(tmp_path)), sample_spec(rows=70)) == [Unit(2, 0, 0)]


NO_UNITS = ["000000.k000-99999.json", "0000000.k000-001.json", "000000.k0000-0001.json", "000000.k002-001.json"]
NO_UNITS += ["000000.k001-001.json", "٠٠٠٠٠٠.k000-001.json", "000000.k000-001.json\n", "1000000000000000.k000-001.json"]


@pytest.mark.parametrize("name", NO_UNITS)
def test_a_name_that_no_unit_has_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "commits").mkdir()
    (tmp_path / "commits" / name).touch()
    assert list_committed_units(Root(str(tmp_path)), random_coupling_spec("zarr", (1, 1, 1), 9, 9)) == []


def test_overlapping_units_leave_the_gaps_between_them(run: Run) -> None:
    spec = couplings_spec(run, 12)
    committed = {Unit(0, 0, 4), Unit(0, 2, 5), Unit(0, 3, 4), Unit(0, 7, 9), Unit(0, 11, 40), Unit(0, 50, 60)}
    missing = [unit for unit in list_missing_units(spec, committed) if unit.block == 0]
    assert missing == [Unit(0, 5, 7), Unit(0, 9, 11)]


def test_draws_do_not_change_the_lineage_and_all_else_does(run: Run) -> None:
    spec = couplings_spec(run, 3)
    assert couplings_spec(run, 4).lineage == spec.lineage
    assert spec.model_copy(update={"rows": spec.rows + 1}).lineage != spec.lineage
    for change in ({"eta": 0.5}, {"precision": "bf16"}, {"source": "0" * 64}, {"z_dtype": "float32"}):
        other = spec.nfm.model_copy(update=change)
        assert spec.model_copy(update={"coupling": other}).lineage != spec.lineage


@pytest.mark.parametrize("kind", ["x", "z", "noise", "z_sums", "z_class_sums", "names", "commit"])
def test_a_flipped_bit_of_any_file_of_a_unit_is_found(run: Run, tmp_path: Path, kind: str) -> None:
    store, unit = Store(run.couplings["webdataset"]), Unit(1, 0, 3)
    root, spec = Root(str(tmp_path)), couplings_spec(run, 3)
    commit = read_commit(store.root, store.spec, unit)
    for path in (*(file.path for file in commit.files), unit.commit_file):
        root.write(path, store.root.read(path, 1 << 30))
    assert find_faults(root, spec, unit) == []
    paths = {file.column: file.path for file in commit.files} | {"commit": unit.commit_file}
    generator = np.random.default_rng(0)
    data = root.read(paths[kind], 1 << 30)
    for position in generator.integers(0, len(data), 20).tolist():
        root.write(paths[kind], flip(position)(data))
        assert len(find_faults(root, spec, unit)) == 1, position
    root.delete(paths[kind])
    assert len(find_faults(root, spec, unit)) == 1


@pytest.mark.parametrize("folder", ["commits/", "z/"])
def test_storage_that_is_away_is_no_damage(run: Run, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """Otherwise an outage would delete a commit record, and its unit would be encoded again."""
    store = Store(run.couplings["webdataset"])
    original = store.root.read

    def read(path: str, limit: int) -> bytes:
        if path.startswith(folder):
            raise OutageError(f"{path}: tried for 300 s")
        return original(path, limit)

    monkeypatch.setattr(store.root, "read", read)
    with pytest.raises(OutageError):
        find_faults(store.root, store.spec, Unit(0, 0, 3))


def test_units_that_overlap_give_the_same_store(run: Run, tmp_path: Path) -> None:
    """Two drivers that started at the same time, with different draws, leave such units."""
    for path, data in tree(run.couplings["webdataset"]).items():
        if path != "dataset.json" and not path.startswith("versions/"):
            Root(str(tmp_path)).write(path, data)
    source = Store(run.couplings["webdataset"])
    writer = StoreWriter(str(tmp_path), source.spec)
    writing = writer.unit_writer(Unit(1, 1, 3), source.column("label", 1))
    writing.write_base({"x": source.column("x", 1)}, source.image_names_of(1))
    for draw in (1, 2):
        error = source.files[FileKey("z", 1, draw)].squared_error
        assert error is not None
        z, noise = (np.ascontiguousarray(source.column(name, 1, draw)) for name in ("z", "noise"))
        writing.write_stored_draw(draw, z, noise, error)
    writing.commit()
    assert writer.finalize() == source.dataset
    expected = tree(source.url)
    versions = {path: data for path, data in tree(str(tmp_path)).items() if path.startswith("versions/")}
    assert versions == {path: data for path, data in expected.items() if path.startswith("versions/")}


def test_a_commit_of_another_store_is_none_of_ours(run: Run) -> None:
    store = Store(run.couplings["webdataset"])
    other = store.spec.model_copy(update={"rows": store.spec.rows - 1})
    with pytest.raises(StoreError, match="written for another store"):
        read_commit(store.root, other, Unit(0, 0, 3))


def test_a_spec_that_was_changed_in_a_copy_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    spec = sample_spec().model_copy(update={"rows": 10_000_000, "block_rows": 1})
    with pytest.raises(StoreError, match=rf"^{tmp_path}/store: .* larger blocks make fewer"):
        StoreWriter(f"{tmp_path}/store", spec)
