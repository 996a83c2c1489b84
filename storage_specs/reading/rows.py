"""One store as the endless sequence of rows that training reads: files opened ahead of need, rows gathered at once."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nfm.storage_specs.format.manifest import FileKey
from nfm.storage_specs.format.pixels import scale_pixels
from nfm.storage_specs.reading.order import EpochOrder, epoch_draws, epoch_order, epoch_windows
from nfm.storage_specs.reading.region import Region, Rows
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import IO_THREADS, map_file

MAX_MAPPED = 30_000  # files; Linux allows a process 65,530 mappings
BYTES_PER_ROW = 96  # that the order of an epoch takes while it is made, with the labels
_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


class Column:
    """One column of all blocks (and draws) as rows of numbers, with the slots of its files."""

    def __init__(self, store: Store, kind: str, dtype: torch.dtype, draws: int) -> None:
        self.store, self.kind, self.spec, self.dtype = store, kind, store.spec, dtype
        file_bytes = store.layout.file_size(self.spec, kind, self.spec.block_rows)
        try:
            self.region = Region(self.spec.blocks * draws, file_bytes)
        except StoreError as error:
            raise StoreError(f"{store.url}/{kind}: {error}") from error
        offset, stride = store.layout.row_placement(self.spec, kind)
        self.rows = Rows(self.region, dtype, self.spec.dim, offset, stride)
        self.mapped: OrderedDict[FileKey, None] = OrderedDict()
        self._checked: set[FileKey] = set()
        self._buffer = torch.empty(0, dtype=dtype)

    def slot(self, key: FileKey) -> int:
        return max(key.draw, 0) * self.spec.blocks + key.block

    def map(self, key: FileKey) -> NDArray[np.int64] | None:
        """Map the file of `key`; its labels, where the file has them and was not seen before. Safe to call from several
        threads for different keys."""
        slot, size = self.slot(key), self.store.files[key].bytes
        data = self.store.use_local_file(key, lambda path: self.region.map(slot, path, size))
        if key in self._checked:
            return None
        labels = self.store.parse_columns(key, data, sha256_checked=not self.store.root.local).get("label")
        self._checked.add(key)
        return labels

    def keep_only(self, wanted: set[FileKey], most: int) -> None:
        """Unmap the files used longest ago until at most `most` are mapped, but none of those wanted."""
        for key in [key for key in self.mapped if key not in wanted][: max(0, len(self.mapped) - most)]:
            self.region.unmap(self.slot(key))
            del self.mapped[key]

    def locate(self, rows: NDArray[np.int64], draws: NDArray[np.int64] | None) -> Tensor:
        """Where in the matrix these rows (of these draws) are, (len(rows),)."""
        blocks, within = np.divmod(rows, self.spec.block_rows)
        slots = blocks if draws is None else draws * self.spec.blocks + blocks
        return torch.from_numpy(self.rows.locate(slots, within))

    def gather(self, where: Tensor, out: Tensor | None) -> Tensor:
        """Those rows as they are stored, into `out` (len(where), n), or else into memory that the next call reuses."""
        if out is None:
            if len(self._buffer) < len(where):
                self._buffer = torch.empty(len(where), self.spec.dim, dtype=self.dtype)
            out = self._buffer[: len(where)]
        return self.rows.gather(where, out)


@dataclass(frozen=True)
class Plan:
    """An epoch of a store: its order, the draw of each block, and for each row in order its draw and its place in the
    columns."""

    epoch: int
    order: EpochOrder
    draw_of_block: NDArray[np.int64]
    draws: NDArray[np.int64]
    x: Tensor
    z: Tensor | None


class Fetcher:
    """Brings files into the cache in the background, by daemon threads: a program need not wait for them to end."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._wanted: SimpleQueue[FileKey | None] = SimpleQueue()
        self._threads: list[Thread] = []

    def want(self, keys: list[FileKey]) -> None:
        """These files, in this order, and no others any more."""
        with suppress(Empty):
            while True:
                self._wanted.get_nowait()
        for key in keys:
            self._wanted.put(key)
        while keys and len(self._threads) < IO_THREADS:
            self._threads.append(Thread(target=self._work, daemon=True, name="nfm-ahead"))
            self._threads[-1].start()

    def close(self) -> None:
        self.want([])
        for _ in self._threads:
            self._wanted.put(None)

    def _work(self) -> None:
        while (key := self._wanted.get()) is not None:
            with suppress(StoreError, OSError):  # raised again when the file is opened, and only then in anyone's way
                self._store.local_path(key)


class RowReader:
    """Rows number start … start + count of the endless sequence of one store, with z if `pairs`.

    Files are opened a window at a time, and those of the next window fetched meanwhile.
    """

    def __init__(self, store: Store, seed: int, pairs: bool, window_blocks: int | None) -> None:
        self.store, self.spec, self.seed, self.window_blocks = store, store.spec, seed, window_blocks
        kinds = (*store.layout.base_kinds, *(("z",) if pairs else ()))
        store.check_local_sizes(kinds)  # before anything is reserved for as many rows as it says it has
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if self.spec.rows * BYTES_PER_ROW > memory:
            raise StoreError(
                f"{store.url}/dataset.json: got {self.spec.rows} rows, whose order alone takes "
                f"{self.spec.rows * BYTES_PER_ROW / 1e9:.0f} GB of memory; expected fewer rows, or a larger machine"
            )
        self.x = Column(store, "x", torch.uint8, 1)
        self.z: Column | None = None
        if pairs:
            assert self.spec.coupling is not None
            self.z = Column(store, "z", _TORCH[self.spec.coupling.z_dtype], self.spec.draws)
            self.sigma_f = torch.from_numpy(store.sigma_f.reshape(1, -1).copy())
            self.z_scale = None if store.z_scale is None else torch.from_numpy(store.z_scale.reshape(1, -1).copy())
        self.labels = np.empty(self.spec.rows, dtype=np.int64)
        self._labelled = np.zeros(self.spec.blocks, dtype=bool)
        self._pool = ThreadPoolExecutor(IO_THREADS, "nfm-fetch")
        self._plan: Plan | None = None
        self._window: tuple[int, int] | None = None
        self._fetcher = Fetcher(store)
        self._fetches_ahead, self._most_mapped = False, MAX_MAPPED // 2
        blocks = min(window_blocks or self.spec.blocks, self.spec.blocks)
        block_bytes = sum(store.layout.file_size(self.spec, kind, self.spec.block_rows) for kind in kinds)
        self.window_bytes = blocks * block_bytes
        if 2 * blocks > MAX_MAPPED:
            raise StoreError(
                f"{store.url}: got a window of {blocks} blocks, expected at most {MAX_MAPPED // 2}; set "
                "window_blocks, or write larger blocks"
            )

    def use_cache(self, windows: float) -> None:
        """Settle what may be kept, where the cache holds `windows` windows of a remote store."""
        self._fetches_ahead = windows >= 2
        # A mapped file that the cache has dropped still takes its disk space, so what it cannot hold is unmapped early.
        if windows * self.window_bytes < self.store.dataset.totals.bytes:
            self._most_mapped = 0

    def plan(self, epoch: int) -> Plan:
        if self._plan is None or self._plan.epoch != epoch:
            self._plan = None  # its memory is needed for the next
            order = epoch_order(self.spec.rows, self.spec.block_rows, self.seed, epoch, self.window_blocks)
            of_block = self._draws(epoch)
            draws = of_block[order.rows // self.spec.block_rows]
            z = self.z.locate(order.rows, draws) if self.z else None
            self._plan = Plan(epoch, order, of_block, draws, self.x.locate(order.rows, None), z)
        return self._plan

    def _draws(self, epoch: int) -> NDArray[np.int64]:
        if self.z is None:
            return np.full(self.spec.blocks, -1, dtype=np.int64)
        return epoch_draws(self.spec.blocks, self.spec.draws, self.seed, epoch)

    def _keys(self, blocks: NDArray[np.int64], draws: NDArray[np.int64]) -> list[FileKey]:
        """The files of a window, in the order of its blocks."""
        keys: list[FileKey] = []
        for block in blocks.tolist():
            keys += [FileKey(kind, block) for kind in self.store.layout.base_kinds]
            if self.z:
                keys.append(FileKey("z", block, int(draws[block])))
        return keys

    def _open(self, key: FileKey) -> None:
        column = {"x": self.x, "z": self.z}.get(key.column)
        if column is None:
            data = self.store.use_local_file(key, map_file)
            columns = self.store.parse_columns(key, data, sha256_checked=not self.store.root.local)
            labels = columns.get("label")
        else:
            labels = column.map(key)
        if labels is not None:
            first = key.block * self.spec.block_rows
            self.labels[first : first + len(labels)] = labels
            self._labelled[key.block] = True

    def _enter(self, epoch: int, number: int) -> None:
        """Make every row of a window readable, and start to fetch the next one."""
        if self._window == (epoch, number):
            return
        plan = self.plan(epoch)
        blocks = plan.order.windows[number]
        keys = self._keys(blocks, plan.draw_of_block)
        unlabelled = set(blocks[~self._labelled[blocks]].tolist())
        columns = {column.kind: column for column in (self.x, self.z) if column is not None}
        for column in columns.values():
            column.keep_only(set(keys), self._most_mapped)
        fresh = [
            key
            for key in keys
            if (key not in columns[key.column].mapped if key.column in columns else key.block in unlabelled)
        ]
        for _ in self._pool.map(self._open, fresh):
            pass
        for key in keys:
            if key.column in columns:
                columns[key.column].mapped[key] = None
                columns[key.column].mapped.move_to_end(key)
        self._window = epoch, number
        self._fetch_after(epoch, number, len(plan.order.windows))

    def _fetch_after(self, epoch: int, number: int, windows: int) -> None:
        """Bring the files of the following window into the cache."""
        if self._fetches_ahead:
            epoch, number = (epoch, number + 1) if number + 1 < windows else (epoch + 1, 0)
            blocks = epoch_windows(self.spec.blocks, self.seed, epoch, self.window_blocks)[number]
            self._fetcher.want(self._keys(blocks, self._draws(epoch)))

    def runs(self, start: int, count: int) -> Iterator[tuple[Plan, slice]]:
        """The samples start … start + count as runs of an epoch that lie in one window, which is open then."""
        while count:
            epoch, position = divmod(start, self.spec.rows)
            plan = self.plan(epoch)
            number = bisect_right(plan.order.starts, position) - 1
            self._enter(epoch, number)
            end = min(position + count, plan.order.starts[number + 1])
            yield plan, slice(position, end)
            start, count = start + end - position, count - (end - position)

    def read(
        self, start: int, stored: bool, x: Tensor, z: Tensor | None, label: Tensor, index: Tensor, draw: Tensor
    ) -> None:
        """Fill the tensors with samples start … start + B: x (B, n) with values in [-1, 1] and z (B, n) with z / σ_f,
        or both as they are `stored`."""
        done = 0
        for plan, run in self.runs(start, len(x)):
            part = slice(done, done + run.stop - run.start)
            raw = self.x.gather(plan.x[run], x[part] if stored else None)
            if not stored:
                scale_pixels(raw, out=x[part])
            if z is not None:
                assert self.z is not None and plan.z is not None
                raw = self.z.gather(plan.z[run], z[part] if stored else None)
                if not stored:
                    self.scale_z(raw, out=z[part])
            rows = plan.order.rows[run]
            label.numpy()[part] = self.labels[rows]
            index.numpy()[part] = rows
            draw.numpy()[part] = plan.draws[run]
            done = part.stop

    def scale_z(self, stored: Tensor, out: Tensor) -> Tensor:
        """z / σ_f (B, n) float32 from z as it is stored."""
        self.sigma_f = self.sigma_f.to(out.device)
        out.copy_(stored)
        if self.z_scale is not None:
            self.z_scale = self.z_scale.to(out.device)
            out.mul_(self.z_scale)
        return out.div_(self.sigma_f)

    def close(self) -> None:
        self.store.root.stop_retrying.set()
        self._fetcher.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
