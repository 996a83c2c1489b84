"""One store as the endless sequence of samples that training reads, epoch after epoch."""

import os
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nfm.storage_specs.format.manifest import FileKey
from nfm.storage_specs.format.names import DATASET_FILE
from nfm.storage_specs.format.pixels import mirror_rows, scale_x
from nfm.storage_specs.reading.column import Column
from nfm.storage_specs.reading.order import EpochOrder, choose_epoch_draws, list_epoch_windows, make_epoch_order
from nfm.storage_specs.reading.prefetch import Prefetcher
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import IO_THREADS
from nfm.storage_specs.storage.local import map_file

MAX_MAPPED_FILES = 30_000  # of one store; Linux allows a process 65,530 mappings
ORDER_BYTES_PER_ROW = 96  # of memory, for the order and the labels of an epoch while it is made
_TORCH_DTYPES = {
    "uint8": torch.uint8,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


@dataclass(frozen=True)
class EpochPlan:
    """One epoch of a store: its order, and for each of its N positions the draw and the location of the row in each
    column."""

    epoch: int
    order: EpochOrder
    draw_of_block: NDArray[np.int64]  # (blocks,), -1 where only x is read
    view_of_block: NDArray[np.int64]  # (blocks,): the number of the view
    draws: NDArray[np.int64]  # (N,), -1 where only x is read
    is_mirrored: Tensor | None  # (N,) bool: whether the reader mirrors x; None where it never does
    x_locations: Tensor  # (N,), for Column.gather
    z_locations: Tensor | None  # (N,), None where only x is read


@dataclass(frozen=True)
class SampleBuffers:
    """Tensors for B samples of n = C·H·W values, which `RowReader.read` fills.

    With `stored`, x and z get the values that the files hold, and must have the dtypes of the files. Otherwise both are
    float32, and get x as `scale_x` gives it and z / σ_f.
    """

    x: Tensor  # (B, n)
    z: Tensor | None  # (B, n), None where only x is read
    label: Tensor  # (B,) int64
    index: Tensor  # (B,) int64: the row of the store
    draw: Tensor  # (B,) int64, -1 where only x is read
    stored: bool


class RowReader:
    """Reads the samples of one store: x with its label, and one draw of z if `pairs`.

    Sample s is at position s % N of epoch s // N, in the order of order.py for `seed` and `window_blocks`. The files of
    a window are opened when its first sample is read; those of the next window of a remote store are fetched meanwhile.

    Not for use by several threads at a time. Raises StoreError if local files have other sizes than the manifest gives,
    or if the store has more rows, or a window more blocks, than a process can handle.
    """

    def __init__(self, store: Store, seed: int, pairs: bool, window_blocks: int | None) -> None:
        self.store, self.spec = store, store.spec
        self.seed, self.window_blocks = seed, window_blocks
        self._base_columns = store.layout.base_columns(self.spec)
        columns = (*self._base_columns, "z") if pairs else self._base_columns
        # Before anything is reserved for the number of rows that the spec gives:
        store.check_local_sizes(columns)
        self._check_memory()
        image_columns = self.spec.image_columns
        self.x = Column(store, [(name, -1) for name in image_columns], _TORCH_DTYPES[self.spec.x.dtype])
        self._mirrors = len(self.spec.views) > len(image_columns)
        self.z: Column | None = None
        self._columns = dict.fromkeys(image_columns, self.x)
        if pairs:
            planes = [("z", draw) for draw in range(self.spec.num_draws)]
            self.z = Column(store, planes, _TORCH_DTYPES[self.spec.nfm.z_dtype])
            self._columns["z"] = self.z
            self.sigma_f = _as_row(store.sigma_f)
            self.z_scale = None if store.z_scale is None else _as_row(store.z_scale)
        self.labels = np.full(self.spec.rows, -1, dtype=np.int64)
        self._checked_files: set[FileKey] = set()  # of labels and indices, where these have files of their own
        self._pool = ThreadPoolExecutor(IO_THREADS, "nfm-open")
        self._plan: EpochPlan | None = None
        self._open_window_id: tuple[int, int] | None = None  # epoch, and number of the window in it
        self._prefetcher = Prefetcher(store)
        self._prefetches = False
        self._max_mapped = MAX_MAPPED_FILES // 2  # of each column
        num_blocks = min(window_blocks or self.spec.num_blocks, self.spec.num_blocks)
        block_bytes = sum(store.layout.file_size(self.spec, column, self.spec.block_rows) for column in columns)
        self.window_bytes = num_blocks * block_bytes
        if 2 * num_blocks > MAX_MAPPED_FILES:
            raise StoreError(
                f"{store.url}: got a window of {num_blocks} blocks, expected at most {MAX_MAPPED_FILES // 2}; "
                "set window_blocks, or write larger blocks"
            )

    def _check_memory(self) -> None:
        """Raise StoreError if the order of an epoch takes more memory than the machine has."""
        needed_bytes = self.spec.rows * ORDER_BYTES_PER_ROW
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed_bytes > memory_bytes:
            raise StoreError(
                f"{self.store.url}/{DATASET_FILE}: got {self.spec.rows} rows, "
                f"whose order alone takes {needed_bytes / 1e9:.0f} GB of memory; "
                "expected fewer rows, or a larger machine"
            )

    def set_cache_windows(self, num_windows: float) -> None:
        """Tell the reader of a remote store that the cache has room for `num_windows` of its windows."""
        self._prefetches = num_windows >= 2
        # A mapped file that the cache has dropped still takes its disk space. So where the cache cannot hold the whole
        # store, files are unmapped as soon as their window is over.
        if num_windows * self.window_bytes < self.store.dataset.totals.bytes:
            self._max_mapped = 0

    def read(self, start: int, buffers: SampleBuffers) -> None:
        """Fill the buffers with the samples start … start + B - 1. Raises StoreError if a file is missing or bad."""
        num_filled = 0
        for plan, run in self._iterate_open_runs(start, len(buffers.x)):
            part = slice(num_filled, num_filled + run.stop - run.start)
            self._read_x(plan.x_locations[run], buffers.x[part], buffers.stored)
            if plan.is_mirrored is not None:
                mirror_rows(buffers.x[part].view(-1, *self.spec.shape), plan.is_mirrored[run])
            if buffers.z is not None:
                assert plan.z_locations is not None
                self._read_z(plan.z_locations[run], buffers.z[part], buffers.stored)
            rows = plan.order.rows[run]
            buffers.label.numpy()[part] = self.labels[rows]
            buffers.index.numpy()[part] = rows
            buffers.draw.numpy()[part] = plan.draws[run]
            num_filled = part.stop

    def _read_x(self, locations: Tensor, out: Tensor, stored: bool) -> None:
        if stored:
            self.x.gather(locations, out)
        else:
            scale_x(self.x.gather(locations, None), self.spec.x, out=out)

    def _read_z(self, locations: Tensor, out: Tensor, stored: bool) -> None:
        assert self.z is not None
        if stored:
            self.z.gather(locations, out)
        else:
            self.scale_z(self.z.gather(locations, None), out=out)

    def scale_z(self, stored_z: Tensor, out: Tensor) -> Tensor:
        """Write z / σ_f into `out`, (B, n) float32, from z in the dtype of the files, (B, n) on the same device."""
        self.sigma_f = self.sigma_f.to(out.device)
        out.copy_(stored_z)
        if self.z_scale is not None:
            self.z_scale = self.z_scale.to(out.device)
            out.mul_(self.z_scale)
        return out.div_(self.sigma_f)

    def _iterate_open_runs(self, start: int, count: int) -> Iterator[tuple[EpochPlan, slice]]:
        """The samples start … start + count - 1 as slices of epochs, each within one window. Opens the files of the
        window before it yields a slice, so that its rows can be gathered."""
        end = start + count
        while start < end:
            epoch, position = divmod(start, self.spec.rows)
            plan = self._plan_epoch(epoch)
            window = bisect_right(plan.order.window_starts, position) - 1
            self._open_window(plan, window)
            run_end = min(position + end - start, plan.order.window_starts[window + 1])
            yield plan, slice(position, run_end)
            start += run_end - position

    def _plan_epoch(self, epoch: int) -> EpochPlan:
        """The plan of an epoch; that of the last epoch asked for is kept."""
        if self._plan is not None and self._plan.epoch == epoch:
            return self._plan
        self._plan = None  # frees its memory before the next one is made
        order = make_epoch_order(self.spec.rows, self.spec.block_rows, self.seed, epoch, self.window_blocks)
        blocks = order.rows // self.spec.block_rows
        draw_of_block, view_of_block = self._choose_draws(epoch)
        draws, views = draw_of_block[blocks], view_of_block[blocks]
        self._plan = EpochPlan(
            epoch=epoch,
            order=order,
            draw_of_block=draw_of_block,
            view_of_block=view_of_block,
            draws=draws,
            is_mirrored=torch.from_numpy(views == 1) if self._mirrors else None,
            x_locations=self.x.locate(order.rows, None if len(self.spec.image_columns) == 1 else views),
            z_locations=None if self.z is None else self.z.locate(order.rows, draws),
        )
        return self._plan

    def _choose_draws(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The draw of z that an epoch reads of each block, (blocks,), and the number of the view of x, (blocks,).

        Where only x is read, the draw is -1, and the views of a block take turns as draws do.
        """
        num_blocks, num_views = self.spec.num_blocks, len(self.spec.views)
        if self.z is None:
            return np.full(num_blocks, -1, dtype=np.int64), choose_epoch_draws(num_blocks, num_views, self.seed, epoch)
        draws = choose_epoch_draws(num_blocks, self.spec.num_draws, self.seed, epoch)
        return draws, draws % num_views

    def _list_files(
        self, blocks: NDArray[np.int64], draw_of_block: NDArray[np.int64], view_of_block: NDArray[np.int64]
    ) -> list[FileKey]:
        """The files that an epoch with these draws and views reads of these blocks, block by block."""
        image_columns = self.spec.image_columns
        keys: list[FileKey] = []
        for block in blocks.tolist():
            view = image_columns[view_of_block[block]] if len(image_columns) > 1 else "x"
            unread = set(image_columns) - {view}
            keys += [FileKey(column, block) for column in self._base_columns if column not in unread]
            if self.z is not None:
                keys.append(FileKey("z", block, int(draw_of_block[block])))
        return keys

    def _open_window(self, plan: EpochPlan, window: int) -> None:
        """Make every row of a window readable, unmap files beyond the limit, and begin to fetch the next window."""
        if self._open_window_id == (plan.epoch, window):
            return
        keys = self._list_files(plan.order.windows[window], plan.draw_of_block, plan.view_of_block)
        for column in (self.x, self.z):
            if column is not None:
                column.unmap_unused(set(keys), self._max_mapped)
        unopened = [key for key in keys if not self._is_open(key)]
        for _ in self._pool.map(self._open_file, unopened):
            pass  # an error of a thread is raised here
        for key in keys:
            if key.column in self._columns:
                self._columns[key.column].mark_used(key)
        self._open_window_id = (plan.epoch, window)
        if self._prefetches:
            self._prefetch_window_after(plan, window)

    def _is_open(self, key: FileKey) -> bool:
        """Whether a file of x or z is mapped, or a file of labels or indices was checked."""
        if key.column in self._columns:
            return self._columns[key.column].is_mapped(key)
        return key in self._checked_files

    def _open_file(self, key: FileKey) -> None:
        """Map a file of x or z, check a file of labels or indices; keep the labels that it holds."""
        if key.column in self._columns:
            labels = self._columns[key.column].map_file(key)
        else:
            data = self.store.use_local_file(key, map_file)
            columns = self.store.parse_columns(key, data, sha256_checked=not self.store.root.local)
            labels = columns.get("label")
            self._checked_files.add(key)
        if labels is not None:
            first_row = key.block * self.spec.block_rows
            self.labels[first_row : first_row + len(labels)] = labels

    def _prefetch_window_after(self, plan: EpochPlan, window: int) -> None:
        """Begin to fetch the files of the window that follows this one, in this epoch or the next."""
        epoch, next_window = plan.epoch, window + 1
        if next_window == len(plan.order.windows):
            epoch, next_window = plan.epoch + 1, 0
        blocks = list_epoch_windows(self.spec.num_blocks, self.seed, epoch, self.window_blocks)[next_window]
        self._prefetcher.replace_queue(self._list_files(blocks, *self._choose_draws(epoch)))

    def close(self) -> None:
        """Stop the threads that open and fetch files, without waiting for them; ends attempts to reach a server."""
        self.store.root.stop_retrying.set()
        self._prefetcher.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _as_row(values: NDArray[np.float32]) -> Tensor:
    """A float32 (C, H, W) array as a tensor (1, n) in the byte order of this machine."""
    return torch.from_numpy(values.astype(np.float32).reshape(1, -1))
