"""Every kind of store that the schema holds: what goes in comes out, in every reader, and after every way of moving."""

import io
import json
import math
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray

from nfm.models.tarflow import TarFlow, TarFlowConfig
from nfm.pipeline.config import Config
from nfm.stages.encode import coupling_spec
from nfm.stages.errors import StageError
from nfm.stages.reencode import verify_by_reencoding
from nfm.stages.splits import open_splits
from nfm.stages.support import check_supported
from nfm.stages.train_student import train_student
from nfm.storage_specs.format.image_names import list_names
from nfm.storage_specs.format.schema import LayoutName, PixelSpec, Spec
from nfm.storage_specs.format.webdataset import WebDatasetLayout
from nfm.storage_specs.format.zarr_layout import ZarrLayout
from nfm.storage_specs.reading import column
from nfm.storage_specs.reading.batches import Batch
from nfm.storage_specs.reading.memmap_rows import MemmapRows
from nfm.storage_specs.reading.order import derive_source_seed
from nfm.storage_specs.reading.region import RegionRows
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream, Source, StreamState, View
from nfm.storage_specs.reading.verify import describe_weak_promises, find_faults
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.writing.transfer import convert_store, copy_store, repair_store
from nfm.storage_specs.writing.tuples import export_tuples
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.kinds import (
    BOTH,
    KINDS,
    Kind,
    Sample,
    SlowReader,
    Values,
    all_kinds,
    mixed_samples,
    read_z,
    scaled_x,
    stored_x,
    stored_z,
)
from tests.tools.stock_readers import read_by_records, read_by_tarfile, read_by_webdataset, read_by_zarr
from tests.tools.stores import LAYOUT_NAMES, content, damage, edit, flip, ignore_progress, tree

Write = Callable[[str, LayoutName], str]
TORCH_DTYPES = {
    "<f4": torch.float32,
    "<f2": torch.float16,
    "<u2": torch.bfloat16,
    "|i1": torch.int8,
    "|u1": torch.uint8,
}

# Kinds that together have everything, for what takes long with all of them.
FEW = ("samples-names", "samples-float32-views", "pairs-views-int8", "pairs-latents-views", "pairs-unlabelled")


def other(layout: LayoutName) -> LayoutName:
    return "zarr" if layout == "webdataset" else "webdataset"


def some(name: str, layout: LayoutName) -> Any:
    """A parameter, of a long test unless it is among the few."""
    is_quick = name in FEW and (layout == "zarr") == (FEW.index(name) % 2 == 0)
    return pytest.param(name, layout, marks=[] if is_quick else pytest.mark.long)


every_kind = pytest.mark.parametrize(("name", "layout"), list(product(KINDS, LAYOUT_NAMES)))
some_kinds = pytest.mark.parametrize(("name", "layout"), [some(*pair) for pair in product(KINDS, LAYOUT_NAMES)])


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Writes a kind of store once, and returns its URL. Tests do not change these stores."""
    folder, urls = tmp_path_factory.mktemp("kinds"), dict[tuple[str, str], str]()

    def write_once(name: str, layout: LayoutName) -> str:
        if (name, layout) not in urls:
            url = f"{folder}/{name}-{layout}"
            KINDS[name].write(url, layout)
            urls[name, layout] = url
        return urls[name, layout]

    return write_once


def assert_same(got: NDArray[Any], expected: NDArray[Any]) -> None:
    """The same dtype, shape and bits."""
    assert (got.dtype.newbyteorder("<"), got.shape) == (expected.dtype.newbyteorder("<"), expected.shape)
    assert np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(expected).tobytes()


def read_all(store: Store, name: str, draw: int = -1) -> NDArray[Any]:
    """A column of all blocks."""
    return np.concatenate([store.column(name, block, draw) for block in range(store.spec.num_blocks)])


def assert_holds(store: Store, values: Values) -> None:
    """Every column, and what is made of it, is what was written, bit for bit."""
    spec, blocks = store.spec, range(store.spec.num_blocks)
    assert_same(read_all(store, "x"), values.x)
    assert_same(read_all(store, "index"), np.arange(spec.rows))
    assert_same(read_all(store, "label"), values.label)
    assert_same(store.labels(), values.label)
    if values.x_mirrored is not None:
        assert_same(read_all(store, "x_mirrored"), values.x_mirrored)
    else:
        with pytest.raises(ValueError, match="got column 'x_mirrored'"):
            store.column("x_mirrored", 0)
    assert (None if store.image_names is None else list_names(store.image_names)) == values.names
    if values.names is not None:
        assert [name for block in blocks for name in store.image_names_of(block) or ()] == values.names
    rows = np.array([spec.rows - 1, 0, spec.block_rows])
    if isinstance(spec.x, PixelSpec):
        assert_same(store.images(rows), values.x[rows])
    else:
        with pytest.raises(ValueError, match=rf"got a store of {spec.x.dtype} latents"):
            store.images(rows)
    for draw in range(spec.num_draws):
        assert values.noise is not None
        assert_same(read_all(store, "z", draw), stored_z(spec, values)[draw])
        assert_same(read_all(store, "noise", draw), values.noise[draw])
        assert_same(np.concatenate([store.z(block, draw) for block in blocks]), read_z(spec, values)[draw])
        of_draw = np.concatenate([store.x_of(block, draw) for block in blocks])
        assert_same(of_draw, stored_x(values, "mirrored" if len(spec.views) == 2 and draw % 2 else "plain"))


@every_kind
def test_what_goes_in_comes_out(write: Write, name: str, layout: LayoutName) -> None:
    store, kind = Store(write(name, layout)), KINDS[name]
    assert store.spec == kind.spec(layout)
    assert_holds(store, kind.values())


@every_kind
def test_what_is_computed_from_z_is_that_of_the_stored_values(write: Write, name: str, layout: LayoutName) -> None:
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
def test_it_is_sound(write: Write, name: str, layout: LayoutName) -> None:
    store = Store(write(name, layout))
    num_bytes: list[int] = []
    assert list(find_faults(store, num_bytes.append)) == []
    assert sum(num_bytes) == store.dataset.totals.bytes and len(num_bytes) == len(store.files)
    assert list(describe_weak_promises(store)) == []


def expected_columns(spec: Spec, values: Values) -> dict[str, NDArray[Any]]:
    """What stock readers are to find."""
    columns = {"x": values.x, "index": np.arange(spec.rows)}
    if spec.has_labels:
        columns["label"] = values.label
    if values.x_mirrored is not None:
        columns["x_mirrored"] = values.x_mirrored
    if values.noise is not None:
        columns["z"] = stored_z(spec, values)
        if "noise" in spec.draw_columns:
            columns["noise"] = values.noise
    return columns


@every_kind
def test_stock_readers_find_the_same_values(write: Write, name: str, layout: LayoutName) -> None:
    """Also without a warning (see read_by_zarr)."""
    folder, kind = Path(write(name, layout)), KINDS[name]
    expected = expected_columns(kind.spec(layout), kind.values())
    if layout == "zarr":
        readings = [read_by_zarr(folder / "columns.zarr")]
    else:
        readings = [read_by_tarfile(folder), read_by_webdataset(folder), read_by_records(folder)]
        readings[2] |= {column: expected[column] for column in ("label", "index") if column in expected}
    for columns in readings:
        assert columns.keys() == expected.keys()
        for column_name, array in columns.items():
            assert_same(array, expected[column_name])


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


# Moving


@some_kinds
def test_conversion_there_and_back_gives_the_same_bytes(
    write: Write, tmp_path: Path, name: str, layout: LayoutName
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
def test_a_copy_has_the_same_files(write: Write, tmp_path: Path, name: str, layout: LayoutName) -> None:
    store = Store(write(name, layout))
    copy_store(store, str(tmp_path), ignore_progress, None)
    assert tree(str(tmp_path)) == tree(store.url)


@some_kinds
def test_tuples_hold_x_in_the_view_of_their_draw(write: Write, tmp_path: Path, name: str, layout: LayoutName) -> None:
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
    write: Write, tmp_path: Path, name: str, layout: LayoutName
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
    faults, blocks = repair_store(url, ignore_progress)
    assert blocks == [1]
    assert all(any(path in fault for fault in faults) for path in paths)
    kind.write(url, layout)
    assert tree(url) == before
    assert repair_store(url, ignore_progress) == ([], [])


# Streams


def slow_reader(url: str, values: Values, seed: int, view: View, stored: bool, window: int | None) -> SlowReader:
    """The slow reader of a store."""
    store = Store(url)
    pairs = view == "pairs"
    return SlowReader(store.spec, values, store.sigma_f if pairs else None, seed, pairs, stored, window)


def assert_is(batch: Batch, expected: Sequence[Sample], spec: Spec, stored: bool) -> None:
    """The batch holds these samples, bit for bit."""
    assert batch.index.tolist() == [sample.index for sample in expected]
    assert batch.draw.tolist() == [sample.draw for sample in expected]
    assert batch.label.tolist() == [sample.label for sample in expected]
    assert batch.source.tolist() == [sample.source for sample in expected]
    for column_name, tensor in (("x", batch.x), ("z", batch.z)):
        rows = [getattr(sample, column_name) for sample in expected]
        if column_name == "z" and rows[0] is None:
            assert tensor.shape == (0, *spec.shape)
            continue
        assert tensor.dtype == (TORCH_DTYPES[spec.dtype(column_name).str] if stored else torch.float32)
        assert tensor.shape == (len(rows), *spec.shape)
        assert tensor.contiguous().view(torch.uint8).numpy().tobytes() == np.stack(rows).tobytes()


def views_of(spec: Spec) -> tuple[View, ...]:
    """The views of a stream that a store allows."""
    return ("samples",) if spec.coupling is None else ("pairs", "samples")


def compare_streams(url: str, values: Values, batch_size: int, num_batches: int, window: int | None, seed: int) -> None:
    """Streams of all views, as floats and as stored, against the slow reader."""
    spec = Store(url).spec
    for view, stored in product(views_of(spec), (False, True)):
        slow = slow_reader(url, values, seed, view, stored, window)
        floats = replace(slow, stored=False)
        with closing(CouplingStream(url, batch_size, seed, view, window_blocks=window, stored=stored)) as stream:
            for number in range(num_batches):
                batch, samples = next(stream), range(number * batch_size, (number + 1) * batch_size)
                assert_is(batch, [slow.sample(i) for i in samples], spec, stored)
                assert_is(stream.to_float(batch), [floats.sample(i) for i in samples], spec, stored=False)


@pytest.fixture(params=["region", "memmap"])
def rows_reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test that asks for it runs with the fast reader, and with the plain one."""
    if request.param == "memmap":
        monkeypatch.setattr(column, "supports_region", lambda placement: False)
    created, original = [], column.create_mapped_rows

    def create(placement: Any) -> Any:
        created.append(original(placement))
        return created[-1]

    monkeypatch.setattr(column, "create_mapped_rows", create)
    yield
    assert created
    assert {type(rows) for rows in created} == {MemmapRows if request.param == "memmap" else RegionRows}


@every_kind
@pytest.mark.usefixtures("rows_reader")
def test_streams_equal_the_slow_reader(write: Write, name: str, layout: LayoutName) -> None:
    """Batches of 9 over 11 rows span epochs; windows of 2 blocks of 3 make files come and go."""
    window = 2 if layout == "webdataset" else None
    compare_streams(write(name, layout), KINDS[name].values(), 9, 6, window, seed=3)


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


@every_kind
def test_k_epochs_show_each_draw_of_each_image_once(write: Write, name: str, layout: LayoutName) -> None:
    """And two epochs of "samples" each view, found by its values; draw -1 says that there is no z."""
    store, values = Store(write(name, layout)), KINDS[name].values()
    spec = store.spec
    for view in views_of(spec):
        num_epochs = spec.num_draws if view == "pairs" else len(spec.views)
        with closing(CouplingStream(store.url, spec.rows, 5, view, window_blocks=2)) as stream:
            for _ in range(2):
                seen: list[tuple[int, int]] = []
                for _ in range(num_epochs):
                    batch = next(stream)
                    assert sorted(batch.index.tolist()) == list(range(spec.rows))
                    turns = batch.draw.tolist()
                    if view == "samples":
                        assert turns == [-1] * spec.rows
                        turns = [
                            [
                                bool(np.array_equal(x, scaled_x(spec, stored_x(values, image_view)[index])))
                                for image_view in spec.views
                            ].index(True)
                            for x, index in zip(batch.x.numpy(), batch.index.tolist(), strict=True)
                        ]
                    seen += zip(batch.index.tolist(), turns, strict=True)
                assert sorted(seen) == list(product(range(spec.rows), range(num_epochs)))


@some_kinds
def test_ranks_resume_the_sequence_at_any_world_size(write: Write, name: str, layout: LayoutName) -> None:
    url, values = write(name, layout), KINDS[name].values()
    spec = Store(url).spec
    for view in views_of(spec):
        slow = slow_reader(url, values, 2, view, stored=False, window=1)
        state, start = StreamState(), 0
        for world_size, num_batches in ((1, 1), (3, 4), (2, 3), (6, 2)):
            streams = [CouplingStream(url, 6, 2, view, rank, world_size, 1) for rank in range(world_size)]
            for stream in streams:
                stream.state = state
            for _ in range(num_batches):
                for rank, stream in enumerate(streams):
                    share = 6 // world_size
                    first = start + rank * share
                    assert_is(next(stream), [slow.sample(i) for i in range(first, first + share)], spec, stored=False)
                start += 6
            state = streams[0].state
            assert state == StreamState(*divmod(start, spec.rows))
            for stream in streams:
                stream.close()


PIXELS = Kind(z="float16", views=BOTH, draws=4, shape=(3, 4, 6))
LATENTS = Kind(z="bfloat16", x="float16", views=BOTH, shape=(4, 2, 3), classes=0)
MIXTURES = {
    "pixels": [
        PIXELS,
        replace(PIXELS, views=("plain",), rows=7, seed=1),
        replace(PIXELS, stored=True, seed=2, draws=2),
    ],
    "pixels of other z": [PIXELS, replace(PIXELS, z="int8", seed=1), replace(PIXELS, z="bfloat16", seed=2)],
    "latents": [LATENTS, replace(LATENTS, views=("plain",), rows=9, draws=3, seed=1)],
    "latents of other z": [LATENTS, replace(LATENTS, z="float32", seed=1)],
}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("stored", [False, True])
def test_mixtures_equal_the_slow_reader(tmp_path: Path, name: str, stored: bool) -> None:
    kinds, weights = MIXTURES[name], [3.0, 2.0, 1.0]
    layouts: tuple[LayoutName, ...] = ("zarr", "webdataset", "zarr")
    sources = [Source(f"{tmp_path}/{i}", weights[i]) for i in range(len(kinds))]
    for kind, source, layout in zip(kinds, sources, layouts, strict=False):
        kind.write(source.url, layout)
    spec = Store(sources[0].url).spec
    for view in views_of(spec):
        is_stored = stored and (view == "samples" or "other z" not in name)  # one tensor has one dtype
        readers = [
            slow_reader(source.url, kind.values(), derive_source_seed(4, i), view, is_stored, 2)
            for i, (kind, source) in enumerate(zip(kinds, sources, strict=True))
        ]
        expected = list(mixed_samples(readers, weights[: len(kinds)], 4, 80))
        in_floats = [replace(reader, stored=False) for reader in readers]
        expected_floats = list(mixed_samples(in_floats, weights[: len(kinds)], 4, 80))
        with closing(CouplingStream(sources, 16, 4, view, window_blocks=2, stored=stored)) as stream:
            for start in range(0, 80, 16):
                batch = next(stream)
                assert_is(batch, expected[start : start + 16], spec, is_stored)
                assert_is(stream.to_float(batch), expected_floats[start : start + 16], spec, stored=False)


def test_stores_with_another_meaning_of_x_do_not_mix(tmp_path: Path) -> None:
    for name, kind in (("f2", LATENTS), ("f4", replace(LATENTS, x="float32")), ("u1", replace(LATENTS, x=None))):
        kind.write(f"{tmp_path}/{name}", "zarr")
    for name in ("f4", "u1"):
        with pytest.raises(StoreError, match="got another x than"):
            CouplingStream([Source(f"{tmp_path}/f2"), Source(f"{tmp_path}/{name}")], 8, seed=0)


# What is refused

SEMIDISCRETE = {
    "kind": "semidiscrete",
    "draws": 2,
    "law": "philox-as241-v1",
    "seed": 0,
    "potentials": {"sha256": "0" * 64, "cost": "dot", "chi2": 0.1},
    "source": "0" * 64,
}
REFLOW = {
    "kind": "reflow",
    "draws": 1,
    "z_dtype": "float16",
    "z_scale_sha256": None,
    "law": "philox-as241-v1",
    "seed": 0,
    "generator": {"architecture": {}, "sha256": "0" * 64, "training": {}},
    "sampler": "heun31",
    "guidance": 1.5,
    "precision": "fp32",
}


@pytest.mark.parametrize("coupling", [SEMIDISCRETE, REFLOW], ids=["semidiscrete", "reflow"])
def test_couplings_that_only_the_schema_has_are_refused_with_one_line(
    write: Write, tmp_path: Path, coupling: dict[str, Any]
) -> None:
    message = rf"got a coupling of kind '{coupling['kind']}'; this nfm reads and writes 'nfm' alone"
    url = f"{tmp_path}/store"
    shutil.copytree(write("pairs-float16-stored", "zarr"), url)
    damage(Path(url), "dataset.json", edit(spec__coupling=coupling))
    spec = Spec.model_validate(json.loads((tmp_path / "store/dataset.json").read_bytes())["spec"])
    assert spec.coupling is not None and spec.coupling.kind == coupling["kind"]
    with pytest.raises(StoreError, match=rf"^.*store/dataset\.json: {message}$"):
        Store(url)
    with pytest.raises(StoreError, match=rf"^.*store/dataset\.json: {message}$"):
        CouplingStream(url, 4, seed=0)
    with pytest.raises(StoreError, match=rf"^.*new: {message}$"):
        StoreWriter(f"{tmp_path}/new", spec)
    assert not (tmp_path / "new").exists()


UNSUPPORTED = {
    "samples-float16": "got float16 latents",
    "samples-unlabelled": "got images of 2×3",
    "samples-views": "got images of 4×6",
    "pairs-latents": "got bfloat16 latents",
    "pairs-unlabelled": "got images of 2×5",
}
SQUARE = {
    "samples": (Kind(classes=0), "got images without labels"),
    "samples-views": (Kind(views=BOTH), "got mirrored views"),
    "pairs": (Kind(z="int8", classes=0), "got images without labels"),
    "pairs-views": (Kind(z="int8", views=BOTH), "got mirrored views"),
}


@pytest.mark.parametrize("name", [*UNSUPPORTED, *(f"square {name}" for name in SQUARE)])
def test_stages_refuse_with_one_line_what_they_cannot_take(tmp_path: Path, config: Config, name: str) -> None:
    kind, got = SQUARE[name.removeprefix("square ")] if name.startswith("square") else (KINDS[name], UNSUPPORTED[name])
    message = rf"^{tmp_path}.*: {got}; teachers and students take square uint8 pixels with labels, in one view$"
    for split in ("train", "val"):
        kind.write(f"{tmp_path}/{split}", "webdataset")
    store = Store(f"{tmp_path}/train")
    teacher = TarFlow(TarFlowConfig(3, 4, 2, 8, (1,), head_dim=8))
    refused: list[Callable[[], object]] = [
        lambda: check_supported(store),
        lambda: coupling_spec(config.encode, store, teacher, {}, "model.safetensors"),
    ]
    if kind.z is None:
        refused.append(lambda: open_splits(str(tmp_path)))
    else:
        refused.append(lambda: train_student(config.student, store.url, f"{tmp_path}/out"))
        refused.append(lambda: verify_by_reencoding(store, "no.safetensors", 1, seed=0))
    for call in refused:
        with pytest.raises(StageError, match=message):
            call()
    assert not (tmp_path / "out").exists()


LATENT = {
    "dtype": "float16",
    "scale": 1.0,
    "shift": 0.0,
    "decoder": {"name": "", "architecture": {}, "sha256": "0" * 64},
}
INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "odd draws with two views": ({"views": ["plain", "mirrored"]}, "3 draws do not show each of 2 views equally often"),
    "no views": ({"views": []}, r"views \[\]; there may be"),
    "mirrored alone": ({"views": ["mirrored"]}, r"views \['mirrored'\]; there may be"),
    "views in another order": ({"views": ["mirrored", "plain"]}, "there may be"),
    "a view twice": ({"views": ["plain", "plain"]}, "there may be"),
    "another view": ({"views": ["plain", "rotated"]}, "Input should be 'plain' or 'mirrored'"),
    "too few names": ({"class_names": ["a", "b"]}, "2 class names for 3 classes"),
    "names without classes": ({"num_classes": 0}, "3 class names for 0 classes"),
    "classes without names": ({"class_names": []}, "0 class names for 3 classes"),
    "a negative number of classes": ({"num_classes": -1, "class_names": []}, "greater than or equal to 0"),
    "more rows than keys": ({"rows": 10**12 + 1}, "less than or equal to 1000000000000"),
    "no rows": ({"rows": 0}, "greater than or equal to 1"),
    "latents of scale 0": ({"x": LATENT | {"scale": 0.0}}, "greater than 0"),
    "latents of a negative scale": ({"x": LATENT | {"scale": -1.0}}, "greater than 0"),
    "latents of scale NaN": ({"x": LATENT | {"scale": math.nan}}, "greater than 0|finite number"),
    "latents of infinite scale": ({"x": LATENT | {"scale": math.inf}}, "finite number"),
    "latents of shift NaN": ({"x": LATENT | {"shift": math.nan}}, "finite number"),
    "latents without a decoder": ({"x": {"dtype": "float16", "scale": 1.0, "shift": 0.0}}, "Field required"),
    "pixels with a scale": ({"x": {"dtype": "uint8", "scale": 1.0}}, "Extra inputs"),
    "another dtype of x": ({"x": {"dtype": "int16"}}, "Input tag 'int16'"),
    "another kind of coupling": ({"coupling": {"kind": "optimal"}}, "Input tag 'optimal'"),
    "a scale of float16": ({"coupling": {"z_scale_sha256": "0" * 64}}, "z has a scale exactly when it is int8"),
}


@pytest.mark.parametrize("name", INVALID)
def test_a_spec_that_makes_no_sense_is_refused(tmp_path: Path, name: str) -> None:
    """As an object (ValueError), and in a store, with one line that names the file."""
    changes, message = INVALID[name]
    kind = replace(KINDS["pairs-float16-stored"], draws=3)
    spec = kind.spec("webdataset").model_dump(mode="json")
    coupling = spec["coupling"] | changes.get("coupling", {})
    with pytest.raises(ValueError, match=message):
        Spec.model_validate(spec | changes | {"coupling": coupling})
    kind.write(str(tmp_path), "webdataset")
    changed = {f"spec__{field}": value for field, value in (changes | {"coupling": coupling}).items()}
    damage(tmp_path, "dataset.json", edit(**changed))
    with pytest.raises(StoreError, match=rf"^{re.escape(str(tmp_path))}/dataset\.json: .*damaged.*$"):
        Store(str(tmp_path))
