"""Which units a store still needs, and what counts as one that is done."""

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from storage_specs.errors import StoreError
from storage_specs.files import Root
from storage_specs.manifest import Key, expected_keys
from storage_specs.schema import Spec
from storage_specs.store import Store
from storage_specs.units import Unit, committed, faults, missing, read_commit
from tests.conftest import Run
from tests.test_store import flip, spec


def couplings_spec(run: Run, draws: int) -> Spec:
    whole = Store(run.couplings["webdataset"]).spec
    assert whole.coupling is not None
    return whole.model_copy(update={"coupling": whole.coupling.model_copy(update={"draws": draws})})


@pytest.mark.parametrize("seed", range(20))
def test_missing_units_and_done_ones_hold_each_file_once(run: Run, seed: int) -> None:
    """Against the obvious: every file of the store, in the unit that holds it."""
    generator, whole = random.Random(seed), couplings_spec(run, 12)
    done = set()
    for block in range(whole.blocks):
        cuts = sorted(generator.sample(range(13), generator.randrange(2, 6)))
        done |= {Unit(block, a, b) for a, b in pairwise(cuts) if generator.random() < 0.5}
    units = [*done, *missing(whole, done)]
    for key in expected_keys(whole):
        assert sum(unit.holds(key) for unit in units) == 1, key
    assert missing(whole, units) == []


def test_a_sample_store_has_one_unit_a_block() -> None:
    assert missing(spec(), [Unit(1, 0, 0)]) == [Unit(0, 0, 0), Unit(2, 0, 0)]
    assert Unit(1, 0, 0).holds(Key("x", 1))


def test_names_survive_the_listing(tmp_path: Path) -> None:
    units = {Unit(0, 0, 8), Unit(1234567, 8, 4096), Unit(3, 0, 0)}
    for unit in units:
        Root(str(tmp_path)).write(unit.commit_file, b"")
    for other in ("spec.json", "driver.json", "000001.json", "x.k000-001.json"):
        Root(str(tmp_path)).write(f"commits/{other}", b"")
    assert committed(Root(str(tmp_path))) == units


def test_draws_do_not_change_the_lineage_and_all_else_does(run: Run) -> None:
    whole = couplings_spec(run, 3)
    assert couplings_spec(run, 4).lineage == whole.lineage
    assert whole.model_copy(update={"rows": whole.rows + 1}).lineage != whole.lineage
    assert whole.coupling is not None
    for change in ({"eta": 0.5}, {"precision": "bf16"}, {"source": "0" * 64}, {"z_dtype": "float32"}):
        other = whole.coupling.model_copy(update=change)
        assert whole.model_copy(update={"coupling": other}).lineage != whole.lineage


@pytest.mark.parametrize("kind", ["x", "z", "noise", "sum_z2", "commit"])
def test_a_flipped_bit_of_any_file_of_a_unit_is_found(run: Run, tmp_path: Path, kind: str) -> None:
    store, unit = Store(run.couplings["webdataset"]), Unit(1, 0, 3)
    root, whole = Root(str(tmp_path)), couplings_spec(run, 3)
    commit = read_commit(store.root, store.spec, unit)
    for path in (*(file.path for file in commit.files), unit.commit_file):
        root.write(path, store.root.read(path, 1 << 30))
    assert faults(root, whole, unit) == []
    paths = {file.column: file.path for file in commit.files} | {"commit": unit.commit_file}
    generator = np.random.default_rng(0)
    data = root.read(paths[kind], 1 << 30)
    for position in generator.integers(0, len(data), 20).tolist():
        root.write(paths[kind], flip(position)(data))
        assert len(faults(root, whole, unit)) == 1, position
    root.delete(paths[kind])
    assert len(faults(root, whole, unit)) == 1


def test_a_commit_of_another_store_is_none_of_ours(run: Run) -> None:
    store = Store(run.couplings["webdataset"])
    other = store.spec.model_copy(update={"rows": store.spec.rows - 1})
    with pytest.raises(StoreError, match="written for another store"):
        read_commit(store.root, other, Unit(0, 0, 3))
