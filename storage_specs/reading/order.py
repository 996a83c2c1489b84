"""The order in which training sees the rows of a store: a pure function of (seed, epoch), the same on any machine.

Everything random here comes from raw words of NumPy's Philox generator. NumPy guarantees their bits, but not those of
`Generator.permutation`, so permutations are made by sorting such words.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# The second word of the Philox key, so that each use of one seed has random words of its own.
_ROW_STREAM = 1
_BLOCK_STREAM = 2
_DRAW_STREAM = 3
_MIXTURE_STREAM = 4

MIXTURE_PERIOD = 10_000  # samples; in each such period of a mixture, every store has exactly its share


def _random_words(count: int, seed: int, stream: int, counter: int) -> NDArray[np.uint64]:
    """`count` random words of 64 bits, keyed by (seed, stream, counter)."""
    philox = np.random.Philox(
        key=np.array([seed, stream], dtype=np.uint64), counter=np.array([0, 0, counter, 0], dtype=np.uint64)
    )
    return philox.random_raw(count)


def permutation(n: int, seed: int, stream: int, counter: int) -> NDArray[np.int64]:
    """A random permutation of range(n), (n,), keyed by (seed, stream, counter).

    It draws n random words, overwrites the low bits of the i-th with i, and sorts them: the low bits are then the
    permutation. No two words are equal, so every sorting algorithm gives the same order.
    """
    num_bits = max(n - 1, 1).bit_length()
    low_bits = np.uint64((1 << num_bits) - 1)
    words = _random_words(n, seed, stream, counter)
    words &= ~low_bits
    words |= np.arange(n, dtype=np.uint64)
    words.sort()
    return (words & low_bits).astype(np.int64)


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch, in which every row of the store occurs once.

    It consists of windows, one after the other. A window is a shuffle of all rows of some blocks, so while it is read,
    only the files of these blocks are needed.
    """

    rows: NDArray[np.int64]  # (N,): the row of the store at each position of the epoch
    windows: list[NDArray[np.int64]]  # the blocks of each window
    window_starts: list[int]  # the position at which each window begins, and at the end N


def list_epoch_windows(num_blocks: int, seed: int, epoch: int, window_blocks: int | None) -> list[NDArray[np.int64]]:
    """The blocks of each window of an epoch: all blocks, shuffled, `window_blocks` at a time.

    Without `window_blocks`, or if it is not smaller than the store, there is one window of all blocks.
    """
    if window_blocks is None or window_blocks >= num_blocks:
        return [np.arange(num_blocks)]
    blocks = permutation(num_blocks, seed, _BLOCK_STREAM, epoch)
    return [blocks[start : start + window_blocks] for start in range(0, num_blocks, window_blocks)]


def make_epoch_order(num_rows: int, block_rows: int, seed: int, epoch: int, window_blocks: int | None) -> EpochOrder:
    """The order of an epoch over `num_rows` rows in blocks of `block_rows` (the last block may be shorter).

    Blocks are shuffled, then the rows within each window of `window_blocks` blocks (see `list_epoch_windows`).
    """
    num_blocks = -(-num_rows // block_rows)
    windows = list_epoch_windows(num_blocks, seed, epoch, window_blocks)
    shuffled_rows = permutation(num_rows, seed, _ROW_STREAM, epoch)
    if len(windows) == 1:
        return EpochOrder(shuffled_rows, windows, [0, num_rows])
    window_of_block = np.empty(num_blocks, dtype=np.int64)
    for window, blocks in enumerate(windows):
        window_of_block[blocks] = window
    window_of_row = window_of_block[shuffled_rows // block_rows]
    # A stable sort by window keeps the shuffled order inside each window.
    rows = shuffled_rows[np.argsort(window_of_row, kind="stable")]
    window_sizes = np.bincount(window_of_row, minlength=len(windows))
    window_starts = [0, *np.cumsum(window_sizes).tolist()]
    return EpochOrder(rows, windows, window_starts)


def choose_epoch_draws(num_blocks: int, num_draws: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The draw of z that an epoch reads of each block, (num_blocks,).

    `num_draws` epochs make a cycle, in which each block goes through all its draws once, in a random order of its own.
    """
    cycle, epoch_in_cycle = divmod(epoch, num_draws)
    words = _random_words(num_blocks * num_draws, seed, _DRAW_STREAM, cycle)
    draw_orders = np.argsort(words.reshape(num_blocks, num_draws), axis=1, kind="stable")  # a permutation in each row
    return draw_orders[:, epoch_in_cycle]


def derive_source_seed(seed: int, source: int) -> int:
    """The seed for the order of the store with index `source` in a mixture.

    Each store has another one, so that two stores made of the same images do not give the same images side by side.
    Store 0 has the seed itself: a mixture of one store is that store.
    """
    if source == 0:
        return seed
    digest = hashlib.sha256(f"{seed} {source}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


class Mixture:
    """Which store of a mixture each sample comes from: a pure function of (seed, sample number).

    The sequence consists of periods of MIXTURE_PERIOD samples. In each, every store has exactly its share of the
    samples, in an order keyed by (seed, period).
    """

    def __init__(self, weights: list[float], seed: int) -> None:
        """`weights` are the shares of the stores, relative to each other.

        Raises ValueError unless they are positive, finite, and each at least 1 / MIXTURE_PERIOD of their sum.
        """
        self.seed = seed
        shares = np.array(weights, dtype=np.float64)
        if not ((shares >= 1e-100) & (shares <= 1e100)).all():  # so that their sum is finite
            raise ValueError(f"got weights {weights}; expected positive numbers, from 1e-100 to 1e100")
        shares *= MIXTURE_PERIOD / shares.sum()
        # Samples of each store in a period: shares rounded down, and one more for those with the largest remainders.
        self.quotas = np.floor(shares).astype(np.int64)
        remaining = MIXTURE_PERIOD - int(self.quotas.sum())
        by_remainder = np.argsort(self.quotas - shares, kind="stable")
        self.quotas[by_remainder[:remaining]] += 1
        if not self.quotas.all():
            raise ValueError(f"got weights {weights}; expected each at least 1/{MIXTURE_PERIOD} of their sum")

    def _choose_period_sources(self, period: int) -> NDArray[np.int64]:
        """The store of each sample of a period, (MIXTURE_PERIOD,)."""
        sources = np.repeat(np.arange(len(self.quotas)), self.quotas)
        return sources[permutation(MIXTURE_PERIOD, self.seed, _MIXTURE_STREAM, period)]

    def choose_sources(self, start: int, count: int) -> NDArray[np.int64]:
        """The store of each of the samples start … start + count - 1, (count,)."""
        first_period, offset = divmod(start, MIXTURE_PERIOD)
        last_period = (start + count - 1) // MIXTURE_PERIOD
        periods = [self._choose_period_sources(period) for period in range(first_period, last_period + 1)]
        return np.concatenate(periods)[offset : offset + count]

    def count_samples_before(self, start: int) -> NDArray[np.int64]:
        """How many of the samples 0 … start - 1 come from each store, (stores,)."""
        period, offset = divmod(start, MIXTURE_PERIOD)
        sources = self._choose_period_sources(period)[:offset]
        return period * self.quotas + np.bincount(sources, minlength=len(self.quotas))
