"""One store as the endless sequence of rows that training reads: files opened ahead of need, rows gathered at once."""

from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage_specs.cache import THREADS
from storage_specs.errors import StoreError
from storage_specs.order import EpochOrder, epoch_draws, epoch_order, epoch_windows
from storage_specs.pixels import scale_pixels
from storage_specs.region import Region, Rows
from storage_specs.store import Key, Store

MAX_MAPPED = 30_000  # files; Linux allows a process 65,530 mappings
_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


class Column:
    """One column of all blocks (and draws) as rows of numbers, with the slots of its files."""

    def __init__(self, store: Store, kind: str, dtype: torch.dtype, draws: int) -> None:
        self.store, self.kind, self.spec = store, kind, store.spec
        file_bytes = store.layout.size(self.spec, kind, self.spec.block_rows)
        self.region = Region(self.spec.blocks * draws, file_bytes)
        offset, stride = store.layout.placement(self.spec, kind)
        self.rows = Rows(self.region, dtype, self.spec.dim, offset, stride)
        self.mapped: OrderedDict[Key, None] = OrderedDict()
        self._checked: set[Key] = set()
        self._buffer = torch.empty(0, dtype=dtype)

    def slot(self, key: Key) -> int:
        return max(key.draw, 0) * self.spec.blocks + key.block

    def map(self, key: Key) -> NDArray[np.int64] | None:
        """Map the file of `key`; its labels, where the file has them and was not seen before. Safe to call from several
        threads for different keys."""
        data = self.region.map(self.slot(key), self.store.path(key), self.store.files[key].bytes)
        if key in self._checked:
            return None
        labels = self.store.check(key, data).get("label")
        self._checked.add(key)
        return labels

    def keep_only(self, wanted: set[Key], most: int) -> None:
        """Unmap the files used longest ago until at most `most` are mapped, but none of those wanted."""
        for key in [key for key in self.mapped if key not in wanted][: max(0, len(self.mapped) - most)]:
            self.region.unmap(self.slot(key))
            del self.mapped[key]

    def buffer(self, rows: int) -> Tensor:
        """Memory for (rows, n) values as they are stored, the same at each call."""
        if len(self._buffer) < rows:
            self._buffer = torch.empty(rows, self.spec.dim, dtype=self.rows.matrix.dtype)
        return self._buffer[:rows]

    def gather(self, rows: NDArray[np.int64], draws: NDArray[np.int64] | None, out: Tensor) -> Tensor:
        """The rows (of the given draws), as they are stored, into `out` (len(rows), n)."""
        blocks = rows // self.spec.block_rows
        slots = blocks if draws is None else draws * self.spec.blocks + blocks
        where = torch.from_numpy(self.rows.locate(slots, rows % self.spec.block_rows))
        return torch.index_select(self.rows.matrix, 0, where, out=out)


class RowReader:
    """Rows number start … start + count of the endless sequence of one store, with z if `pairs`.

    Files are opened a window at a time, and those of the next window fetched meanwhile. Raises StoreError if the cache
    cannot hold a window.
    """

    def __init__(self, store: Store, seed: int, pairs: bool, window_blocks: int | None) -> None:
        self.store, self.spec, self.seed, self.window_blocks = store, store.spec, seed, window_blocks
        _ = store.files  # checked before anything of its size is reserved, and before threads ask for it
        self.x = Column(store, "x", torch.uint8, 1)
        self.z: Column | None = None
        if pairs:
            assert self.spec.coupling is not None
            self.z = Column(store, "z", _TORCH[self.spec.coupling.z_dtype], self.spec.draws)
            self.sigma_f = torch.from_numpy(store.sigma_f.reshape(1, -1).copy())
            self.z_scale = None if store.z_scale is None else torch.from_numpy(store.z_scale.reshape(1, -1).copy())
        self.labels = np.full(self.spec.rows, -1, dtype=np.int64)
        self._pool = ThreadPoolExecutor(THREADS, "nfm-fetch")
        self._order: tuple[int, EpochOrder, NDArray[np.int64]] | None = None
        self._window: tuple[int, int] | None = None
        self._ahead: list[Future[object]] = []
        self._check_room()

    def _check_room(self) -> None:
        blocks = min(self.window_blocks or self.spec.blocks, self.spec.blocks)
        files = blocks * (2 if self.z else 1)
        hint = f"set window_blocks to fewer than {blocks}, or write larger blocks"
        if files > MAX_MAPPED:
            raise StoreError(
                f"{self.store.url}: a window of {blocks} blocks has {files} files, over {MAX_MAPPED}; {hint}"
            )
        kinds = (*self.store.layout.base_kinds, *(("z",) if self.z else ()))
        held = blocks * sum(self.store.layout.size(self.spec, kind, self.spec.block_rows) for kind in kinds)
        if not self.store.root.local and held > self.store.cache.limit:
            raise StoreError(
                f"{self.store.url}: a window of {blocks} blocks has {held / 1e9:.2f} GB, the cache holds "
                f"{self.store.cache.limit / 1e9:.2f} GB; raise storage.cache_gb, or {hint}"
            )
        self._fetches_ahead = not self.store.root.local and 2 * held <= self.store.cache.limit
        # A mapped file that the cache has dropped still takes its disk space, so what it cannot hold is unmapped early.
        fits = self.store.root.local or self.store.dataset.totals.bytes <= self.store.cache.limit
        self._most_mapped = MAX_MAPPED // 2 if fits else 0

    def _epoch(self, epoch: int) -> tuple[EpochOrder, NDArray[np.int64]]:
        """The order of an epoch, and the draw of each block in it."""
        if self._order is None or self._order[0] != epoch:
            order = epoch_order(self.spec.rows, self.spec.block_rows, self.seed, epoch, self.window_blocks)
            self._order = epoch, order, self._draws(epoch)
        return self._order[1:]

    def _draws(self, epoch: int) -> NDArray[np.int64]:
        if self.z is None:
            return np.full(self.spec.blocks, -1, dtype=np.int64)
        return epoch_draws(self.spec.blocks, self.spec.draws, self.seed, epoch)

    def _keys(self, blocks: NDArray[np.int64], draws: NDArray[np.int64]) -> list[Key]:
        """The files of a window, in the order of its blocks."""
        keys: list[Key] = []
        for block in blocks.tolist():
            keys += [Key(kind, block) for kind in self.store.layout.base_kinds]
            if self.z:
                keys.append(Key("z", block, int(draws[block])))
        return keys

    def _open(self, key: Key) -> None:
        column = {"x": self.x, "z": self.z}.get(key.column)
        if column is None:
            columns = self.store.check(key, np.fromfile(self.store.path(key), np.uint8))
            labels = columns.get("label")
        else:
            labels = column.map(key)
        if labels is not None:
            first = key.block * self.spec.block_rows
            self.labels[first : first + len(labels)] = labels

    def _enter(self, epoch: int, number: int) -> None:
        """Make every row of a window readable, and start to fetch the next one."""
        if self._window == (epoch, number):
            return
        order, draws = self._epoch(epoch)
        blocks = order.windows[number]
        keys = self._keys(blocks, draws)
        unlabelled = set(blocks[self.labels[blocks * self.spec.block_rows] < 0].tolist())
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
        self._fetch_after(epoch, number, len(order.windows))

    def _fetch_after(self, epoch: int, number: int, windows: int) -> None:
        """Bring the files of the following window into the cache; what goes wrong shows when they are opened."""
        if not self._fetches_ahead:
            return
        epoch, number = (epoch, number + 1) if number + 1 < windows else (epoch + 1, 0)
        blocks = epoch_windows(self.spec.blocks, self.seed, epoch, self.window_blocks)[number]
        for future in self._ahead:
            future.cancel()
        self._ahead = [self._pool.submit(self.store.path, key) for key in self._keys(blocks, self._draws(epoch))]

    def locate(self, start: int, count: int) -> Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """(rows, draws) of the samples start … start + count, in runs that lie in one window, which is open then."""
        while count:
            epoch, position = divmod(start, self.spec.rows)
            order, draws = self._epoch(epoch)
            number = int(np.searchsorted(order.starts, position, side="right")) - 1
            self._enter(epoch, number)
            rows = order.rows[position : min(position + count, order.starts[number + 1])]
            yield rows, draws[rows // self.spec.block_rows]
            start, count = start + len(rows), count - len(rows)

    def read(
        self, start: int, stored: bool, x: Tensor, z: Tensor | None, label: Tensor, index: Tensor, draw: Tensor
    ) -> None:
        """Fill the tensors with samples start … start + B: x (B, n) with values in [-1, 1] and z (B, n) with z / σ_f,
        or both as they are `stored`."""
        done = 0
        for rows, draws in self.locate(start, len(x)):
            part = slice(done, done + len(rows))
            raw = self.x.gather(rows, None, x[part] if stored else self.x.buffer(len(rows)))
            if not stored:
                scale_pixels(raw, out=x[part])
            if z is not None:
                assert self.z is not None
                raw = self.z.gather(rows, draws, z[part] if stored else self.z.buffer(len(rows)))
                if not stored:
                    self.scale_z(raw, out=z[part])
            label[part] = torch.from_numpy(self.labels[rows])
            index[part] = torch.from_numpy(rows)
            draw[part] = torch.from_numpy(draws)
            done += len(rows)

    def scale_z(self, stored: Tensor, out: Tensor) -> Tensor:
        """z / σ_f (B, n) float32 from z as it is stored."""
        self.sigma_f = self.sigma_f.to(out.device)
        out.copy_(stored)
        if self.z_scale is not None:
            self.z_scale = self.z_scale.to(out.device)
            out.mul_(self.z_scale)
        return out.div_(self.sigma_f)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
