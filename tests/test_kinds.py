"""Every kind of store that the schema holds: what goes in comes out, in every reader, and after every way of moving."""

import io
import math
import shutil
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from nfm.storage_specs.format.schema import LayoutName, Spec
from nfm.storage_specs.format.webdataset import WebDatasetLayout
from nfm.storage_specs.format.zarr_layout import ZarrLayout
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream
from nfm.storage_specs.reading.verify import describe_weak_promises, find_faults
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.writing.repair import repair_store
from nfm.storage_specs.writing.transfer import convert_store, copy_store
from nfm.storage_specs.writing.tuples import export_tuples
from tests.tools.kind_checks import (
    WrittenKinds,
    assert_columns_are,
    assert_holds,
    assert_readers_of_webdataset_give,
    assert_same,
    compare_streams,
    every_kind,
    expected_columns,
    some_kinds,
)
from tests.tools.kinds import (
    KINDS,
    all_kinds,
    read_z,
    stored_x,
)
from tests.tools.stock_readers import read_by_zarr
from tests.tools.stores import LAYOUT_NAMES, content, damage, flip, ignore_progress, tree


@every_kind
def test_what_goes_in_comes_out(write: WrittenKinds, name: str, layout: LayoutName) -> None:
    store, kind = Store(write(name, layout)), KINDS[name]
    assert store.spec == kind.spec(layout)
    assert_holds(store, kind.values())


@every_kind
def test_sums_are_those_of_the_stored_z(write: WrittenKinds, name: str, layout: LayoutName) -> None:
    """Against sums without rounding (math.fsum)."""
    store, values = Store(write(name, layout)), KINDS[name].values()
    spec, documents = store.spec, store.dataset.documents
    if values.z is None:
        assert store.z_sums is None and documents.sigma_f is None and documents.z_sums is None
        with pytest.raises(ValueError, match="samples, which has no σ_f"):
            _ = store.sigma_f
        return
    assert documents.sigma_f is not None and documents.z_sums is not None and store.z_sums is not None
    z = read_z(spec, values).astype(np.float64)
    powers = np.stack([z, z**2, z**3, z**4])  # (4, K, N, C, H, W)
    flat = np.moveaxis(powers, (1, 2), (-2, -1)).reshape(4 * spec.dim, -1)
    expected = np.array([math.fsum(row) for row in flat]).reshape(4, *spec.shape)
    scale = np.array([math.fsum(np.abs(row)) for row in flat]).reshape(4, *spec.shape)
    by_dimension = np.load(f"{store.url}/{documents.z_sums.path}", allow_pickle=False)
    assert by_dimension.dtype == np.float64
    assert (np.abs(by_dimension - expected) <= 1e-14 * scale).all()
    assert_same(store.z_sums.by_dimension, by_dimension)
    sigma_f = np.load(f"{store.url}/{documents.sigma_f.path}", allow_pickle=False)
    assert_same(store.sigma_f, sigma_f)
    np.testing.assert_allclose(sigma_f, np.sqrt(expected[1] / (spec.rows * spec.num_draws)), rtol=1e-7)
    if not spec.has_labels:
        assert documents.z_class_sums is None and store.z_sums.by_class.shape == (0, 4)
        return
    assert documents.z_class_sums is not None
    by_class = np.load(f"{store.url}/{documents.z_class_sums.path}", allow_pickle=False)
    assert by_class.shape == (spec.num_classes, 4) and by_class.dtype == np.float64
    assert_same(store.z_sums.by_class, by_class)
    for label in range(spec.num_classes):
        for power, sum_of_class in enumerate(by_class[label]):
            of_class = powers[power][:, values.label == label].ravel()
            assert abs(sum_of_class - math.fsum(of_class)) <= 1e-14 * math.fsum(np.abs(of_class))


@every_kind
def test_it_is_sound(write: WrittenKinds, name: str, layout: LayoutName) -> None:
    store = Store(write(name, layout))
    num_bytes: list[int] = []
    assert list(find_faults(store, num_bytes.append)) == []
    assert sum(num_bytes) == store.dataset.totals.bytes and len(num_bytes) == len(store.files)
    assert list(describe_weak_promises(store)) == []


@every_kind
def test_stock_readers_find_the_same_values(write: WrittenKinds, name: str, layout: LayoutName) -> None:
    """Also without a warning (see read_by_zarr)."""
    folder, kind = Path(write(name, layout)), KINDS[name]
    expected = expected_columns(kind.spec(layout), kind.values())
    if layout == "zarr":
        assert_columns_are(read_by_zarr(folder / "columns.zarr"), expected)
    else:
        assert_readers_of_webdataset_give(folder, expected)


def test_a_group_of_schema_1_0_made_stock_zarr_warn(tmp_path: Path) -> None:
    """So the absence of warnings above says something."""
    fixture = Path(__file__).parent / "fixtures" / "format-1.0" / "zarr-samples.tar.gz"
    with tarfile.open(fixture) as tar:
        tar.extractall(tmp_path, filter="data")
    with pytest.raises(UserWarning, match="not recognized as a component of a Zarr hierarchy"):
        read_by_zarr(tmp_path)


def test_a_shard_with_a_wrong_checksum_is_refused_by_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all sha256 are those of the wrong file, so that only the shard's own checksum tells."""
    original = ZarrLayout.encode_file

    def encode_file(self: ZarrLayout, spec: Spec, column: str, block: int, columns: dict[str, NDArray[Any]]) -> bytes:
        data = original(self, spec, column, block, columns)
        return flip(len(data) - 2)(data) if (column, block) == ("z", 1) else data

    with monkeypatch.context() as patch:
        patch.setattr(ZarrLayout, "encode_file", encode_file)
        KINDS["pairs-float16-stored"].write(str(tmp_path), "zarr")
    store = Store(str(tmp_path))
    message = "its shard index, or the checksum of it, is not that of uncompressed chunks"
    faults = [fault.message for fault in find_faults(store)]
    assert len(faults) == store.spec.num_draws and all(message in fault for fault in faults)
    with pytest.raises(StoreError, match=rf"columns\.zarr/z/c/1/1/0/0/0: {message}"):
        store.column("z", 1, 1)
    with (
        closing(CouplingStream(store.url, store.spec.rows, seed=0)) as stream,
        pytest.raises(StoreError, match=message),
    ):
        next(stream)
    array = zarr.open_group(str(tmp_path / "columns.zarr"), mode="r")["z"]
    assert isinstance(array, zarr.Array)
    assert_same(np.asarray(array[0, :4]), store.column("z", 0, 0))
    with pytest.raises(ValueError, match="checksum"):
        array[0, 4:8]


def test_mirrored_latents_with_other_labels_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tars of both views hold the labels; here as many of each class, in another order."""
    original = WebDatasetLayout.encode_file

    def encode_file(
        self: WebDatasetLayout, spec: Spec, column: str, block: int, columns: dict[str, NDArray[Any]]
    ) -> bytes:
        if (column, block) == ("x_mirrored", 1):
            columns = columns | {"label": columns["label"][::-1]}
        return original(self, spec, column, block, columns)

    labels = KINDS["pairs-latents-views"].values().label[4:8]
    assert labels.tolist() != labels[::-1].tolist()
    with monkeypatch.context() as patch:
        patch.setattr(WebDatasetLayout, "encode_file", encode_file)
        KINDS["pairs-latents-views"].write(str(tmp_path), "webdataset")
    faults = [fault.message for fault in find_faults(Store(str(tmp_path)))]
    assert len(faults) == 1 and "x_mirrored/000001.tar: its labels are not those of the plain view" in faults[0]


def other(layout: LayoutName) -> LayoutName:
    return "zarr" if layout == "webdataset" else "webdataset"


@some_kinds
def test_conversion_there_and_back_gives_the_same_bytes(
    write: WrittenKinds, tmp_path: Path, name: str, layout: LayoutName
) -> None:
    store = Store(write(name, layout))
    there, back = f"{tmp_path}/there", f"{tmp_path}/back"
    convert_store(store, there, other(layout), ignore_progress, None)
    assert content(there) == content(write(name, other(layout))), "as if it had been written in that layout"
    assert_holds(Store(there), KINDS[name].values())
    convert_store(Store(there), back, layout, ignore_progress, None)
    assert content(back) == content(store.url)
    assert Store(back).dataset == store.dataset


@some_kinds
def test_a_copy_has_the_same_files(write: WrittenKinds, tmp_path: Path, name: str, layout: LayoutName) -> None:
    store = Store(write(name, layout))
    copy_store(store, str(tmp_path), ignore_progress, None)
    assert tree(str(tmp_path)) == tree(store.url)


@some_kinds
def test_tuples_hold_x_in_the_view_of_the_draw(
    write: WrittenKinds, tmp_path: Path, name: str, layout: LayoutName
) -> None:
    store, values = Store(write(name, layout)), KINDS[name].values()
    spec = store.spec
    if values.noise is None:
        with pytest.raises(StoreError, match="got a store of samples"):
            export_tuples(store, f"{tmp_path}/out", ignore_progress, None)
        return
    assert export_tuples(store, str(tmp_path), ignore_progress, None) == spec.num_blocks * spec.num_draws
    for draw in range(spec.num_draws):
        expected: list[dict[str, Any]] = [
            {
                "x.npy": stored_x(values, spec.view_of(draw))[row],
                "z.npy": read_z(spec, values)[draw, row].astype("f2" if spec.nfm.z_dtype == "float16" else "f4"),
                "noise.npy": values.noise[draw, row],
            }
            for row in range(spec.rows)
        ]
        members: dict[str, dict[str, bytes]] = {}
        for path in sorted((tmp_path / f"k{draw:03d}").iterdir()):
            with tarfile.open(path) as tar:
                for info in tar:
                    key, suffix = info.name.split(".", 1)
                    file = tar.extractfile(info)
                    assert file is not None
                    members.setdefault(key, {})[suffix] = file.read()
        assert list(members) == [f"{row:012d}_k{draw:03d}" for row in range(spec.rows)]
        for row, sample in enumerate(members.values()):
            assert sample.pop("cls", None) == (str(values.label[row]).encode() if spec.has_labels else None)
            assert sample.keys() == expected[row].keys()
            for suffix, data in sample.items():
                assert_same(np.load(io.BytesIO(data), allow_pickle=False), expected[row][suffix])


@some_kinds
def test_repair_and_the_same_writer_give_the_same_bytes(
    write: WrittenKinds, tmp_path: Path, name: str, layout: LayoutName
) -> None:
    """Each file that holds values of a block was damaged: of every column, and of what is added up."""
    url, kind = f"{tmp_path}/store", KINDS[name]
    shutil.copytree(write(name, layout), url)
    before = tree(url)
    firsts = {key.column: record.path for key, record in reversed(Store(url).files.items()) if key.block == 1}
    paths = [*firsts.values(), *(path for path in before if path.startswith("sums/000001"))]
    assert len(paths) == len(firsts) + len(
        {"z_sums", "z_class_sums", "names"} & Store(url).dataset.documents.by_name().keys()
    )
    for path in paths:
        damage(Path(url), path, flip(len(before[path]) // 2))
    faults, blocks, is_complete = repair_store(url, ignore_progress)
    assert (blocks, is_complete) == ([1], False)
    assert all(any(path in fault for fault in faults) for path in paths)
    kind.write(url, layout)
    assert tree(url) == before
    assert repair_store(url, ignore_progress) == ([], [], True)


@pytest.mark.long
@pytest.mark.parametrize("name", all_kinds())
def test_every_combination(tmp_path: Path, name: str) -> None:
    kind = all_kinds()[name]
    values = kind.values()
    for layout in LAYOUT_NAMES:
        url = f"{tmp_path}/{layout}"
        kind.write(url, layout)
        store = Store(url)
        assert_holds(store, values)
        assert list(find_faults(store)) == []
        for window in (None, 1):
            compare_streams(url, values, 5, 4, window, seed=1)
    convert_store(Store(f"{tmp_path}/zarr"), f"{tmp_path}/there", "webdataset", ignore_progress, None)
    assert content(f"{tmp_path}/there") == content(f"{tmp_path}/webdataset")
