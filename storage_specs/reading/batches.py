"""Making one batch: buffers, the rows of one store or of a mixture, and the conversion to float32."""

import weakref
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from nfm.storage_specs.format.pixels import scale_pixels
from nfm.storage_specs.reading.order import Mixture
from nfm.storage_specs.reading.rows import RowReader


@dataclass(frozen=True)
class Batch:
    """x (B, C, H, W) float32 in [-1, 1]; z / σ_f (B, C, H, W) float32, empty for the view "samples"; label and index
    (B,) int64; draw (B,) int64, -1 for the view "samples"; source (B,) int64, which store of a mixture.

    Of a stream with `stored`, x is uint8 and z as the files hold it, until `CouplingStream.to_float`.
    """

    x: torch.Tensor
    z: torch.Tensor
    label: torch.Tensor
    index: torch.Tensor
    draw: torch.Tensor
    source: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


class Buffers:
    """Memory for batches, used again once nobody holds the batch: fresh memory costs a page fault every 4 KiB.

    With CUDA, torch does the same for pinned memory.
    """

    def __init__(self) -> None:
        self._pinned = torch.cuda.is_available()
        self._free: dict[int, list[NDArray[np.uint8]]] = {}
        self._lent: dict[int, weakref.ref[NDArray[np.uint8]]] = {}

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        if self._pinned:
            return torch.empty(rows, columns, dtype=dtype, pin_memory=True)
        size = rows * columns * dtype.itemsize
        free = self._free.setdefault(size, [])
        memory = free.pop() if free else np.empty(size, dtype=np.uint8)
        shown = memory.view()  # what the tensor holds on to; its end is the end of all tensors that share the memory

        def give_back(reference: weakref.ref[NDArray[np.uint8]]) -> None:
            del self._lent[id(reference)]
            free.append(memory)

        lent = weakref.ref(shown, give_back)
        self._lent[id(lent)] = lent  # a reference that is itself garbage calls nobody
        return torch.from_numpy(shown).view(dtype).view(rows, columns)


class BatchMaker:
    """Any batch of the endless sequence, for one rank of several."""

    def __init__(
        self, readers: list[RowReader], mixture: Mixture, batch_size: int, rank: int, world_size: int, stored: bool
    ) -> None:
        self._readers, self._mixture, self._stored = readers, mixture, stored
        self._share = batch_size // world_size
        self._offset = rank * self._share
        self._shape = readers[0].spec.shape
        self._dim = readers[0].spec.dim
        self._buffers = Buffers()

    def make(self, start: int) -> Batch:
        """This rank's slice of the global batch that starts at sample `start`."""
        share, dim = self._share, self._dim
        start += self._offset
        source = np.zeros(share, dtype=np.int64)
        column = self._readers[0].z
        x = self._buffers.take(share, dim, torch.uint8 if self._stored else torch.float32)
        z = None
        if column is not None:
            z = self._buffers.take(share, dim, column.dtype if self._stored else torch.float32)
        label, index, draw = (torch.empty(share, dtype=torch.int64) for _ in range(3))
        if len(self._readers) == 1:
            self._readers[0].read(start, self._stored, x, z, label, index, draw)
        else:
            source, before = self._mixture.sources(start, share), self._mixture.counts(start)
            for number, reader in enumerate(self._readers):
                here = torch.from_numpy(np.flatnonzero(source == number))
                if len(here):
                    parts = [tensor[: len(here)].clone() for tensor in (x, label, index, draw)]
                    z_part = None if z is None else z[: len(here)].clone()
                    reader.read(int(before[number]), self._stored, parts[0], z_part, *parts[1:])
                    for whole, part in zip((x, label, index, draw), parts, strict=True):
                        whole[here] = part
                    if z is not None and z_part is not None:
                        z[here] = z_part
        return Batch(
            x=x.view(share, *self._shape),
            z=torch.empty(0, *self._shape) if z is None else z.view(share, *self._shape),
            label=label,
            index=index,
            draw=draw,
            source=torch.from_numpy(source),
        )

    def to_float(self, batch: Batch) -> Batch:
        """A batch of this maker with x in [-1, 1] and z / σ_f as float32, where it is; itself, unless `stored`."""
        if not self._stored:
            return batch
        x = scale_pixels(batch.x, out=torch.empty_like(batch.x, dtype=torch.float32))
        z = torch.empty_like(batch.z, dtype=torch.float32)
        for number, reader in enumerate(self._readers if len(z) else ()):
            here = slice(None) if len(self._readers) == 1 else batch.source == number
            part = batch.z[here].flatten(1)
            z[here] = reader.scale_z(part, out=torch.empty_like(part, dtype=torch.float32)).view(-1, *self._shape)
        return replace(batch, x=x, z=z)

    def close(self) -> None:
        for reader in self._readers:
            reader.close()
