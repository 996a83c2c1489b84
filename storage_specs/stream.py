"""Streaming stores into training: endless shuffled batches whose order depends on (seed, epoch, position) alone."""

import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from storage_specs.cache import Cache
from storage_specs.errors import StoreError
from storage_specs.order import Mixture
from storage_specs.pixels import scale_pixels
from storage_specs.rows import RowReader
from storage_specs.schema import Kind
from storage_specs.store import Store

View = Literal["samples", "pairs"]
AHEAD = 2  # batches under preparation; more would only spread over more memory


@dataclass(frozen=True)
class StreamState:
    """Where the global sequence stands: `position` samples into `epoch`."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class Source:
    """A store of a mixture, with the share of samples that comes from it (relative to the other weights)."""

    url: str
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


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
        self._free: dict[int, list[NDArray[np.uint8]]] = {}
        self._lent: dict[int, weakref.ref[NDArray[np.uint8]]] = {}

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        if torch.cuda.is_available():
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


class CouplingStream:
    """Batches of a coupling store ("pairs": x with one draw of z) or of any store ("samples": x alone), or of a mixture
    of several with the same shape and classes.

    `batch_size` is the global batch, of which rank r of `world_size` gets its r-th slice, so the global sequence does
    not depend on the number of readers. Epochs follow each other without a gap: a batch may span two of them; an epoch
    of a mixture is as many samples as its stores have rows. `window_blocks` bounds what must be at hand at a time (see
    storage_specs/order.py), and with it the cache a remote store needs; it changes the order. Batches are prepared in
    the background; memory is pinned where CUDA is. With `stored`, values come as the files hold them, less than half
    the bytes to bring to an accelerator, and `to_float` does there what is otherwise done here. Set `state` to
    continue a sequence.

    Raises StoreError for a broken store, ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        url: str | Sequence[Source],
        batch_size: int,
        seed: int,
        view: View = "pairs",
        rank: int = 0,
        world_size: int = 1,
        window_blocks: int | None = None,
        options: dict[str, Any] | None = None,
        stored: bool = False,
    ) -> None:
        if batch_size < 1 or batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"got global batch {batch_size} for rank {rank} of {world_size}; expected a positive multiple of "
                "the world size"
            )
        if window_blocks is not None and window_blocks < 1:
            raise ValueError(f"got window_blocks {window_blocks}; expected at least 1")
        sources = [Source(url, options=options or {})] if isinstance(url, str) else list(url)
        self.batch_size, self.view, self.rank, self.world_size = batch_size, view, rank, world_size
        kind: Kind | None = "couplings" if view == "pairs" else None
        cache = Cache()
        self.stores = [Store(source.url, kind, source.options, cache) for source in sources]
        self._mixture = Mixture([source.weight for source in sources], seed)
        self.spec = self.stores[0].spec
        for store in self.stores[1:]:
            for name in ("shape", "class_names"):
                if getattr(store.spec, name) != getattr(self.spec, name):
                    raise StoreError(f"{store.url}: got another {name} than in {self.stores[0].url}; a mixture has one")
        self.stored = stored
        if stored and view == "pairs" and len({store.spec.dtype("z") for store in self.stores}) > 1:
            raise StoreError("got stores of several z dtypes; expected one dtype where values come as they are stored")
        self._readers = [RowReader(store, seed, view == "pairs", window_blocks) for store in self.stores]
        self._check_room(cache)
        self._epoch_rows = sum(store.spec.rows for store in self.stores)
        self._buffers = Buffers()
        self._worker = ThreadPoolExecutor(1, "nfm-stream")
        self._ahead: deque[Future[Batch]] = deque()
        self._next = 0  # the first sample that __next__ has not given out
        weakref.finalize(self, _shut_down, self._worker, self._ahead, self._readers)

    def _check_room(self, cache: Cache) -> None:
        """Raise StoreError unless the cache holds a window of the remote stores."""
        remote = [reader for reader in self._readers if not reader.store.root.local]
        needed = sum(reader.window_bytes for reader in remote)
        if needed > cache.limit:
            raise StoreError(
                f"{remote[0].store.url}: a window needs {needed / 1e9:.2f} GB, the cache holds "
                f"{cache.limit / 1e9:.2f} GB; raise storage.cache_gb, or set a smaller window_blocks"
            )
        for reader in remote:
            reader.use_cache(cache.limit / needed)

    @property
    def state(self) -> StreamState:
        return StreamState(*divmod(self._next, self._epoch_rows))

    @state.setter
    def state(self, state: StreamState) -> None:
        if state.epoch < 0 or not 0 <= state.position < self._epoch_rows:
            raise ValueError(f"got {state}; expected a position below {self._epoch_rows}")
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._next = state.epoch * self._epoch_rows + state.position

    def __iter__(self) -> "CouplingStream":
        return self

    def __next__(self) -> Batch:
        while len(self._ahead) < AHEAD:
            start = self._next + len(self._ahead) * self.batch_size
            self._ahead.append(self._worker.submit(self._batch, start))
        batch = self._ahead[0].result()  # an error stays at the head: no later batch is ever given out
        self._ahead.popleft()
        self._next += self.batch_size
        return batch

    def _batch(self, start: int) -> Batch:
        """This rank's slice of the global batch that starts at sample `start`."""
        share, spec = self.batch_size // self.world_size, self.spec
        start += self.rank * share
        source = np.zeros(share, dtype=np.int64)
        column = self._readers[0].z
        x = self._buffers.take(share, spec.dim, torch.uint8 if self.stored else torch.float32)
        z = None
        if column is not None:
            z = self._buffers.take(share, spec.dim, column.rows.matrix.dtype if self.stored else torch.float32)
        label, index, draw = (torch.empty(share, dtype=torch.int64) for _ in range(3))
        if len(self._readers) == 1:
            self._readers[0].read(start, self.stored, x, z, label, index, draw)
        else:
            source, before = self._mixture.sources(start, share), self._mixture.counts(start)
            for number, reader in enumerate(self._readers):
                here = torch.from_numpy(np.flatnonzero(source == number))
                if len(here):
                    parts = [tensor[: len(here)].clone() for tensor in (x, label, index, draw)]
                    z_part = None if z is None else z[: len(here)].clone()
                    reader.read(int(before[number]), self.stored, parts[0], z_part, *parts[1:])
                    for whole, part in zip((x, label, index, draw), parts, strict=True):
                        whole[here] = part
                    if z is not None and z_part is not None:
                        z[here] = z_part
        return Batch(
            x=x.view(share, *spec.shape),
            z=torch.empty(0, *spec.shape) if z is None else z.view(share, *spec.shape),
            label=label,
            index=index,
            draw=draw,
            source=torch.from_numpy(source),
        )

    def to_float(self, batch: Batch) -> Batch:
        """A batch of this stream with x in [-1, 1] and z / σ_f as float32, where it is; itself, unless `stored`."""
        if not self.stored:
            return batch
        x = scale_pixels(batch.x, out=torch.empty_like(batch.x, dtype=torch.float32))
        z = torch.empty_like(batch.z, dtype=torch.float32)
        for number, reader in enumerate(self._readers if len(z) else ()):
            here = slice(None) if len(self._readers) == 1 else batch.source == number
            part = batch.z[here].flatten(1)
            z[here] = reader.scale_z(part, out=torch.empty_like(part, dtype=torch.float32)).view(-1, *self.spec.shape)
        return replace(batch, x=x, z=z)

    def close(self) -> None:
        """Stop the threads, and wait for the one that reads; when the stream is garbage, they stop by themselves."""
        _shut_down(self._worker, self._ahead, self._readers)
        self._worker.shutdown(wait=True)


def _shut_down(worker: ThreadPoolExecutor, ahead: deque[Future[Batch]], readers: list[RowReader]) -> None:
    for future in ahead:
        future.cancel()
    for reader in readers:
        reader.close()
    worker.shutdown(wait=False)
