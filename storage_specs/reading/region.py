"""Many files as one array: an address range with a slot for each file, so that rows from any number of files come with
one gather and no loop over files.
"""

import ctypes
import mmap
import os
import sys
import weakref
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import open_regular_file

# What Python's mmap module, which cannot map at a given address, leaves out; the same on Linux and macOS.
_MAP_FIXED = 0x10
_PROT_NONE = 0
_MADV_POPULATE_READ = 22  # Linux 5.14; elsewhere it fails, and pages come one by one
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Region:
    """Address space for `slots` files of at most `file_bytes` each; costs nothing before files are mapped into it.

    Rows may only be read from slots that are mapped: the caller keeps count, for anything else is a segmentation fault.
    """

    def __init__(self, slots: int, file_bytes: int) -> None:
        self.slot_bytes = -(-file_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        total, address = slots * self.slot_bytes, _FAILED
        if total < sys.maxsize:
            address = _libc.mmap(None, total, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if address == _FAILED:
            raise StoreError(f"{slots} files of {file_bytes} bytes are more than there is address space for")
        assert address is not None
        self._address = address
        memory = (ctypes.c_uint8 * total).from_address(address)
        # When the last array or tensor that shows it is gone; not at exit, where a thread may still read.
        weakref.finalize(memory, _libc.munmap, address, total).atexit = False
        self._bytes: NDArray[np.uint8] = np.ctypeslib.as_array(memory)

    def map(self, slot: int, path: Path, size: int) -> NDArray[np.uint8]:
        """The file's bytes, now also in its slot. Raises StoreError if it has another size, which the manifest said and
        the region was made for; OSError if it cannot be opened."""
        assert 0 < size <= self.slot_bytes
        address = self._address + slot * self.slot_bytes
        with open_regular_file(path) as (descriptor, found):
            if found != size:
                raise StoreError(
                    f"{path}: got {found} bytes, expected {size}; the file is truncated or overlong, repair or copy it "
                    "again"
                )
            mapped = _libc.mmap(address, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
            if mapped != address:
                raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())} (mmap)", str(path))
        _libc.madvise(address, size, _MADV_POPULATE_READ)
        data = self._bytes[slot * self.slot_bytes :][:size]
        data.flags.writeable = False
        return data

    def unmap(self, slot: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        address = self._address + slot * self.slot_bytes
        assert _libc.mmap(address, self.slot_bytes, _PROT_NONE, flags, -1, 0) == address


class Rows:
    """The rows of all slots of a region as one matrix, whose row numbers `locate` gives.

    A matrix has one stride, files have page-aligned slots and their own stride, so the matrix steps by a unit that
    divides both; its rows overlap, and most of them are never asked for.
    """

    def __init__(self, region: Region, dtype: torch.dtype, dim: int, offset: int, stride: int) -> None:
        self._unit = int(np.gcd(stride, mmap.PAGESIZE))
        assert self._unit % dtype.itemsize == 0
        self._slot_units, self._row_units = region.slot_bytes // self._unit, stride // self._unit
        self._memory = torch.from_numpy(region._bytes)[offset:]
        row_bytes = dim * dtype.itemsize
        count = (len(self._memory) - row_bytes) // self._unit + 1
        whole = self._memory[: len(self._memory) // dtype.itemsize * dtype.itemsize].view(dtype)
        steps = (self._unit // dtype.itemsize, 1)
        self._matrix = torch.as_strided(whole, (count, dim), steps, whole.storage_offset())
        probes = -(-(row_bytes - 1) // mmap.PAGESIZE) + 1  # bytes of a row, at most a page apart
        self._probes = torch.arange(probes) * ((row_bytes - 1) // max(1, probes - 1))

    def locate(self, slot: NDArray[np.int64], row: NDArray[np.int64]) -> NDArray[np.int64]:
        return slot * self._slot_units + row * self._row_units

    def gather(self, where: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The rows `where` (B,) into `out` (B, n).

        A byte of each of their pages is read first. These reads do not wait for each other, so the processor looks the
        pages up side by side, and the gather, which is a third faster for it, finds them looked up: files have pages of
        4 KiB, and random rows no two in one.
        """
        torch.index_select(self._memory, 0, torch.add(self._probes, where[:, None], alpha=self._unit).view(-1))
        return torch.index_select(self._matrix, 0, where, out=out)
