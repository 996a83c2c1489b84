"""The two layouts of a store behind one interface. A layout turns the rows of one block into the bytes of a file, and
the bytes of a file back into strided arrays, without copying them.

Columns with files of their own are "x", "z" and "noise", "x_mirrored" where the mirrored view is stored, and in the
Zarr layout also "label" and "index", which the WebDataset layout keeps in the files of x.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nfm.storage_specs.format.schema import LayoutName, Spec
from nfm.storage_specs.format.webdataset import WebDatasetLayout
from nfm.storage_specs.format.zarr_layout import ZarrLayout

Columns = dict[str, NDArray[Any]]


class Layout(Protocol):
    """Names, sizes and bytes of the files of a store. All methods depend on their arguments alone."""

    def base_columns(self, spec: Spec) -> tuple[str, ...]:
        """The columns with one file for each block; those in `spec.draw_columns` have one for each block and draw."""

    def file_path(self, column: str, block: int, draw: int) -> str:
        """Path of a file, relative to the store. `draw` is -1 for base columns."""

    def file_size(self, spec: Spec, column: str, rows: int) -> int:
        """Exact size in bytes of a file that holds so many rows."""

    def encode_file(self, spec: Spec, column: str, block: int, columns: Columns) -> bytes:
        """The bytes of a file, always the same for the same values. `columns` are arrays (rows, …) in the dtypes of the
        spec; the index follows from the block and need not be among them."""

    def view_columns(self, spec: Spec, column: str, block: int, data: NDArray[np.uint8]) -> Columns:
        """The columns in the bytes of a file, as views where possible. `data` has exactly `file_size` bytes. Raises
        StoreError, without the file's name, if the structure of the file is not the one that `encode_file` writes."""

    def row_placement(self, spec: Spec, column: str) -> tuple[int, int]:
        """Offset in bytes of the first row's values in a file, and the number of bytes from one row to the next."""

    def metadata_files(self, spec: Spec) -> dict[str, bytes]:
        """Path and content of the further files that stock tools need, such as zarr.json."""

    def describe_records(self, spec: Spec) -> dict[str, dict[str, Any]]:
        """By column, where the values are in a file: the "records" of dataset.json, for readers without our code."""


LAYOUTS: dict[LayoutName, Layout] = {"webdataset": WebDatasetLayout(), "zarr": ZarrLayout()}
LAYOUTS_1_0: dict[LayoutName, Layout] = {"webdataset": WebDatasetLayout(), "zarr": ZarrLayout(folder="")}
