"""The interface behind which a column reads its rows, whichever way the platform allows.

Two classes implement it: `RegionRows` (region.py), which is fast, and `MemmapRows` (memmap_rows.py), which is plain and
runs on every POSIX platform. Both give the same rows.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nfm.storage_specs.storage.local import FileState, LocalFile


class MappedFile(NamedTuple):
    """A file that was mapped into memory."""

    data: NDArray[np.uint8]  # all its bytes, read-only
    state: FileState  # when it was opened


@dataclass(frozen=True)
class RowPlacement:
    """Where the rows of a column are in its files, which differ in nothing but the number of their rows."""

    num_slots: int  # as many as there are files; the caller numbers the files, and calls the number of a file its slot
    file_bytes: int  # of the longest file
    file_rows: int  # of the longest file
    offset: int  # byte of a file at which the values of its first row begin
    stride: int  # bytes from one row to the next
    dim: int  # values in a row, n = C·H·W
    dtype: torch.dtype  # of the values, which files hold in little-endian order

    @property
    def row_bytes(self) -> int:
        """Bytes of the values of one row."""
        return self.dim * self.dtype.itemsize


class MappedRows(Protocol):
    """The rows of many files, of which those that are needed are mapped into memory."""

    def map_file(self, slot: int, file: LocalFile, file_bytes: int) -> MappedFile:
        """Map a file, whose rows `gather` can read from then on.

        Safe to call from several threads for different slots. Raises StoreError if the file does not have `file_bytes`,
        FileNotFoundError if it is missing, another OSError if it cannot be read.
        """

    def unmap_file(self, slot: int) -> None:
        """Forget the file of a slot. None of its rows may be gathered until it is mapped again."""

    def locate(self, slots: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The locations, (B,), that `gather` takes for rows given by their slots and row numbers in the file, (B,).

        The files need not be mapped yet.
        """

    def gather(self, locations: Tensor, out: Tensor) -> Tensor:
        """Copy the rows at the given locations, (B,) int64, into `out`, contiguous (B, n) of the column's dtype.

        The files of all these rows must be mapped. Returns `out`.
        """
