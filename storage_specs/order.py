"""In which order training sees the rows of a store: a pure function of (seed, epoch), on any machine.

Permutations sort the raw words of a Philox stream, whose bits NumPy guarantees, unlike those of its `permutation`.
"""

import numpy as np
from numpy.typing import NDArray

_ROWS, _BLOCKS, _DRAWS = 1, 2, 3  # streams


def permutation(n: int, seed: int, stream: int, counter: int) -> NDArray[np.int64]:
    """A permutation of range(n), keyed by (seed, stream, counter)."""
    philox = np.random.Philox(
        key=np.array([seed, stream], dtype=np.uint64), counter=np.array([0, 0, counter, 0], dtype=np.uint64)
    )
    return np.argsort(philox.random_raw(n), kind="stable")


def epoch_rows(rows: int, block_rows: int, seed: int, epoch: int, window_blocks: int | None) -> NDArray[np.int64]:
    """Every row once. Blocks are shuffled, then the rows within each window of `window_blocks` of them, which is what a
    reader must hold at a time; None is one window over the whole store."""
    blocks = -(-rows // block_rows)
    if window_blocks is None or window_blocks >= blocks:
        return permutation(rows, seed, _ROWS, epoch)
    shuffled = permutation(blocks, seed, _BLOCKS, epoch)
    keys = permutation(rows, seed, _ROWS, epoch)  # one random key a row
    windows = []
    for start in range(0, blocks, window_blocks):
        parts = [
            np.arange(block * block_rows, min(rows, (block + 1) * block_rows), dtype=np.int64)
            for block in shuffled[start : start + window_blocks].tolist()
        ]
        window = np.concatenate(parts)
        windows.append(window[np.argsort(keys[window], kind="stable")])
    return np.concatenate(windows)


def epoch_draws(blocks: int, draws: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The draw of z that each block shows in an epoch, (blocks,): over any K epochs from a multiple of K on, each
    once.
    """
    cycle, turn = divmod(epoch, draws)
    words = np.random.Philox(
        key=np.array([seed, _DRAWS], dtype=np.uint64), counter=np.array([0, 0, cycle, 0], dtype=np.uint64)
    ).random_raw(blocks * draws)
    return np.argsort(words.reshape(blocks, draws), axis=1, kind="stable")[:, turn]
