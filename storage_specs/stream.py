"""Streaming a store into training: endless shuffled batches whose order depends on (seed, epoch, position) alone."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from storage_specs.errors import StoreError
from storage_specs.order import epoch_draws, epoch_rows
from storage_specs.pixels import to_float
from storage_specs.store import Store, gather

View = Literal["samples", "pairs"]


@dataclass(frozen=True)
class StreamState:
    """Where the global sequence stands: `position` samples into `epoch`."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class Batch:
    """x (B, C, H, W) float32 in [-1, 1]; z / σ_f (B, C, H, W) float32, empty for the view "samples"; label and index
    (B,) int64; draw (B,) int64, -1 for the view "samples"."""

    x: torch.Tensor
    z: torch.Tensor
    label: torch.Tensor
    index: torch.Tensor
    draw: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


class CouplingStream:
    """Batches of a coupling store ("pairs": x with one draw of z) or of any store ("samples": x alone).

    `batch_size` is the global batch, of which rank r of `world_size` gets its r-th slice, so the global sequence does
    not depend on the number of readers. Epochs follow each other without a gap: a batch may span two of them. Set
    `state` to continue a sequence. Raises StoreError for a broken store, ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        url: str,
        batch_size: int,
        seed: int,
        view: View = "pairs",
        rank: int = 0,
        world_size: int = 1,
        window_blocks: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"got global batch {batch_size} for rank {rank} of {world_size}; expected a positive multiple of "
                "the world size"
            )
        self.store = Store(url, kind="couplings" if view == "pairs" else None, options=options)
        self.batch_size, self.seed, self.view = batch_size, seed, view
        self.rank, self.world_size, self.window_blocks = rank, world_size, window_blocks
        self.state = StreamState()
        self._labels = self.store.labels()
        self._cached: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        self._inverse_sigma = 1 / self.store.sigma_f if view == "pairs" else None

    def _plan(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows of an epoch in order, and the draw of each (-1 for the view "samples")."""
        if self._cached is None or self._cached[0] != epoch:
            spec = self.store.spec
            rows = epoch_rows(spec.rows, spec.block_rows, self.seed, epoch, self.window_blocks)
            draws = np.full(len(rows), -1, dtype=np.int64)
            if self.view == "pairs":
                draws = epoch_draws(spec.blocks, spec.draws, self.seed, epoch)[rows // spec.block_rows]
            self._cached = epoch, rows, draws
        return self._cached[1:]

    def _take(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and draws of the next `count` samples of the global sequence; moves the state past them."""
        parts: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        epoch, position = self.state.epoch, self.state.position
        while count:
            rows, draws = self._plan(epoch)
            parts.append((rows[position : position + count], draws[position : position + count]))
            taken = len(parts[-1][0])
            count -= taken
            position += taken
            if position == len(rows):
                epoch, position = epoch + 1, 0
        self.state = StreamState(epoch, position)
        return np.concatenate([rows for rows, _ in parts]), np.concatenate([draws for _, draws in parts])

    def __iter__(self) -> "CouplingStream":
        return self

    def __next__(self) -> Batch:
        rows, draw = self._take(self.batch_size)
        share = self.batch_size // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        rows, draw = rows[mine], draw[mine]
        x = self.store.images(rows)
        return Batch(
            x=to_float(x),
            z=torch.from_numpy(self._z(rows, draw)),
            label=torch.from_numpy(self._labels[rows]),
            index=torch.from_numpy(rows),
            draw=torch.from_numpy(draw),
        )

    def _z(self, rows: NDArray[np.int64], draw: NDArray[np.int64]) -> NDArray[np.float32]:
        spec = self.store.spec
        if self._inverse_sigma is None:
            return np.empty((0, *spec.shape), dtype=np.float32)
        z = np.empty((len(rows), *spec.shape), dtype=np.float32)
        for k in np.unique(draw).tolist():
            here = np.flatnonzero(draw == k)
            part = np.empty((len(here), *spec.shape), dtype=np.float32)
            gather(part, rows[here], spec.block_rows, lambda block, k=k: self.store.column("z", block, k))
            z[here] = part
        if not np.isfinite(z).all():
            bad = rows[~np.isfinite(z).all(axis=(1, 2, 3))]
            raise StoreError(f"{self.store.url}: z of image {bad[0]} is not finite; verify the store")
        z *= self._inverse_sigma
        return z
