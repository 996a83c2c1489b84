"""WebDataset layout with a fixed stride. Each file is an ordinary tar that stock `webdataset` decodes. Its headers are
deterministic and every record has the same length, so it is also a strided array."""

import tarfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nfm.storage_specs.format.schema import Spec
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.npy import npy_header

TAR_BLOCK = 512  # bytes; tar pads everything to multiples of it
TAR_END = 2 * TAR_BLOCK  # bytes of zeros that close an archive
# Decimal digits, with leading zeros, so that all records have the same length.
KEY_DIGITS = 12  # of the index in a member's name: a spec has at most 10¹² images
LABEL_DIGITS = 6  # of the label in a .cls member: a spec has at most 1,000,000 classes
CHECKSUM = slice(148, 156)  # the field of a tar header: six octal digits, NUL, space
CHECKSUM_DIGITS = slice(148, 154)


def _pad_to_tar_block(size: int) -> int:
    """The next multiple of TAR_BLOCK."""
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def _decimal_digits(numbers: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    """The numbers (rows,) as ASCII digits with leading zeros, (rows, width)."""
    powers = 10 ** np.arange(width - 1, -1, -1, dtype=np.int64)
    return (numbers[:, None] // powers % 10 + ord("0")).astype(np.uint8)


def tar_headers(index: NDArray[np.int64], suffix: str, size: int) -> NDArray[np.uint8]:
    """The USTAR headers of members `<index>.<suffix>` of `size` bytes, (rows, TAR_BLOCK), as `tarfile` writes them."""
    info = tarfile.TarInfo("0" * KEY_DIGITS + "." + suffix)
    info.size = size
    template = np.frombuffer(info.tobuf(tarfile.USTAR_FORMAT), dtype=np.uint8)
    headers = np.tile(template, (len(index), 1))
    headers[:, :KEY_DIGITS] = _decimal_digits(index, KEY_DIGITS)
    # The checksum is the sum of all bytes of the header, with the checksum's own eight bytes counted as spaces.
    sum_of_bytes = headers.sum(axis=1, dtype=np.int64)
    checksum = sum_of_bytes - headers[:, CHECKSUM].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    powers = 8 ** np.arange(5, -1, -1, dtype=np.int64)
    headers[:, CHECKSUM_DIGITS] = checksum[:, None] // powers % 8 + ord("0")
    return headers


class Member:
    """One tar member of a record: a header, a fixed prefix, the values of one column for one row, and padding."""

    def __init__(self, suffix: str, column: str, prefix: bytes, value_bytes: int, start: int) -> None:
        self.suffix = suffix  # of the member's name: "x.npy", "cls", …
        self.column = column
        self.prefix = prefix  # in front of the values: the header of an npy file, or nothing
        self.start = start  # of the tar header, in bytes from the beginning of the record, as all that follow
        self.prefix_start = start + TAR_BLOCK
        self.value_start = self.prefix_start + len(prefix)
        self.size = len(prefix) + value_bytes  # as the tar header has it
        self.padding_start = self.prefix_start + self.size
        self.end = self.prefix_start + _pad_to_tar_block(self.size)


class WebDatasetLayout:
    """A file is a tar whose records, one for each row, are `<index>.x.npy` or `<index>.x_mirrored.npy`, with labels
    also `<index>.cls`; or `<index>.z.npy`; or `<index>.noise.npy`. See `Layout` for the methods."""

    def base_columns(self, spec: Spec) -> tuple[str, ...]:
        return spec.image_columns

    def file_path(self, column: str, block: int, draw: int) -> str:
        return f"{column}/{block:06d}.tar" if draw < 0 else f"{column}/k{draw:03d}/{block:06d}.tar"

    def members(self, spec: Spec, column: str) -> list[Member]:
        """The tar members of one record, in order."""
        dtype = spec.dtype(column)
        header = npy_header(dtype, spec.shape)
        members = [Member(f"{column}.npy", column, header, spec.dim * dtype.itemsize, start=0)]
        if column in spec.image_columns and spec.has_labels:
            members.append(Member("cls", "label", b"", LABEL_DIGITS, start=members[0].end))
        return members

    def record_bytes(self, spec: Spec, column: str) -> int:
        """Bytes of one record: what one row takes in a file."""
        return self.members(spec, column)[-1].end

    def file_size(self, spec: Spec, column: str, rows: int) -> int:
        return rows * self.record_bytes(spec, column) + TAR_END

    def encode_file(self, spec: Spec, column: str, block: int, columns: dict[str, NDArray[Any]]) -> bytes:
        index = spec.indices(block)
        data = np.zeros(self.file_size(spec, column, len(index)), dtype=np.uint8)
        records = data[:-TAR_END].reshape(len(index), -1)
        for member in self.members(spec, column):
            records[:, member.start : member.prefix_start] = tar_headers(index, member.suffix, member.size)
            records[:, member.prefix_start : member.value_start] = np.frombuffer(member.prefix, dtype=np.uint8)
            values = columns[member.column]
            assert len(values) == len(index) and values.dtype == spec.dtype(member.column)
            if member.column == "label":
                value_bytes = _decimal_digits(values, LABEL_DIGITS)
            else:
                value_bytes = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
            records[:, member.value_start : member.padding_start] = value_bytes
        return data.tobytes()

    def row_placement(self, spec: Spec, column: str) -> tuple[int, int]:
        return self.members(spec, column)[0].value_start, self.record_bytes(spec, column)

    def view_columns(self, spec: Spec, column: str, block: int, data: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        index = spec.indices(block)
        assert len(data) == self.file_size(spec, column, len(index))
        if data[-TAR_END:].any():
            raise StoreError("it does not end as a tar does")
        records = data[:-TAR_END].reshape(len(index), -1)
        columns: dict[str, NDArray[Any]] = {}
        for member in self.members(spec, column):
            headers = records[:, member.start : member.prefix_start]
            if not np.array_equal(headers, tar_headers(index, member.suffix, member.size)):
                raise StoreError(f"the tar headers of its .{member.suffix} members are not those of this block")
            if records[:, member.padding_start : member.end].any():
                raise StoreError(f"the padding of its .{member.suffix} members is not empty")
            prefix = np.frombuffer(member.prefix, dtype=np.uint8)
            if not (records[:, member.prefix_start : member.value_start] == prefix).all():
                raise StoreError(f"the npy headers of its .{member.suffix} members are not those of the spec")
            if member.column == "label":
                columns["label"] = _parse_labels(records[:, member.value_start : member.padding_start])
            else:
                columns[column] = _strided_rows(data, len(index), spec, column, member.value_start, records.shape[1])
        if column in spec.image_columns:
            columns["index"] = index  # the names in the tar headers, which were compared above
        return columns

    def metadata_files(self, spec: Spec) -> dict[str, bytes]:  # noqa: ARG002  (a tar needs none)
        return {}

    def describe_records(self, spec: Spec) -> dict[str, dict[str, Any]]:
        columns = (*self.base_columns(spec), *spec.draw_columns)
        return {
            column: {
                "record_bytes": self.record_bytes(spec, column),
                "members": [
                    {"name": f"<index>.{member.suffix}", "bytes": member.size, "value_offset": member.value_start}
                    for member in self.members(spec, column)
                ],
                "dtype": spec.dtype(column).str,
                "shape": list(spec.shape),
            }
            for column in columns
        }


def _strided_rows(
    data: NDArray[np.uint8], rows: int, spec: Spec, column: str, value_start: int, record_bytes: int
) -> NDArray[Any]:
    """The values of a column as a view of the file's bytes, (rows, C, H, W)."""
    dtype = spec.dtype(column)
    strides_of_row = np.empty((1, *spec.shape), dtype).strides[1:]
    return np.ndarray((rows, *spec.shape), dtype, data, value_start, (record_bytes, *strides_of_row))


def _parse_labels(digits: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The labels (rows,) from ASCII digits (rows, LABEL_DIGITS). Raises StoreError if one is no digit."""
    numbers = digits.astype(np.int64) - ord("0")
    if ((numbers < 0) | (numbers > 9)).any():
        raise StoreError("its .cls members are not decimal labels")
    return numbers @ (10 ** np.arange(LABEL_DIGITS - 1, -1, -1, dtype=np.int64))
