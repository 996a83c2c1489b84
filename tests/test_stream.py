"""Streams: their order is a function of (seed, epoch, position) alone, their values are those of the store."""

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.reading.batches import BufferPool
from nfm.storage_specs.reading.order import (
    MIXTURE_PERIOD,
    choose_epoch_draws,
    derive_source_seed,
    make_epoch_order,
    permutation,
)
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream, Source, StreamState, View
from nfm.storage_specs.storage.errors import StoreError
from tests.tools.random_couplings import write_random_couplings
from tests.tools.small_run import Run
from tests.tools.stores import damage, flip
from tests.tools.waiting import PATIENCE


def read_keys(stream: CouplingStream, num_batches: int) -> list[tuple[int, int]]:
    """(index, draw) of each sample of the next batches."""
    keys: list[tuple[int, int]] = []
    for _ in range(num_batches):
        batch = next(stream)
        keys += zip(batch.index.tolist(), batch.draw.tolist(), strict=True)
    return keys


def test_permutation_never_changes() -> None:
    assert permutation(8, seed=1, stream=1, counter=0).tolist() == [0, 6, 5, 3, 4, 7, 2, 1]


@pytest.mark.parametrize("window", [None, 1, 3])
def test_an_epoch_shows_every_row_once(window: int | None) -> None:
    rows = make_epoch_order(100, 16, seed=0, epoch=3, window_blocks=window).rows
    assert sorted(rows.tolist()) == list(range(100))
    assert not np.array_equal(rows, make_epoch_order(100, 16, seed=0, epoch=4, window_blocks=window).rows)


def test_a_window_holds_few_blocks_at_a_time() -> None:
    blocks = make_epoch_order(160, 16, seed=0, epoch=0, window_blocks=2).rows // 16
    for window in blocks.reshape(-1, 32):
        assert len(set(window.tolist())) == 2


@pytest.mark.parametrize("window", [None, 10])
def test_the_shuffle_is_random(window: int | None) -> None:
    """Rank correlation with the stored order, and neighbours from one block, as chance would have them; in windows,
    within each window."""
    n, block_rows = 20_000, 200
    order = make_epoch_order(n, block_rows, seed=0, epoch=0, window_blocks=window)
    correlations = []
    for start, end, blocks in zip(order.window_starts[:-1], order.window_starts[1:], order.windows, strict=True):
        rows = order.rows[start:end]
        assert set((rows // block_rows).tolist()) == set(blocks.tolist())
        ranks = np.argsort(np.argsort(rows))
        correlations.append(np.corrcoef(np.arange(len(rows)), ranks)[0, 1] * len(rows) ** 0.5)
        same = (rows[1:] // block_rows == rows[:-1] // block_rows).mean()
        assert same == pytest.approx(1 / len(blocks), abs=4.5 * (1 / len(blocks) / len(rows)) ** 0.5)
    assert np.abs(correlations).max() < 4.5
    blocks_in_order = np.concatenate(order.windows)
    if window is not None:
        assert (
            abs(np.corrcoef(np.arange(len(blocks_in_order)), blocks_in_order)[0, 1]) < 4.5 / len(blocks_in_order) ** 0.5
        )


def test_k_epochs_show_each_draw_of_each_block_once() -> None:
    for cycle in (0, 2):
        draws = np.stack([choose_epoch_draws(50, 4, seed=7, epoch=4 * cycle + turn) for turn in range(4)])
        assert (np.sort(draws, axis=0) == np.arange(4)[:, None]).all()
        assert len({tuple(order) for order in draws.T.tolist()}) > 10, "blocks take their draws in different orders"


def test_values_are_those_of_the_store(run: Run) -> None:
    store = Store(run.couplings["webdataset"])
    batch = next(CouplingStream(store.url, 40, seed=3))
    for i, (index, draw) in enumerate(zip(batch.index.tolist(), batch.draw.tolist(), strict=True)):
        block, row = divmod(index, store.spec.block_rows)
        x = store.column("x", block)[row].astype(np.float32) / np.float32(127.5) - 1
        z = store.column("z", block, draw)[row].astype(np.float32) / store.sigma_f
        assert np.array_equal(batch.x[i].numpy(), x)
        assert np.array_equal(batch.z[i].numpy(), z)
        assert batch.label[i] == store.column("label", block)[row]


def test_both_layouts_stream_the_same_batches(run: Run) -> None:
    first, second = (CouplingStream(url, 50, seed=1) for url in run.couplings.values())
    for _ in range(6):
        a, b = next(first), next(second)
        assert all(torch.equal(vars(a)[name], vars(b)[name]) for name in vars(a))


def test_ranks_share_one_global_sequence_and_resume_it_at_another_world_size(run: Run) -> None:
    url = run.couplings["webdataset"]
    expected = read_keys(CouplingStream(url, 12, seed=5), 40)  # spans two epochs and more

    def read_part(world_size: int, num_batches: int, state: StreamState) -> tuple[list[tuple[int, int]], StreamState]:
        """Global batches from `state` on, read by `world_size` ranks, and the state after them."""
        streams = [CouplingStream(url, 12, seed=5, rank=rank, world_size=world_size) for rank in range(world_size)]
        keys: list[tuple[int, int]] = []
        for stream in streams:
            stream.state = state
        for _ in range(num_batches):
            for stream in streams:
                keys += read_keys(stream, 1)
        assert len({stream.state for stream in streams}) == 1
        return keys, streams[0].state

    sequence: list[tuple[int, int]] = []
    state = StreamState()
    for world_size, num_batches in ((1, 7), (4, 18), (3, 15)):
        keys, state = read_part(world_size, num_batches, state)
        sequence += keys
    assert sequence == expected


def test_a_batch_may_be_larger_than_the_store(run: Run) -> None:
    store = Store(run.couplings["webdataset"])
    rows = store.spec.rows
    stream = CouplingStream(store.url, 2 * rows, seed=0)
    index = next(stream).index.tolist()
    assert sorted(index[:rows]) == sorted(index[rows:]) == list(range(rows))
    assert stream.state == StreamState(epoch=2, position=0)


@pytest.mark.parametrize(
    ("batch", "rank", "world", "message"),
    [
        (0, 0, 1, "got global batch 0; expected a positive multiple of the world size 1"),
        (10, 0, 3, "got global batch 10; expected a positive multiple of the world size 3"),
        (12, 3, 3, "got rank 3; expected 0 to 2"),
        (12, -1, 3, "got rank -1; expected 0 to 2"),
        (12, 0, 0, "got world size 0; expected at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(run: Run, batch: int, rank: int, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CouplingStream(run.couplings["webdataset"], batch, 0, rank=rank, world_size=world)


def test_another_view_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="got view 'pair'; expected 'samples' or 'pairs'"):
        CouplingStream(run.couplings["webdataset"], 8, 0, "pair")  # type: ignore[arg-type]  # a typo is what is tested


def test_a_mixture_of_no_stores_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one store"):
        CouplingStream([], 8, seed=0)


@pytest.mark.parametrize("layout", ["webdataset", "zarr"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (1, 8, 8), (4, 33, 31)])
@pytest.mark.parametrize("rows", [31, 97])
def test_any_shape_and_length_is_gathered_as_stored(
    tmp_path: Path, layout: LayoutName, shape: tuple[int, int, int], rows: int
) -> None:
    """The stream, which gathers from all files at once, against the store, which reads block by block."""
    write_random_couplings(str(tmp_path), layout, shape, rows, draws=3)
    store = Store(str(tmp_path))
    with closing(CouplingStream(store.url, 2 * rows + 5, seed=1, window_blocks=2)) as stream:
        batch = next(stream)
    for i, (index, draw) in enumerate(zip(batch.index.tolist(), batch.draw.tolist(), strict=True)):
        block, row = divmod(index, 32)
        assert np.array_equal(
            batch.x[i].numpy(), store.column("x", block)[row].astype(np.float32) / np.float32(127.5) - 1
        )
        assert np.array_equal(batch.z[i].numpy(), store.z(block, draw)[row] / store.sigma_f)
        assert batch.label[i] == store.column("label", block)[row]


def test_a_mixture_has_its_weights_and_each_store_its_own_sequence(tmp_path: Path) -> None:
    urls = [f"{tmp_path}/{i}" for i in range(3)]
    for i, (url, rows) in enumerate(zip(urls, (97, 40, 64), strict=True)):
        write_random_couplings(url, "zarr" if i == 1 else "webdataset", (1, 4, 4), rows, draws=2, seed=i)
    sources = [Source(url, weight) for url, weight in zip(urls, (5.0, 2.0, 1.0), strict=True)]
    with closing(CouplingStream(sources, 100, seed=4)) as stream:
        batches = [next(stream) for _ in range(2 * MIXTURE_PERIOD // 100)]
        assert stream.state == StreamState(*divmod(2 * MIXTURE_PERIOD, 97 + 40 + 64))
    source = torch.cat([batch.source for batch in batches])
    assert torch.bincount(source[:MIXTURE_PERIOD]).tolist() == [6250, 2500, 1250]
    assert torch.bincount(source).tolist() == [12500, 5000, 2500]
    assert torch.unique(source[:50]).tolist() == [0, 1, 2], "mixed, not one after the other"
    for i, url in enumerate(urls):
        with closing(CouplingStream(url, 1250, seed=derive_source_seed(4, i))) as alone:
            single = next(alone)
        for name in ("x", "z", "label", "index", "draw"):
            from_source = torch.cat([getattr(batch, name) for batch in batches])[source == i]
            assert torch.equal(from_source[:1250], getattr(single, name))


@pytest.mark.parametrize(
    ("weights", "message"),
    [((1, 0), "positive"), ((1, -1), "positive"), ((1, float("nan")), "positive"), ((1, 1e-9), "at least")],
)
def test_invalid_weights_are_refused(run: Run, weights: tuple[float, float], message: str) -> None:
    sources = [Source(url, weight) for url, weight in zip(run.couplings.values(), weights, strict=True)]
    with pytest.raises(ValueError, match=message):
        CouplingStream(sources, 8, seed=0)


def test_stores_of_other_shapes_do_not_mix(run: Run, tmp_path: Path) -> None:
    write_random_couplings(str(tmp_path), "zarr", (1, 4, 4), 40, draws=2)
    with pytest.raises(StoreError, match="another shape"):
        CouplingStream([Source(run.couplings["zarr"]), Source(str(tmp_path))], 8, seed=0)


def test_memory_of_a_batch_is_reused_only_when_no_tensor_shares_it() -> None:
    pool = BufferPool()
    first = pool.allocate(4, 3, torch.float32)
    address, part = first.data_ptr(), first[1:2]
    assert pool.allocate(4, 3, torch.float32).data_ptr() != address
    del first
    assert pool.allocate(4, 3, torch.float32).data_ptr() != address, "a view still shares it"
    part += 1
    del part
    assert address in {tensor.data_ptr() for tensor in [pool.allocate(4, 3, torch.float32) for _ in range(3)]}


def test_no_code_runs_when_a_batch_goes() -> None:
    """Python drops an exception that is raised in the callback of a reference: a Ctrl-C there was lost."""
    pool = BufferPool()
    pool.allocate(4, 3, torch.float32)
    ((lent,),) = pool._lent.values()
    assert lent.view() is None and lent.view.__callback__ is None


def test_batches_kept_by_the_caller_do_not_change(run: Run) -> None:
    with closing(CouplingStream(run.couplings["zarr"], 16, seed=2)) as stream:
        batches = [next(stream) for _ in range(20)]
    with closing(CouplingStream(run.couplings["zarr"], 16, seed=2)) as stream:
        for batch in batches:
            assert torch.equal(batch.z, next(stream).z)


def test_setting_the_state_discards_what_was_prepared(run: Run) -> None:
    with closing(CouplingStream(run.couplings["zarr"], 16, seed=2)) as stream:
        batches = [next(stream) for _ in range(5)]
        stream.state = StreamState(0, 16)
        assert torch.equal(next(stream).index, batches[1].index)
        assert stream.state == StreamState(0, 32)
        last = Store(run.couplings["zarr"]).spec.rows - 1
        for state in (StreamState(0, last + 1), StreamState(0, -1), StreamState(-1, 0)):
            with pytest.raises(ValueError, match=f"expected epoch >= 0 and a position in 0 … {last}"):
                stream.state = state


@pytest.mark.parametrize("view", ["pairs", "samples"])
@pytest.mark.parametrize("mixed", [False, True])
def test_values_as_stored_become_the_same_floats(run: Run, view: View, mixed: bool) -> None:
    sources = [Source(url, weight) for url, weight in zip(run.couplings.values(), (1.0, 2.0), strict=True)]
    arguments: dict[str, Any] = {"url": sources if mixed else sources[0].url, "batch_size": 50, "seed": 1, "view": view}
    with closing(CouplingStream(**arguments)) as floats, closing(CouplingStream(**arguments, stored=True)) as stored:
        for _ in range(5):
            stored_batch = next(stored)
            expected = next(floats)
            assert stored_batch.x.dtype == torch.uint8
            assert view == "samples" or stored_batch.z.dtype == torch.float16
            assert floats.to_float(expected) is expected
            converted = stored.to_float(stored_batch)
            assert all(torch.equal(vars(converted)[name], vars(expected)[name]) for name in vars(expected))


def test_stores_of_the_same_images_do_not_give_them_side_by_side(run: Run) -> None:
    """Two teachers over one data set is what mixtures are for."""
    sources = [Source(url) for url in run.couplings.values()]
    with closing(CouplingStream(sources, 64, seed=0)) as stream:
        batches = [next(stream) for _ in range(40)]
    rows = Store(sources[0].url).spec.rows
    num_repeated = sum(len(batch.index) - len(torch.unique(batch.index)) for batch in batches)
    expected_by_chance = 40 * 64 * 63 / 2 / rows / 2  # pairs in a batch, from different stores, of the same row
    assert num_repeated < 2 * expected_by_chance


def test_a_damaged_index_file_is_found_again_by_a_retry(tmp_path: Path) -> None:
    """The labels of its block were read before it was found to be damaged."""
    write_random_couplings(str(tmp_path), "zarr", (1, 4, 4), 40, draws=1)
    damage(tmp_path, "columns.zarr/index/c/1", flip(0))
    with closing(CouplingStream(str(tmp_path), 40, seed=0)) as stream:
        for _ in range(2):
            with pytest.raises(StoreError, match=r"index/c/1: its sha256"):
                next(stream)
            stream.state = StreamState()  # discards the error of the first attempt


def test_a_closed_stream_says_so(run: Run) -> None:
    stream = CouplingStream(run.couplings["zarr"], 16, seed=2)
    next(stream)
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        next(stream)
    with pytest.raises(ValueError, match="closed"):
        stream.state = StreamState()
    stream.close()


# How a program ends: the last statement, and the exit code.
EXITS = {
    "end": ("", 0),
    "exit": ("raise SystemExit(3)", 3),
    "exception": ("1 / 0", 1),
    "batches alive": ("batches = [next(s) for _ in range(4)]", 0),
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("large"))
    write_random_couplings(url, "zarr", (3, 32, 32), 2048, draws=1)
    return url


@pytest.mark.parametrize(
    "name", ["end", "exception", *(pytest.param(name, marks=pytest.mark.long) for name in ("exit", "batches alive"))]
)
def test_a_program_may_end_with_a_stream_open(large: str, name: str) -> None:
    """A batch is being made when the interpreter ends, and no thread may read memory that it takes away."""
    last_statement, exit_code = EXITS[name]
    script = (
        "import sys\nfrom nfm.storage_specs.reading.stream import CouplingStream\n"
        f"s = CouplingStream(sys.argv[1], 8192, 0)\nfor _ in range(3): next(s)\n{last_statement}"
    )
    process = subprocess.run([sys.executable, "-c", script, large], capture_output=True, text=True, timeout=PATIENCE)
    assert process.returncode == exit_code, process.stderr
    has_traceback = "Traceback" in process.stderr
    has_zero_division = "ZeroDivisionError" in process.stderr
    assert has_traceback == has_zero_division == (name == "exception"), process.stderr
