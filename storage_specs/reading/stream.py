"""Streaming stores into training: endless shuffled batches whose order depends on (seed, epoch, position) alone."""

import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread, current_thread
from typing import Any, Literal, get_args

from nfm.storage_specs.format.schema import Kind
from nfm.storage_specs.reading.batches import Batch, BatchMaker
from nfm.storage_specs.reading.order import Mixture, derive_source_seed
from nfm.storage_specs.reading.rows import RowReader
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.cache import Cache
from nfm.storage_specs.storage.errors import StoreError

View = Literal["samples", "pairs"]
PREFETCH_BATCHES = 2  # made ahead of the caller; more would not be faster, only take more memory


@dataclass(frozen=True)
class StreamState:
    """How far a stream has come: its next batch begins `position` samples into epoch `epoch`."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class Source:
    """A store of a mixture."""

    url: str
    weight: float = 1.0  # its share of the samples, relative to the other weights
    options: dict[str, Any] = field(default_factory=dict)  # of its fsspec file system


class CouplingStream:
    """Endless shuffled batches of a store, or of a mixture of stores that agree in shape and classes.

    `url` is the URL of a store (`URL@v1` for its version 1), or a list of `Source`s. The view "pairs" needs coupling
    stores, and gives x with one draw of z; "samples" takes any store, and gives x alone. See `Batch` for shapes and
    ranges.

    `batch_size` is the size of the global batch; each of `world_size` ranks, 0 to `world_size` - 1, gets its slice. So
    the global sequence does not depend on the number of readers. Epochs follow each other without a gap: a batch may
    span two of them. An epoch of a mixture has as many samples as its stores have rows. `state` says how far the stream
    has come; set it to continue from there.

    `window_blocks` is the number of blocks that are shuffled together (see order.py); without it, all are. Only the
    files of one window must be on the local disk at a time, so it bounds the cache that a remote store needs. It
    changes the order.

    Batches are made in the background, in pinned memory where CUDA is available. With `stored`, x and z come in the
    dtypes and values of the files, less than half the bytes to copy to an accelerator; `to_float` converts them on
    their device. `stored` has no effect if the stores of a mixture differ in the dtype of z. `options` are those of the
    fsspec file system of `url`.

    Raises StoreError if a store is missing, damaged or of the wrong kind, also from `next`; ValueError for sizes, ranks
    or weights that do not fit.
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
        if world_size < 1:
            raise ValueError(f"got world size {world_size}; expected at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"got rank {rank}; expected 0 to {world_size - 1}")
        if batch_size < 1 or batch_size % world_size != 0:
            raise ValueError(
                f"got global batch {batch_size}; expected a positive multiple of the world size {world_size}"
            )
        if view not in get_args(View):
            raise ValueError(f"got view {view!r}; expected 'samples' or 'pairs'")
        if window_blocks is not None and window_blocks < 1:
            raise ValueError(f"got window_blocks {window_blocks}; expected at least 1")
        sources = [Source(url, options=options or {})] if isinstance(url, str) else list(url)
        if not sources:
            raise ValueError("got an empty list of sources; expected at least one store")
        self.batch_size, self.view, self.rank, self.world_size = batch_size, view, rank, world_size
        kind: Kind | None = "couplings" if view == "pairs" else None
        cache = Cache()
        self.stores = [Store(source.url, kind, source.options, cache) for source in sources]
        mixture = Mixture([source.weight for source in sources], seed)
        self.spec = self.stores[0].spec
        self._check_stores_agree()
        if view == "pairs" and len({store.spec.dtype("z") for store in self.stores}) > 1:
            stored = False  # one tensor has one dtype
        self._readers = [
            RowReader(store, derive_source_seed(seed, source), view == "pairs", window_blocks)
            for source, store in enumerate(self.stores)
        ]
        self._share_cache(cache)
        self._epoch_samples = sum(store.spec.rows for store in self.stores)
        self._batch_maker = BatchMaker(self._readers, mixture, batch_size, rank, world_size, stored)
        self._next_sample = 0  # at which the next batch that __next__ returns begins
        self._start_producer()

    def _check_stores_agree(self) -> None:
        """Raise StoreError unless all stores have the shape and the classes of the first."""
        first = self.stores[0]
        for store in self.stores[1:]:
            for name in ("shape", "class_names", "x"):
                if getattr(store.spec, name) != getattr(first.spec, name):
                    raise StoreError(
                        f"{store.url}: got another {name} than in {first.url}; "
                        f"expected stores of one {name} in a mixture"
                    )

    def _share_cache(self, cache: Cache) -> None:
        """Tell the readers of remote stores how many of their windows the cache holds.

        Raises StoreError if it does not hold one window of each.
        """
        remote_readers = [reader for reader in self._readers if not reader.store.root.local]
        needed_bytes = sum(reader.window_bytes for reader in remote_readers)
        if needed_bytes > cache.max_bytes:
            raise StoreError(
                f"{remote_readers[0].store.url}: a window needs {needed_bytes / 1e9:.2f} GB, "
                f"the cache holds {cache.max_bytes / 1e9:.2f} GB; "
                "raise storage.cache_gb, or set a smaller window_blocks"
            )
        for reader in remote_readers:
            reader.set_cache_windows(cache.max_bytes / needed_bytes)

    def _start_producer(self) -> None:
        self._producer = BatchProducer(self._batch_maker)
        self._finalizer = weakref.finalize(self, _shut_down, self._producer, self._batch_maker)

    @property
    def state(self) -> StreamState:
        """Where the next batch begins."""
        epoch, position = divmod(self._next_sample, self._epoch_samples)
        return StreamState(epoch, position)

    @state.setter
    def state(self, state: StreamState) -> None:
        """Continue from a state.

        Raises ValueError if the epoch is negative, if the position is not one of the samples 0 … N - 1 of an epoch, or
        if the stream is closed.
        """
        if state.epoch < 0 or not 0 <= state.position < self._epoch_samples:
            raise ValueError(
                f"got {state}; expected epoch >= 0 and a position in 0 … {self._epoch_samples - 1}, "
                "as the stream has so many samples per epoch"
            )
        if not self._finalizer.alive:
            raise ValueError("the stream is closed")
        self._producer.stop()  # discards the batches that it has made
        self._finalizer.detach()
        self._next_sample = state.epoch * self._epoch_samples + state.position
        self._start_producer()

    def __iter__(self) -> "CouplingStream":
        return self

    def __next__(self) -> Batch:
        while self._producer.num_pending < PREFETCH_BATCHES:
            self._producer.request(self._next_sample + self._producer.num_pending * self.batch_size)
        batch = self._producer.wait_for_batch()
        self._next_sample += self.batch_size
        return batch

    def to_float(self, batch: Batch) -> Batch:
        """A batch of this stream with x and z / σ_f, float32 on the device of the batch.

        Without `stored` batches are so already, and the batch itself is returned.
        """
        return self._batch_maker.to_float(batch)

    def close(self) -> None:
        """Stop the threads, and wait for the one that makes batches. Also happens when the stream is garbage."""
        self._finalizer()


class BatchProducer:
    """A thread that makes the batches that were requested, in the order of the requests.

    The thread ends with `stop`, or with the program.
    """

    def __init__(self, batch_maker: BatchMaker) -> None:
        self._requests: SimpleQueue[int | None] = SimpleQueue()  # first samples of batches; None ends the thread
        self._results: SimpleQueue[Batch | Exception] = SimpleQueue()
        self._thread = Thread(
            target=_make_batches, args=(batch_maker, self._requests, self._results), daemon=True, name="nfm-batches"
        )
        self._thread.start()
        self._failure: Exception | None = None
        self.num_pending = 0  # batches that were requested and not yet returned

    def request(self, start: int) -> None:
        """Ask for the batch that begins at sample `start`."""
        self._requests.put(start)
        self.num_pending += 1

    def wait_for_batch(self) -> Batch:
        """The oldest pending batch. Raises what making it raised, and then the same again on every further call."""
        if self._failure is not None:
            raise self._failure
        result = self._results.get()
        if isinstance(result, Exception):
            self._failure = result
            raise result
        self.num_pending -= 1
        return result

    def stop(self) -> None:
        """Discard what is pending and wait for the thread to end. Raises nothing if it was stopped before."""
        with suppress(Empty):
            while True:
                self._requests.get_nowait()
        self._requests.put(None)
        # A garbage collection may run in any thread, and so call this in the very thread that is to end.
        if current_thread() is not self._thread:
            self._thread.join()
        self._failure = ValueError("the stream is closed")


def _make_batches(
    batch_maker: BatchMaker, requests: "SimpleQueue[int | None]", results: "SimpleQueue[Batch | Exception]"
) -> None:
    """What the thread of a BatchProducer runs. It must not refer to the producer, which would then never be garbage."""
    while (start := requests.get()) is not None:
        try:
            results.put(batch_maker.make_batch(start))
        except Exception as error:
            results.put(error)  # raised in the thread that waits for the batch


def _shut_down(producer: BatchProducer, batch_maker: BatchMaker) -> None:
    """Stop all threads of a stream that was closed, is garbage, or is open at the end of the program.

    At the end of the program, no thread may read memory while the interpreter takes it away.
    """
    batch_maker.close()
    producer.stop()
