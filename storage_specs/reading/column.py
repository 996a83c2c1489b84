"""One column of a store (x or z): its files, which of them are mapped, and rows from any of them."""

from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nfm.storage_specs.format.manifest import FileKey
from nfm.storage_specs.reading.mapped_rows import MappedRows, RowPlacement
from nfm.storage_specs.reading.memmap_rows import MemmapRows
from nfm.storage_specs.reading.region import AddressSpaceError, RegionRows, supports_region
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.local import FileState


def create_mapped_rows(placement: RowPlacement) -> MappedRows:
    """The fast reader where it works, else the plain one, which gives the same rows.

    The fast one works where `supports_region` says so and the address space holds all files of the column at once. It
    may not hold them: `ulimit -v` bounds it, and 47 bits of address are 128 TiB. The plain reader is sound then: it
    takes address space only for files that are mapped, each at the size that was checked when it was opened, and does
    not reserve what an unverified spec claims. If even that is too much, mapping a file raises OSError.
    """
    if supports_region(placement):
        try:
            return RegionRows(placement)
        except AddressSpaceError:
            return MemmapRows(placement)
    return MemmapRows(placement)


class Column:
    """The files of one column for all blocks, with rows of n = C·H·W values.

    `planes` are the names of the column and the draws of which it has a file in every block: ("x", -1) for x, with
    ("x_mirrored", -1) where the mirrored view is stored, and ("z", 0), ("z", 1), … for z.
    """

    def __init__(self, store: Store, planes: list[tuple[str, int]], dtype: torch.dtype) -> None:
        self.store, self.spec = store, store.spec
        self.dtype = dtype
        self._plane_numbers = {plane: number for number, plane in enumerate(planes)}
        name = planes[0][0]
        offset, stride = store.layout.row_placement(self.spec, name)
        self._rows = create_mapped_rows(
            RowPlacement(
                num_slots=self.spec.num_blocks * len(planes),
                file_bytes=store.layout.file_size(self.spec, name, self.spec.block_rows),
                file_rows=self.spec.block_rows,
                offset=offset,
                stride=stride,
                dim=self.spec.dim,
                dtype=dtype,
            )
        )
        self._mapped: OrderedDict[FileKey, None] = OrderedDict()  # an ordered set: the file used longest ago is first
        self._checked: dict[FileKey, FileState] = {}  # files whose content was checked, as they were then
        self._buffer = torch.empty(0, dtype=dtype)

    def _slot(self, key: FileKey) -> int:
        return self._plane_numbers[key.column, key.draw] * self.spec.num_blocks + key.block

    def is_mapped(self, key: FileKey) -> bool:
        """Whether rows of this file can be gathered."""
        return key in self._mapped

    def map_file(self, key: FileKey) -> NDArray[np.int64] | None:
        """Map a file, and check its content unless that was done before and the file is still the same. Call
        `mark_used` afterwards.

        Returns the labels that the file holds, (rows,): those of x in the WebDataset layout, when the content is
        checked; otherwise None. Safe to call from several threads for different files. Raises StoreError, naming the
        file, if it is missing or damaged.
        """
        slot, file_bytes = self._slot(key), self.store.files[key].bytes
        mapped = self.store.use_local_file(key, lambda file: self._rows.map_file(slot, file, file_bytes))
        if self._checked.get(key) == mapped.state:
            return None
        columns = self.store.parse_columns(key, mapped.data, sha256_checked=not self.store.root.local)
        self._checked[key] = mapped.state
        return columns.get("label")

    def mark_used(self, key: FileKey) -> None:
        """Note that a file is mapped, and that it is the one used last."""
        self._mapped[key] = None
        self._mapped.move_to_end(key)

    def unmap_unused(self, needed: set[FileKey], max_mapped: int) -> None:
        """Unmap the files used longest ago until at most `max_mapped` are mapped, but none of those in `needed`."""
        num_excess = max(0, len(self._mapped) - max_mapped)
        unneeded = [key for key in self._mapped if key not in needed]
        for key in unneeded[:num_excess]:
            self._rows.unmap_file(self._slot(key))
            del self._mapped[key]

    def locate(self, rows: NDArray[np.int64], planes: NDArray[np.int64] | None) -> Tensor:
        """The locations, (B,) int64, that `gather` takes for these rows of the store, (B,), and the numbers of their
        planes, (B,), or None for the first."""
        blocks, rows_in_file = np.divmod(rows, self.spec.block_rows)
        slots = blocks if planes is None else planes * self.spec.num_blocks + blocks
        return torch.from_numpy(self._rows.locate(slots, rows_in_file))

    def gather(self, locations: Tensor, out: Tensor | None) -> Tensor:
        """The rows at these locations, (B, n) in the dtype of the files, whose files must be mapped.

        They are copied into `out`; if that is None, into memory of the column, which the next call overwrites.
        """
        if out is None:
            if len(self._buffer) < len(locations):
                self._buffer = torch.empty(len(locations), self.spec.dim, dtype=self.dtype)
            out = self._buffer[: len(locations)]
        return self._rows.gather(locations, out)
