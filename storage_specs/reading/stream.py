"""Streaming stores into training: endless shuffled batches whose order depends on (seed, epoch, position) alone."""

import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread, current_thread
from typing import Any, Literal

from nfm.storage_specs.format.schema import Kind
from nfm.storage_specs.reading.batches import Batch, BatchMaker
from nfm.storage_specs.reading.order import Mixture, source_seed
from nfm.storage_specs.reading.rows import RowReader
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.cache import Cache
from nfm.storage_specs.storage.errors import StoreError

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


class CouplingStream:
    """Batches of a coupling store ("pairs": x with one draw of z) or of any store ("samples": x alone), or of a mixture
    of several with the same shape and classes.

    `batch_size` is the global batch, of which rank r of `world_size` gets its r-th slice, so the global sequence does
    not depend on the number of readers. Epochs follow each other without a gap: a batch may span two of them; an epoch
    of a mixture is as many samples as its stores have rows. `window_blocks` bounds what must be at hand at a time (see
    order.py), and with it the cache a remote store needs; it changes the order. Batches are prepared in the background;
    memory is pinned where CUDA is. With `stored`, values come as the files hold them, less than half the bytes to bring
    to an accelerator, and `to_float` does there what is otherwise done here (stores of a mixture that differ in z's
    dtype give float32 all the same). Set `state` to continue a sequence.

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
        mixture = Mixture([source.weight for source in sources], seed)
        self.spec = self.stores[0].spec
        for store in self.stores[1:]:
            for name in ("shape", "class_names"):
                if getattr(store.spec, name) != getattr(self.spec, name):
                    raise StoreError(f"{store.url}: got another {name} than in {self.stores[0].url}; a mixture has one")
        if view == "pairs" and len({store.spec.dtype("z") for store in self.stores}) > 1:
            stored = False  # one tensor has one dtype
        self._readers = [
            RowReader(store, source_seed(seed, number), view == "pairs", window_blocks)
            for number, store in enumerate(self.stores)
        ]
        self._check_room(cache)
        self._epoch_rows = sum(store.spec.rows for store in self.stores)
        self._maker = BatchMaker(self._readers, mixture, batch_size, rank, world_size, stored)
        self._next = 0  # the first sample that __next__ has not given out
        self._start()

    def _start(self) -> None:
        self._producer = Producer(self._maker)
        self._finalizer = weakref.finalize(self, _shut_down, self._producer, self._maker)

    def _check_room(self, cache: Cache) -> None:
        """Raise StoreError unless the cache holds a window of the remote stores."""
        remote = [reader for reader in self._readers if not reader.store.root.local]
        needed = sum(reader.window_bytes for reader in remote)
        if needed > cache.max_bytes:
            raise StoreError(
                f"{remote[0].store.url}: a window needs {needed / 1e9:.2f} GB, the cache holds "
                f"{cache.max_bytes / 1e9:.2f} GB; raise storage.cache_gb, or set a smaller window_blocks"
            )
        for reader in remote:
            reader.use_cache(cache.max_bytes / needed)

    @property
    def state(self) -> StreamState:
        return StreamState(*divmod(self._next, self._epoch_rows))

    @state.setter
    def state(self, state: StreamState) -> None:
        if state.epoch < 0 or not 0 <= state.position < self._epoch_rows:
            raise ValueError(f"got {state}; expected a position below {self._epoch_rows}")
        if not self._finalizer.alive:
            raise ValueError("the stream is closed")
        self._producer.stop()
        self._finalizer.detach()
        self._next = state.epoch * self._epoch_rows + state.position
        self._start()

    def __iter__(self) -> "CouplingStream":
        return self

    def __next__(self) -> Batch:
        while self._producer.asked < AHEAD:
            self._producer.ask(self._next + self._producer.asked * self.batch_size)
        batch = self._producer.get()
        self._next += self.batch_size
        return batch

    def to_float(self, batch: Batch) -> Batch:
        """A batch of this stream with x in [-1, 1] and z / σ_f as float32, where it is; itself, unless `stored`."""
        return self._maker.to_float(batch)

    def close(self) -> None:
        """Stop the threads, and wait for the one that reads; a stream that is garbage does so by itself."""
        self._finalizer()


class Producer:
    """A thread that makes batches ahead of the caller. It ends with its stream, or with the program."""

    def __init__(self, maker: BatchMaker) -> None:
        self._requests: SimpleQueue[int | None] = SimpleQueue()
        self._results: SimpleQueue[Batch | Exception] = SimpleQueue()
        self._thread = Thread(target=_produce, args=(maker, self._requests, self._results), daemon=True)
        self._thread.start()
        self._failure: Exception | None = None
        self.asked = 0  # batches that were asked for and not yet given out

    def ask(self, start: int) -> None:
        self._requests.put(start)
        self.asked += 1

    def get(self) -> Batch:
        """The next batch that was asked for. After a failure there is no other: the failure is raised again."""
        result = self._failure or self._results.get()
        if isinstance(result, Exception):
            self._failure = result
            raise result
        self.asked -= 1
        return result

    def stop(self) -> None:
        with suppress(Empty):
            while True:
                self._requests.get_nowait()
        self._requests.put(None)
        if current_thread() is not self._thread:  # in which a garbage collection may end up here
            self._thread.join()
        self._failure = ValueError("the stream is closed")


def _produce(maker: BatchMaker, requests: "SimpleQueue[int | None]", results: "SimpleQueue[Batch | Exception]") -> None:
    while (start := requests.get()) is not None:
        try:
            results.put(maker.make(start))
        except Exception as error:
            results.put(error)  # raised where the batch is asked for


def _shut_down(producer: Producer, maker: BatchMaker) -> None:
    """For a stream that is garbage, or that the end of the program found open: no thread may read when memory goes."""
    maker.close()
    producer.stop()
