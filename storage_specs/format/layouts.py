"""The two layouts of a store behind one interface. A layout turns the rows of one block into the bytes of a file, and
the bytes of a file back into strided arrays, without copying them.

A *file kind* is a column that has files of its own: "x" (with "label" and "index" in it, or beside it), "z", "noise".
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nfm.storage_specs.format.schema import LayoutName, Spec
from nfm.storage_specs.format.webdataset import WebDatasetLayout
from nfm.storage_specs.format.zarr_layout import ZarrLayout

Columns = dict[str, NDArray[Any]]


class Layout(Protocol):
    base_kinds: tuple[str, ...]  # written once a block; the kinds "z" and "noise" are written once a block and draw

    def file_path(self, kind: str, block: int, draw: int) -> str:
        """Relative path of the file; draw is -1 for base kinds."""

    def file_size(self, spec: Spec, kind: str, rows: int) -> int:
        """Exact size of the file in bytes."""

    def encode_file(self, spec: Spec, kind: str, block: int, columns: Columns) -> bytes:
        """The file's bytes, the same for the same input. Columns are (rows, …) arrays in the dtypes of the spec."""

    def view_columns(self, spec: Spec, kind: str, block: int, data: NDArray[np.uint8]) -> Columns:
        """The columns inside a file of exactly `size` bytes. Raises StoreError where its structure is not as
        written.
        """

    def row_placement(self, spec: Spec, kind: str) -> tuple[int, int]:
        """Offset of the first row's values in the file, and the bytes from one row to the next."""

    def metadata_files(self, spec: Spec) -> dict[str, bytes]:
        """Further files that stock tools need, by relative path."""

    def describe_records(self, spec: Spec) -> dict[str, dict[str, Any]]:
        """Where the values are, for readers without our code."""


LAYOUTS: dict[LayoutName, Layout] = {"webdataset": WebDatasetLayout(), "zarr": ZarrLayout()}
