"""Making one batch: its memory, the samples of one store or of a mixture of stores, the conversion to float32."""

import weakref
from collections import deque
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nfm.storage_specs.format.pixels import scale_x
from nfm.storage_specs.reading.order import Mixture
from nfm.storage_specs.reading.rows import RowReader, SampleBuffers

MAX_LOOKS = 8  # at memory that may be free, each time that some is needed


@dataclass(frozen=True)
class Batch:
    """B samples.

    For the view "samples", z is empty and draw is -1. Labels are -1 where the store has no classes. For a stream with
    `stored`, x and z have the dtypes and the values of the files, until `CouplingStream.to_float` converts them.
    """

    x: torch.Tensor  # (B, C, H, W) float32: pixels in [-1, 1], or latents
    z: torch.Tensor  # (B, C, H, W) float32: z / σ_f
    label: torch.Tensor  # (B,) int64
    index: torch.Tensor  # (B,) int64: the row of the store
    draw: torch.Tensor  # (B,) int64: which noise draw z comes from
    source: torch.Tensor  # (B,) int64: which store of a mixture the sample comes from, 0 if there is only one

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; from pinned memory, the copy runs in the background."""
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


class LentMemory(NamedTuple):
    """Memory of a batch, and a reference to the view that its tensors share."""

    memory: NDArray[np.uint8]
    view: "weakref.ref[NDArray[np.uint8]]"


class BufferPool:
    """Memory for batches, which is reused when no tensor shares it any more.

    New memory would cost a page fault for every 4 KiB. With CUDA, memory is pinned, and torch has such a pool itself.
    Nothing is called when a tensor goes: Python drops an exception that is raised then, such as that of a Ctrl-C.
    """

    def __init__(self) -> None:
        self._pinned = torch.cuda.is_available()
        self._lent: dict[int, deque[LentMemory]] = {}  # by size in bytes

    def allocate(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor (rows, columns) with arbitrary content."""
        if self._pinned:
            return torch.empty(rows, columns, dtype=dtype, pin_memory=True)
        num_bytes = rows * columns * dtype.itemsize
        lent = self._lent.setdefault(num_bytes, deque())
        memory = self._take_back(lent)
        if memory is None:
            memory = np.empty(num_bytes, dtype=np.uint8)
        # The tensor, and every tensor made from it, keeps this view alive, but not `memory`.
        view = memory.view()
        lent.append(LentMemory(memory, weakref.ref(view)))
        return torch.from_numpy(view).view(dtype).view(rows, columns)

    @staticmethod
    def _take_back(lent: "deque[LentMemory]") -> NDArray[np.uint8] | None:
        """Memory that no tensor shares any more, taken out of `lent`, or None. It looks at a few each time, so that
        whoever keeps many batches does not make the others slow."""
        for _ in range(min(len(lent), MAX_LOOKS)):
            candidate = lent.popleft()
            if candidate.view() is None:
                return candidate.memory
            lent.append(candidate)
        return None


class BatchMaker:
    """Makes any batch of the global sequence, for rank `rank` of `world_size`.

    `readers` are the stores of `mixture`, in its order. `batch_size` is that of the global batch, a multiple of
    `world_size`. With `stored`, batches hold the values of the files.
    """

    def __init__(
        self, readers: list[RowReader], mixture: Mixture, batch_size: int, rank: int, world_size: int, stored: bool
    ) -> None:
        self._readers, self._mixture, self._stored = readers, mixture, stored
        self._rank_batch_size = batch_size // world_size
        self._rank_offset = rank * self._rank_batch_size
        self._shape = readers[0].spec.shape
        self._dim = readers[0].spec.dim
        self._pool = BufferPool()

    def make_batch(self, start: int) -> Batch:
        """This rank's slice of the global batch that begins at sample `start`. Raises StoreError for a bad file."""
        rank_start = start + self._rank_offset
        size = self._rank_batch_size
        buffers = self._allocate_buffers(size)
        if len(self._readers) == 1:
            sources = np.zeros(size, dtype=np.int64)
            self._readers[0].read(rank_start, buffers)
        else:
            sources = self._mixture.choose_sources(rank_start, size)
            self._read_mixture(rank_start, sources, buffers)
        return Batch(
            x=buffers.x.view(size, *self._shape),
            z=torch.empty(0, *self._shape) if buffers.z is None else buffers.z.view(size, *self._shape),
            label=buffers.label,
            index=buffers.index,
            draw=buffers.draw,
            source=torch.from_numpy(sources),
        )

    def _allocate_buffers(self, size: int) -> SampleBuffers:
        """Memory for `size` samples."""
        x_dtype = self._readers[0].x.dtype if self._stored else torch.float32
        z = None
        z_column = self._readers[0].z
        if z_column is not None:
            z_dtype = z_column.dtype if self._stored else torch.float32
            z = self._pool.allocate(size, self._dim, z_dtype)
        return SampleBuffers(
            x=self._pool.allocate(size, self._dim, x_dtype),
            z=z,
            label=torch.empty(size, dtype=torch.int64),
            index=torch.empty(size, dtype=torch.int64),
            draw=torch.empty(size, dtype=torch.int64),
            stored=self._stored,
        )

    def _read_mixture(self, start: int, sources: NDArray[np.int64], buffers: SampleBuffers) -> None:
        """Fill the buffers with the samples from `start` on, whose stores are `sources`, (B,)."""
        samples_before = self._mixture.count_samples_before(start)
        for source, reader in enumerate(self._readers):
            batch_rows = torch.from_numpy(np.flatnonzero(sources == source))
            if len(batch_rows) == 0:
                continue
            part = _allocate_like(buffers, len(batch_rows))
            reader.read(int(samples_before[source]), part)
            buffers.x[batch_rows] = part.x
            if buffers.z is not None and part.z is not None:
                buffers.z[batch_rows] = part.z
            buffers.label[batch_rows] = part.label
            buffers.index[batch_rows] = part.index
            buffers.draw[batch_rows] = part.draw

    def to_float(self, batch: Batch) -> Batch:
        """A batch of this maker with x and z / σ_f, float32 on the device of the batch.

        Without `stored` batches are so already, and the batch itself is returned.
        """
        if not self._stored:
            return batch
        x = scale_x(batch.x, self._readers[0].spec.x, out=torch.empty_like(batch.x, dtype=torch.float32))
        if len(batch.z) == 0:
            z = torch.empty_like(batch.z, dtype=torch.float32)
        elif len(self._readers) == 1:
            z = self._scale_z(self._readers[0], batch.z)
        else:
            z = torch.empty_like(batch.z, dtype=torch.float32)
            for source, reader in enumerate(self._readers):
                is_from_source = batch.source == source
                z[is_from_source] = self._scale_z(reader, batch.z[is_from_source])
        return replace(batch, x=x, z=z)

    def _scale_z(self, reader: RowReader, stored_z: torch.Tensor) -> torch.Tensor:
        """z / σ_f, (B, C, H, W) float32, of samples of one store from their z as its files hold it."""
        rows = stored_z.flatten(1)
        scaled = reader.scale_z(rows, out=torch.empty_like(rows, dtype=torch.float32))
        return scaled.view(-1, *self._shape)

    def close(self) -> None:
        """Close all readers."""
        for reader in self._readers:
            reader.close()


def _allocate_like(buffers: SampleBuffers, size: int) -> SampleBuffers:
    """Ordinary memory for `size` samples in the dtypes of the buffers."""
    return SampleBuffers(
        x=torch.empty_like(buffers.x[:size]),
        z=None if buffers.z is None else torch.empty_like(buffers.z[:size]),
        label=torch.empty_like(buffers.label[:size]),
        index=torch.empty_like(buffers.index[:size]),
        draw=torch.empty_like(buffers.draw[:size]),
        stored=buffers.stored,
    )
