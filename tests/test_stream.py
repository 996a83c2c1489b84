"""The order of training data: pure in (seed, epoch, position), whatever the readers."""

import numpy as np
import pytest
import torch

from storage_specs.order import epoch_draws, epoch_order, permutation
from storage_specs.store import Store
from storage_specs.stream import CouplingStream, StreamState
from tests.conftest import Run


def keys(stream: CouplingStream, batches: int) -> list[tuple[int, int]]:
    """(index, draw) of each sample."""
    out: list[tuple[int, int]] = []
    for _ in range(batches):
        batch = next(stream)
        out += zip(batch.index.tolist(), batch.draw.tolist(), strict=True)
    return out


def test_frozen_permutation() -> None:
    assert permutation(8, seed=1, stream=1, counter=0).tolist() == [0, 6, 5, 3, 4, 7, 2, 1]


@pytest.mark.parametrize("window", [None, 1, 3])
def test_an_epoch_shows_every_row_once(window: int | None) -> None:
    rows = epoch_order(100, 16, seed=0, epoch=3, window_blocks=window).rows
    assert sorted(rows.tolist()) == list(range(100))
    assert not np.array_equal(rows, epoch_order(100, 16, seed=0, epoch=4, window_blocks=window).rows)


def test_a_window_holds_few_blocks_at_a_time() -> None:
    blocks = epoch_order(160, 16, seed=0, epoch=0, window_blocks=2).rows // 16
    for window in blocks.reshape(-1, 32):
        assert len(set(window.tolist())) == 2


def test_the_shuffle_is_one() -> None:
    """Rank correlation with the stored order, and neighbours from one block, as chance would have them."""
    n, block_rows = 20_000, 200
    rows = epoch_order(n, block_rows, seed=0, epoch=0, window_blocks=None).rows
    assert abs(np.corrcoef(np.arange(n), rows)[0, 1]) < 4.5 / n**0.5
    same = (rows[1:] // block_rows == rows[:-1] // block_rows).mean()
    assert same == pytest.approx(block_rows / n, abs=4.5 * (block_rows / n / n) ** 0.5)


def test_k_epochs_show_each_draw_of_each_block_once() -> None:
    for cycle in (0, 2):
        draws = np.stack([epoch_draws(50, 4, seed=7, epoch=4 * cycle + turn) for turn in range(4)])
        assert (np.sort(draws, axis=0) == np.arange(4)[:, None]).all()
        assert len({tuple(order) for order in draws.T.tolist()}) > 10, "blocks take their draws in different orders"


def test_values_are_those_of_the_store(run: Run) -> None:
    store = Store(run.couplings["webdataset"])
    batch = next(CouplingStream(store.url, 40, seed=3))
    for i, (index, draw) in enumerate(zip(batch.index.tolist(), batch.draw.tolist(), strict=True)):
        block, row = divmod(index, store.spec.block_rows)
        x = store.column("x", block)[row].astype(np.float32) / np.float32(127.5) - 1
        z = store.column("z", block, draw)[row].astype(np.float32) / store.sigma_f
        np.testing.assert_allclose(batch.x[i].numpy(), x, atol=1e-6)
        np.testing.assert_allclose(batch.z[i].numpy(), z, rtol=1e-6)
        assert batch.label[i] == store.column("label", block)[row]


def test_both_layouts_stream_the_same_batches(run: Run) -> None:
    first, second = (CouplingStream(url, 50, seed=1) for url in run.couplings.values())
    for _ in range(6):
        a, b = next(first), next(second)
        assert all(torch.equal(vars(a)[name], vars(b)[name]) for name in vars(a))


def test_ranks_share_one_global_sequence_and_resume_it_at_another_world_size(run: Run) -> None:
    url = run.couplings["webdataset"]
    whole = keys(CouplingStream(url, 12, seed=5), 40)  # spans two epochs and more

    def part(world: int, batches: int, state: StreamState) -> tuple[list[tuple[int, int]], StreamState]:
        streams = [CouplingStream(url, 12, seed=5, rank=rank, world_size=world) for rank in range(world)]
        got: list[tuple[int, int]] = []
        for stream in streams:
            stream.state = state
        for _ in range(batches):
            for stream in streams:
                got += keys(stream, 1)
        assert len({stream.state for stream in streams}) == 1
        return got, streams[0].state

    sequence: list[tuple[int, int]] = []
    state = StreamState()
    for world, batches in ((1, 7), (4, 18), (3, 15)):
        got, state = part(world, batches, state)
        sequence += got
    assert sequence == whole


def test_a_batch_may_be_larger_than_the_store(run: Run) -> None:
    store = Store(run.couplings["webdataset"])
    rows = store.spec.rows
    stream = CouplingStream(store.url, 2 * rows, seed=0)
    index = next(stream).index.tolist()
    assert sorted(index[:rows]) == sorted(index[rows:]) == list(range(rows))
    assert stream.state == StreamState(epoch=2, position=0)


@pytest.mark.parametrize(("batch", "rank", "world"), [(0, 0, 1), (10, 0, 3), (12, 3, 3), (12, -1, 3)])
def test_sizes_that_do_not_fit_are_refused(run: Run, batch: int, rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="global batch"):
        CouplingStream(run.couplings["webdataset"], batch, 0, rank=rank, world_size=world)
