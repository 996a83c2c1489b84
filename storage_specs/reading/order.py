"""In which order training sees the rows of a store: a pure function of (seed, epoch), on any machine.

Permutations sort raw words of a Philox stream, whose bits NumPy guarantees, unlike those of its `permutation`.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROWS, _BLOCKS, _DRAWS, _MIXTURE = 1, 2, 3, 4  # streams
MIXTURE_PERIOD = 10_000  # samples in which a mixture has exactly its weights


def permutation(n: int, seed: int, stream: int, counter: int) -> NDArray[np.int64]:
    """A permutation of range(n), keyed by (seed, stream, counter): the numbers in the order of random words, in whose
    low bits they are written, so that no two words are equal and one plain sort gives the order."""
    philox = np.random.Philox(
        key=np.array([seed, stream], dtype=np.uint64), counter=np.array([0, 0, counter, 0], dtype=np.uint64)
    )
    mask = np.uint64((1 << max(n - 1, 1).bit_length()) - 1)
    words = philox.random_raw(n) & ~mask | np.arange(n, dtype=np.uint64)
    words.sort()
    return (words & mask).astype(np.int64)


@dataclass(frozen=True)
class EpochOrder:
    """`rows` (N,) is every row once. It falls into windows, each a shuffle of the rows of the blocks in `windows[i]`;
    `starts[i]` is where window i begins, and `starts[-1]` is N."""

    rows: NDArray[np.int64]
    windows: list[NDArray[np.int64]]
    starts: list[int]


def epoch_windows(blocks: int, seed: int, epoch: int, window_blocks: int | None) -> list[NDArray[np.int64]]:
    """The blocks of each window of an epoch: what a reader must hold at a time."""
    if window_blocks is None or window_blocks >= blocks:
        return [np.arange(blocks)]
    shuffled = permutation(blocks, seed, _BLOCKS, epoch)
    return [shuffled[start : start + window_blocks] for start in range(0, blocks, window_blocks)]


def epoch_order(rows: int, block_rows: int, seed: int, epoch: int, window_blocks: int | None) -> EpochOrder:
    """Blocks are shuffled, then the rows within each window of `window_blocks` of them; None is one window over the
    whole store."""
    windows = epoch_windows(-(-rows // block_rows), seed, epoch, window_blocks)
    shuffled = permutation(rows, seed, _ROWS, epoch)
    if len(windows) == 1:
        return EpochOrder(shuffled, windows, [0, rows])
    window_of_block = np.empty(sum(map(len, windows)), dtype=np.int64)
    for number, window in enumerate(windows):
        window_of_block[window] = number
    window_of = window_of_block[shuffled // block_rows]
    starts = np.concatenate([[0], np.cumsum(np.bincount(window_of, minlength=len(windows)))])
    return EpochOrder(shuffled[np.argsort(window_of, kind="stable")], windows, starts.tolist())


def epoch_draws(blocks: int, draws: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The draw of z that each block shows in an epoch, (blocks,): over any K epochs from a multiple of K on, each
    once.
    """
    cycle, turn = divmod(epoch, draws)
    words = np.random.Philox(
        key=np.array([seed, _DRAWS], dtype=np.uint64), counter=np.array([0, 0, cycle, 0], dtype=np.uint64)
    ).random_raw(blocks * draws)
    return np.argsort(words.reshape(blocks, draws), axis=1, kind="stable")[:, turn]


def source_seed(seed: int, number: int) -> int:
    """The seed of a store's own order in a mixture: stores made of the same images must not show them together."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "big")


class Mixture:
    """Which store each sample of a mixture comes from: in every MIXTURE_PERIOD samples each store has its share
    exactly, in an order keyed by (seed, period)."""

    def __init__(self, weights: list[float], seed: int) -> None:
        """Raises ValueError unless the weights are positive, finite, and not too small beside their sum."""
        self.seed = seed
        shares = np.array(weights, dtype=np.float64)
        if not (np.isfinite(shares) & (shares > 0)).all():
            raise ValueError(f"got weights {weights}; expected positive numbers")
        shares *= MIXTURE_PERIOD / shares.sum()
        self.quotas = np.floor(shares).astype(np.int64)
        left = MIXTURE_PERIOD - int(self.quotas.sum())
        self.quotas[np.argsort(self.quotas - shares, kind="stable")[:left]] += 1  # largest remainders
        if not self.quotas.all():
            raise ValueError(f"got weights {weights}; expected each at least 1/{MIXTURE_PERIOD} of their sum")

    def _period(self, period: int) -> NDArray[np.int64]:
        names = np.repeat(np.arange(len(self.quotas)), self.quotas)
        return names[permutation(MIXTURE_PERIOD, self.seed, _MIXTURE, period)]

    def sources(self, start: int, count: int) -> NDArray[np.int64]:
        """The store of each of the samples start … start + count, (count,)."""
        periods = range(start // MIXTURE_PERIOD, (start + count - 1) // MIXTURE_PERIOD + 1)
        offset = start % MIXTURE_PERIOD
        return np.concatenate([self._period(period) for period in periods])[offset : offset + count]

    def counts(self, start: int) -> NDArray[np.int64]:
        """How many samples of each store come before sample `start`."""
        period, offset = divmod(start, MIXTURE_PERIOD)
        within = np.bincount(self._period(period)[:offset], minlength=len(self.quotas))
        return period * self.quotas + within
