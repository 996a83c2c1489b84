"""Other ways to keep (x, z, label) pairs and read them as shuffled training batches, each as its documentation has it.

    python peers.py write --root DIR --peer NAME    # that peer's own format, in DIR/NAME
    python peers.py read --root DIR --peer NAME     # one line of JSON

DIR holds x.npy (uint8, N C H W), z.npy (float16, K N C H W), label.npy (int64, N) and sigma_f.npy (float32, C H W). A
sample is one pair, an image with one of its K draws, and an epoch is all N·K of them; every reader ends with the same
`to_batch`, so only the reading differs. Files are read once before the clock starts: they come from the page cache.

This file runs in an environment of its own, see requirements-peers.txt, and imports nothing of the project.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Raw = tuple[Any, Any, Any]  # x uint8, z float16 and label of a batch, as arrays or tensors
WINDOW = 2048


@dataclass(frozen=True)
class Case:
    """The arrays to store: `shape` of an image, `images` of them, each with `draws`. Pair p is draw p // images."""

    root: Path
    shape: tuple[int, ...]
    images: int
    draws: int

    @classmethod
    def open(cls, root: Path) -> "Case":
        draws, images, *shape = np.load(root / "z.npy", mmap_mode="r").shape
        return cls(root, tuple(shape), images, draws)

    @property
    def pairs(self) -> int:
        return self.images * self.draws

    @property
    def pixels(self) -> int:
        return int(np.prod(self.shape))

    def arrays(self) -> Raw:
        """x (N, ...), z (K·N, ...) and label (N) in memory."""
        x, z, label = (np.load(self.root / f"{name}.npy") for name in ("x", "z", "label"))
        return x, z.reshape(-1, *self.shape), label

    def samples(self) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Every pair, in random order: formats that shuffle only nearby samples ask for that when written."""
        x, z, label = self.arrays()
        for pair in np.random.default_rng(0).permutation(self.pairs):
            yield x[pair % self.images], z[pair], int(label[pair % self.images])


def orders(rows: int, batch: int, epochs: int) -> Iterator[np.ndarray]:
    """Indices of each batch, in an order shuffled over all rows."""
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(rows)
        yield from (order[start : start + batch] for start in range(0, rows - batch + 1, batch))


def outputs(rows: int, case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.empty((rows, *case.shape), np.uint8), np.empty((rows, *case.shape), np.float16), np.empty(rows, np.int64)


def window_shuffle(pieces: Iterable[Raw], case: Case, batch: int) -> Iterator[Raw]:
    """Batches drawn at random from windows of `WINDOW` pairs, filled with pieces as they come."""
    window, out, rng, filled = outputs(WINDOW, case), outputs(batch, case), np.random.default_rng(0), 0

    def flush() -> Iterator[Raw]:
        order = rng.permutation(filled)
        for start in range(0, filled - batch + 1, batch):
            for source, target in zip(window, out, strict=True):
                np.take(source, order[start : start + batch], axis=0, out=target, mode="clip")
            yield out
        rest = order[filled // batch * batch :]
        for source in window:
            source[: len(rest)] = source[rest]

    for piece in pieces:
        if filled + len(piece[2]) > WINDOW:
            yield from flush()
            filled %= batch
        for target, source in zip(window, piece, strict=True):
            target[filled : filled + len(source)] = source
        filled += len(piece[2])
    yield from flush()


# WebDataset -----------------------------------------------------------------------------------------------------------


def write_webdataset(case: Case, folder: Path) -> None:
    import webdataset as wds

    with wds.ShardWriter(f"{folder}/%06d.tar", maxcount=1000, verbose=0) as shards:
        for i, (x, z, label) in enumerate(case.samples()):
            shards.write({"__key__": f"{i:08d}", "x.npy": x, "z.npy": z, "cls": label})


def read_webdataset(case: Case, folder: Path, batch: int, epochs: int) -> Iterator[Raw]:
    import webdataset as wds

    urls = sorted(map(str, folder.glob("*.tar")))
    data = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode()
    for _ in range(epochs):
        yield from data.to_tuple("x.npy", "z.npy", "cls").batched(batch)


def write_webdataset_raw(case: Case, folder: Path) -> None:
    import webdataset as wds

    with wds.ShardWriter(f"{folder}/%06d.tar", maxcount=1000, verbose=0) as shards:
        for i, (x, z, label) in enumerate(case.samples()):
            shards.write({"__key__": f"{i:08d}", "x.bin": x.tobytes(), "z.bin": z.tobytes(), "cls": label})


def read_webdataset_raw(case: Case, folder: Path, batch: int, epochs: int) -> Iterator[Raw]:
    import webdataset as wds

    def join(samples: list[tuple[bytes, bytes, bytes]]) -> Raw:  # one frombuffer a batch: faster than one a member
        x, z, label = zip(*samples, strict=True)
        images = np.frombuffer(bytearray().join(x), np.uint8).reshape(-1, *case.shape)
        codes = np.frombuffer(bytearray().join(z), np.float16).reshape(-1, *case.shape)
        return images, codes, np.array([int(text) for text in label])

    urls = sorted(map(str, folder.glob("*.tar")))
    data = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).to_tuple("x.bin", "z.bin", "cls")
    for _ in range(epochs):
        yield from data.batched(batch, collation_fn=join)
