"""The plain way to read rows: one memory-mapped array for each file, and a loop over the files of a batch."""

import errno
import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nfm.storage_specs.reading.mapped_rows import MappedFile, RowPlacement
from nfm.storage_specs.storage.files import check_file_size
from nfm.storage_specs.storage.local import LocalFile, open_regular_file


class MemmapRows:
    """Implements `MappedRows` with what every POSIX platform has.

    It needs no more address space than the mapped files take, and does not depend on the byte order of the machine, nor
    on how rows are aligned. A row that was never mapped is a KeyError or an IndexError.
    """

    def __init__(self, placement: RowPlacement) -> None:
        self._placement = placement
        self._rows_by_slot: dict[int, NDArray[Any]] = {}

    def map_file(self, slot: int, file: LocalFile, file_bytes: int) -> MappedFile:
        mapped = _map_bytes(file, file_bytes)
        self._rows_by_slot[slot] = self._view_rows(mapped.data)
        return mapped

    def unmap_file(self, slot: int) -> None:
        del self._rows_by_slot[slot]

    def locate(self, slots: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return slots * self._placement.file_rows + rows

    def gather(self, locations: Tensor, out: Tensor) -> Tensor:
        slots, rows = np.divmod(locations.numpy(), self._placement.file_rows)
        # NumPy has no bfloat16, so values are copied as unsigned integers of the same size.
        target = out.view(torch.uint8).numpy().view(f"=u{self._placement.dtype.itemsize}")
        for slot in np.unique(slots).tolist():
            batch_rows = np.flatnonzero(slots == slot)
            target[batch_rows] = self._rows_by_slot[slot][rows[batch_rows]]
        return out

    def _view_rows(self, data: NDArray[np.uint8]) -> NDArray[Any]:
        """The rows in the bytes of a file, (rows, n), as little-endian unsigned integers."""
        placement = self._placement
        itemsize = placement.dtype.itemsize
        fitting_rows = (len(data) - placement.offset - placement.row_bytes) // placement.stride + 1
        num_rows = min(fitting_rows, placement.file_rows)  # what follows the last row may be as long as a row
        return np.ndarray(
            (num_rows, placement.dim), f"<u{itemsize}", data, placement.offset, (placement.stride, itemsize)
        )


def _map_bytes(file: LocalFile, file_bytes: int) -> MappedFile:
    """The bytes of a file, read-only, mapped into memory. Raises as `MappedRows.map_file` does.

    By torch, since `np.memmap` would keep a file descriptor for each file: a process may have only about a thousand
    (`ulimit -n`), and a large store has more files.
    """
    with open_regular_file(file) as (_, state):  # refuses what is no regular file
        check_file_size(str(file), state.bytes, file_bytes)
        try:
            data = torch.from_file(str(file), shared=False, size=file_bytes, dtype=torch.uint8).numpy()
        except RuntimeError as error:
            os.stat(str(file))  # raises FileNotFoundError if the file was deleted in between
            raise OSError(errno.EIO, str(error), str(file)) from error
        with open_regular_file(file) as (_, state_after):
            # torch opened the file once more, by its name, and would have followed a link that came in between.
            if state_after != state:
                raise OSError(errno.ESTALE, "the file was replaced while it was opened", str(file))
    data.flags.writeable = False
    return MappedFile(data, state)
