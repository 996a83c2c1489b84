"""Bringing files of a remote store into the cache before they are needed."""

from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread

from nfm.storage_specs.format.manifest import FileKey
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import IO_THREADS


class Prefetcher:
    """IO_THREADS background threads that fetch files of a store into its cache.

    They are daemon threads, so a program that ends does not wait for a download.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._queue: SimpleQueue[FileKey | None] = SimpleQueue()  # None ends one thread
        self._threads: list[Thread] = []

    def replace_queue(self, keys: list[FileKey]) -> None:
        """Fetch these files, in this order, in place of those that were asked for before and not yet begun."""
        self._clear_queue()
        for key in keys:
            self._queue.put(key)
        while keys and len(self._threads) < IO_THREADS:
            thread = Thread(target=self._fetch_queued, daemon=True, name="nfm-prefetch")
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Let each thread end after the file that it is fetching."""
        self._clear_queue()
        for _ in self._threads:
            self._queue.put(None)

    def _clear_queue(self) -> None:
        with suppress(Empty):
            while True:
                self._queue.get_nowait()

    def _fetch_queued(self) -> None:
        while (key := self._queue.get()) is not None:
            # A file that cannot be fetched is tried again when it is opened, and its error is raised there.
            with suppress(StoreError, OSError):
                self._store.local_file(key)
