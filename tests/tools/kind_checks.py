"""What every kind of store is checked for: the values that it gives to our own reader and to streams, bit for bit."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nfm.storage_specs.format.image_names import list_names
from nfm.storage_specs.format.names import DATASET_FILE
from nfm.storage_specs.format.schema import LayoutName, PixelSpec, Spec
from nfm.storage_specs.reading.batches import Batch
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream, View
from tests.tools.kinds import (
    KINDS,
    Sample,
    SlowReader,
    Values,
    read_z,
    stored_x,
    stored_z,
)
from tests.tools.stock_readers import read_by_records, read_by_tarfile, read_by_webdataset
from tests.tools.stores import LAYOUT_NAMES

TORCH_DTYPES = {
    "<f4": torch.float32,
    "<f2": torch.float16,
    "<u2": torch.bfloat16,
    "|i1": torch.int8,
    "|u1": torch.uint8,
}

# Kinds that together have everything, for what takes long with all of them.
FEW = ("samples-names", "samples-float32-views", "pairs-views-int8", "pairs-latents-views", "pairs-unlabelled")


def some(name: str, layout: LayoutName) -> Any:
    """A parameter, of a long test unless it is among the few."""
    is_quick = name in FEW and (layout == "zarr") == (FEW.index(name) % 2 == 0)
    return pytest.param(name, layout, marks=[] if is_quick else pytest.mark.long)


every_kind = pytest.mark.parametrize(("name", "layout"), list(product(KINDS, LAYOUT_NAMES)))
some_kinds = pytest.mark.parametrize(("name", "layout"), [some(*pair) for pair in product(KINDS, LAYOUT_NAMES)])


class WrittenKinds:
    """Writes each kind of store once into a folder, which several files of tests share. Nobody changes these stores."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, layout: LayoutName) -> str:
        """The URL of a store of the kind with this name."""
        url = f"{self.folder}/{name}-{layout}"
        if not Path(url, DATASET_FILE).exists():
            KINDS[name].write(url, layout)
        return url


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


def assert_readers_of_webdataset_give(folder: Path, expected: dict[str, NDArray[Any]]) -> None:
    """All readers of tars find exactly the expected columns. Records alone say nothing of labels and indices."""
    by_records = read_by_records(folder)
    by_records |= {column: expected[column] for column in ("label", "index") if column in expected}
    for columns in (read_by_tarfile(folder), read_by_webdataset(folder), by_records):
        assert_columns_are(columns, expected)


def assert_columns_are(columns: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert columns.keys() == expected.keys()
    for column, array in columns.items():
        assert_same(array, expected[column])
