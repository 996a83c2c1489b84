"""The fast way to read rows: many files mapped side by side into one range of addresses.

The whole range is one strided tensor, so rows of any number of files come with one `torch.index_select`, without a loop
over files.
"""

import ctypes
import mmap
import os
import sys
import weakref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nfm.storage_specs.reading.mapped_rows import MappedFile, RowPlacement
from nfm.storage_specs.storage.files import check_file_size
from nfm.storage_specs.storage.local import LocalFile, open_regular_file

# What Python's mmap module, which cannot map a file at a given address, leaves out. The values are those of Linux (on
# every processor that torch is built for) and of macOS.
_MAP_FIXED = 0x10
_PROT_NONE = 0
_MADV_POPULATE_READ = 22  # Linux 5.14; an older one refuses it, and then pages are mapped one by one on first use
_MAP_FAILED = ctypes.c_void_p(-1).value


def _load_libc() -> ctypes.CDLL | None:
    """The C library with the functions that this module calls, or None where the platform has no such library."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [
            ctypes.c_void_p,  # address
            ctypes.c_size_t,  # length
            ctypes.c_int,  # protection
            ctypes.c_int,  # flags
            ctypes.c_int,  # file descriptor
            ctypes.c_long,  # offset in the file: off_t where addresses have 64 bits
        ]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    except (OSError, TypeError, AttributeError):  # no library, or one without these functions
        return None
    return libc


_libc = _load_libc()


def supports_region(placement: RowPlacement) -> bool:
    """Whether `RegionRows` can read such a column on this machine. That takes

    - a C library with `mmap`, `munmap` and `madvise`, and Linux or macOS, whose constants are written down here;
    - addresses of 64 bits: 32 hold hardly one store, and `off_t` has another size there;
    - a little-endian processor, since values are read in place as the files hold them;
    - rows that are aligned to their dtype, in the file and in the step between rows (see `RegionRows`). Rows of both
      layouts are, on pages of any size that is a power of two.

    Whether the address space is large enough shows only when it is reserved: see AddressSpaceError.
    """
    itemsize = placement.dtype.itemsize
    return (
        _libc is not None
        and sys.platform in ("linux", "darwin")
        and sys.maxsize > 2**32
        and sys.byteorder == "little"
        and placement.offset % itemsize == 0
        and _step_bytes(placement) % itemsize == 0
    )


def _step_bytes(placement: RowPlacement) -> int:
    """The largest number of bytes that divides the stride of rows and the page size, and so also the distance between
    files, which begin at multiples of the page size."""
    return int(np.gcd(placement.stride, mmap.PAGESIZE))


class AddressSpaceError(OSError):
    """The address space that is left to this process, or that any process can have, is too small for all files."""


class Region:
    """A reserved range of addresses with `num_slots` slots, each for a file of at most `file_bytes`.

    It takes no memory before files are mapped into it. To read a slot into which no file is mapped is a segmentation
    fault: the caller must keep account. Raises AddressSpaceError if the range cannot be reserved.
    """

    def __init__(self, num_slots: int, file_bytes: int) -> None:
        assert _libc is not None
        self._libc = _libc
        num_pages = -(-file_bytes // mmap.PAGESIZE)
        self.slot_bytes = num_pages * mmap.PAGESIZE
        total_bytes = num_slots * self.slot_bytes
        message = f"{num_slots} files of {file_bytes} bytes are more than there is address space for"
        if total_bytes >= sys.maxsize:
            raise AddressSpaceError(message)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = self._libc.mmap(None, total_bytes, _PROT_NONE, flags, -1, 0)
        if address == _MAP_FAILED:
            raise AddressSpaceError(message)
        assert address is not None
        self._address: int = address
        memory = (ctypes.c_uint8 * total_bytes).from_address(address)
        # Unmapped when the last array or tensor that shares the memory is gone; never at exit, where a thread may
        # still be reading.
        finalizer = weakref.finalize(memory, self._libc.munmap, address, total_bytes)
        finalizer.atexit = False
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array(memory)

    def map_file(self, slot: int, file: LocalFile, file_bytes: int) -> MappedFile:
        """Map a file into a slot, in place of what is there. Returns and raises what `MappedRows.map_file` does."""
        assert 0 < file_bytes <= self.slot_bytes
        start = slot * self.slot_bytes
        address = self._address + start
        with open_regular_file(file) as (descriptor, state):
            check_file_size(str(file), state.bytes, file_bytes)
            flags = mmap.MAP_SHARED | _MAP_FIXED
            mapped_address = self._libc.mmap(address, file_bytes, mmap.PROT_READ, flags, descriptor, 0)
            if mapped_address != address:
                error_number = ctypes.get_errno()
                raise OSError(error_number, f"{os.strerror(error_number)} (mmap)", str(file))
        if sys.platform == "linux":
            self._libc.madvise(address, file_bytes, _MADV_POPULATE_READ)
        data = self.bytes[start : start + file_bytes]
        data.flags.writeable = False
        return MappedFile(data, state)

    def unmap_file(self, slot: int) -> None:
        """Give the memory of a slot back, and keep its addresses reserved."""
        address = self._address + slot * self.slot_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        reserved_address = self._libc.mmap(address, self.slot_bytes, _PROT_NONE, flags, -1, 0)
        assert reserved_address == address


class RegionRows:
    """Implements `MappedRows` with a Region, all of which is one matrix of rows. See `supports_region`.

    Within a file, rows follow each other at one stride; files begin at multiples of the page size. A matrix has only
    one step from row to row. So the matrix steps by a number of bytes that divides both, and all rows of all files are
    among its rows; `locate` says where. Its other rows, which overlap them, are never read.

    Raises AddressSpaceError if the address space is too small for all files at once.
    """

    def __init__(self, placement: RowPlacement) -> None:
        self._region = Region(placement.num_slots, placement.file_bytes)
        itemsize, row_bytes = placement.dtype.itemsize, placement.row_bytes
        self._step_bytes = _step_bytes(placement)
        self._steps_per_slot = self._region.slot_bytes // self._step_bytes
        self._steps_per_row = placement.stride // self._step_bytes
        self._bytes = torch.from_numpy(self._region.bytes)[placement.offset :]
        num_values = len(self._bytes) // itemsize
        values = self._bytes[: num_values * itemsize].view(placement.dtype)
        num_steps = (len(self._bytes) - row_bytes) // self._step_bytes + 1
        self._matrix = torch.as_strided(
            values, (num_steps, placement.dim), (self._step_bytes // itemsize, 1), values.storage_offset()
        )
        # Bytes of a row, from its first to its last, no two further apart than a page: at least one in each page.
        num_gaps = -(-(row_bytes - 1) // mmap.PAGESIZE)
        gap_bytes = (row_bytes - 1) // max(1, num_gaps)
        self._probe_offsets = torch.arange(num_gaps + 1) * gap_bytes

    def map_file(self, slot: int, file: LocalFile, file_bytes: int) -> MappedFile:
        return self._region.map_file(slot, file, file_bytes)

    def unmap_file(self, slot: int) -> None:
        self._region.unmap_file(slot)

    def locate(self, slots: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return slots * self._steps_per_slot + rows * self._steps_per_row

    def gather(self, locations: Tensor, out: Tensor) -> Tensor:
        """As `MappedRows.gather`.

        It first reads one byte in each page of these rows and throws the bytes away. These reads do not wait for each
        other, so the processor looks up many pages at a time; the copy that follows finds them looked up, and is a
        third faster. (Files have pages of 4 KiB, and random rows hardly ever share one.)
        """
        probes = torch.add(self._probe_offsets, locations[:, None], alpha=self._step_bytes)
        torch.index_select(self._bytes, 0, probes.view(-1))
        return torch.index_select(self._matrix, 0, locations, out=out)
