"""What moves a store to another place or layout refuses every file that a reader refuses: it writes no copy of it."""

import io
from pathlib import Path

import numpy as np
import pytest

from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.npy import npy_bytes
from nfm.storage_specs.writing.transfer import convert_store, copy_store
from nfm.storage_specs.writing.tuples import export_tuples
from tests.tools.hostile import SIGMA_F, SUMS, Case, sealed, sound_files, write_case
from tests.tools.stores import LAYOUT_NAMES, flip, ignore_progress

OTHER: dict[LayoutName, LayoutName] = {"webdataset": "zarr", "zarr": "webdataset"}


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_a_damaged_file_of_any_column_is_not_moved(tmp_path: Path, layout: LayoutName) -> None:
    """Also one that nothing written depends on, as that of the indices in the Zarr layout."""
    sound, sound_root = sound_files(layout), tmp_path / "sound"
    write_case(Case("sound", "indifferent", "", {}, layout), sound_root)
    files = [record for key, record in Store(str(sound_root)).files.items() if key.block == 2 and key.draw < 1]
    assert len(files) == (3 if layout == "webdataset" else 5)
    for number, record in enumerate(files):
        root, out = tmp_path / f"store{number}", tmp_path / f"out{number}"
        changes = {record.path: flip(number)(sound[record.path])}
        write_case(Case(record.path, "refuse", "", changes, layout), root)
        store = Store(str(root))
        with pytest.raises(StoreError, match=record.path):
            convert_store(store, f"{out}-converted", OTHER[layout], ignore_progress, None)
        with pytest.raises(StoreError, match=record.path):
            copy_store(store, f"{out}-copy", ignore_progress, None)
        with pytest.raises(StoreError, match=record.path):
            export_tuples(store, f"{out}-tuples", ignore_progress, None)
        assert not list(tmp_path.glob("out*/dataset.json")) and not list(tmp_path.glob("out*/README.md"))


@pytest.mark.parametrize("name", [SIGMA_F, *SUMS])
def test_tuples_are_not_exported_with_a_sigma_f_that_is_not_that_of_z(tmp_path: Path, name: str) -> None:
    """All documents agree with it, and their id: only z says something else."""
    values = np.load(io.BytesIO(sound_files("zarr")[name]))
    write_case(Case("", "refuse", "", sealed("zarr", {name: npy_bytes(2 * values)})), tmp_path / "store")
    with pytest.raises(StoreError, match=rf"{name}: .*; the store is not what it says; the export was not completed"):
        export_tuples(Store(f"{tmp_path}/store"), f"{tmp_path}/out", ignore_progress, None)
    assert not (tmp_path / "out/README.md").exists()
