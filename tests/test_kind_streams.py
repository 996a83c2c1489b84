"""Streams of every kind of store equal a slow and obvious reader."""

from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.reading import column
from nfm.storage_specs.reading.mapped_rows import MappedRows, RowPlacement
from nfm.storage_specs.reading.memmap_rows import MemmapRows
from nfm.storage_specs.reading.order import derive_source_seed
from nfm.storage_specs.reading.region import RegionRows
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream, Source, StreamState
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.writing.transfer import copy_store
from tests.tools.kind_checks import (
    WrittenKinds,
    assert_holds,
    assert_is,
    compare_streams,
    every_kind,
    slow_reader,
    some_kinds,
    views_of,
)
from tests.tools.kinds import (
    BOTH,
    KINDS,
    Kind,
    Values,
    mixed_samples,
    scaled_x,
    stored_x,
)
from tests.tools.stores import ignore_progress


@pytest.fixture
def created_rows(monkeypatch: pytest.MonkeyPatch) -> list[MappedRows]:
    """The readers of rows that are created in a test."""
    created, original = list[MappedRows](), column.create_mapped_rows

    def create(placement: RowPlacement) -> MappedRows:
        created.append(original(placement))
        return created[-1]

    monkeypatch.setattr(column, "create_mapped_rows", create)
    return created


def compare(url: str, values: Values, layout: LayoutName) -> None:
    """Batches of 9 over 11 rows span epochs; windows of 2 blocks of 3 make files come and go."""
    compare_streams(url, values, 9, 6, window=2 if layout == "webdataset" else None, seed=3)


@every_kind
def test_streams_equal_the_slow_reader(
    write: WrittenKinds, created_rows: list[MappedRows], name: str, layout: LayoutName
) -> None:
    compare(write(name, layout), KINDS[name].values(), layout)
    assert created_rows and all(isinstance(rows, RegionRows) for rows in created_rows)


@some_kinds
def test_streams_with_plain_rows_equal_the_slow_reader(
    write: WrittenKinds,
    monkeypatch: pytest.MonkeyPatch,
    created_rows: list[MappedRows],
    name: str,
    layout: LayoutName,
) -> None:
    """As on a platform without what region.py needs."""
    monkeypatch.setattr(column, "supports_region", lambda placement: False)
    compare(write(name, layout), KINDS[name].values(), layout)
    assert created_rows and all(isinstance(rows, MemmapRows) for rows in created_rows)


@some_kinds
def test_remote_streams_equal_the_slow_reader(
    write: WrittenKinds, tmp_path: Path, name: str, layout: LayoutName
) -> None:
    """Windows of one block, whose files come through the cache."""
    url, values = f"memory:/{tmp_path}", KINDS[name].values()
    copy_store(Store(write(name, layout)), url, ignore_progress, None)
    assert_holds(Store(url), values)
    compare_streams(url, values, 9, 6, window=1, seed=3)


@every_kind
def test_k_epochs_show_each_draw_of_each_image_once(write: WrittenKinds, name: str, layout: LayoutName) -> None:
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
def test_ranks_resume_the_sequence_at_any_world_size(write: WrittenKinds, name: str, layout: LayoutName) -> None:
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
def test_mixtures_equal_the_slow_reader(tmp_path: Path, name: str) -> None:
    kinds, weights = MIXTURES[name], [3.0, 2.0, 1.0]
    layouts: tuple[LayoutName, ...] = ("zarr", "webdataset", "zarr")
    sources = [Source(f"{tmp_path}/{i}", weights[i]) for i in range(len(kinds))]
    for kind, source, layout in zip(kinds, sources, layouts, strict=False):
        kind.write(source.url, layout)
    spec = Store(sources[0].url).spec
    for view, stored in product(views_of(spec), (False, True)):
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
