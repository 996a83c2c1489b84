"""What moves a store to another place or layout refuses every file that a reader refuses: it writes no copy of it."""

from pathlib import Path

import pytest

from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.writing.transfer import convert_store, copy_store
from nfm.storage_specs.writing.tuples import export_tuples
from tests.tools.hostile import Case, sound_files, write_case
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
