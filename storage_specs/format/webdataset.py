"""WebDataset layout with a fixed stride: each file is an ordinary tar that stock `webdataset` decodes, and, since its
headers are deterministic and every record has the same length, also a strided array."""

import tarfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nfm.storage_specs.format.schema import Spec
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.npy import npy_header

BLOCK = 512  # tar's unit
END = 2 * BLOCK  # zero blocks that close an archive
KEY_DIGITS = 12
LABEL_DIGITS = 6
CHECKSUM = slice(148, 156)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _digits(numbers: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    """Decimal ASCII digits, (rows, width)."""
    powers = 10 ** np.arange(width - 1, -1, -1, dtype=np.int64)
    return (numbers[:, None] // powers % 10 + ord("0")).astype(np.uint8)


def tar_headers(index: NDArray[np.int64], suffix: str, size: int) -> NDArray[np.uint8]:
    """The 512-byte USTAR headers of members `<index>.<suffix>`, (rows, 512), as `tarfile` would write them."""
    info = tarfile.TarInfo("0" * KEY_DIGITS + "." + suffix)
    info.size = size
    template = np.frombuffer(info.tobuf(tarfile.USTAR_FORMAT), dtype=np.uint8)
    headers = np.tile(template, (len(index), 1))
    headers[:, :KEY_DIGITS] = _digits(index, KEY_DIGITS)
    # The checksum is the sum of all bytes with its own field read as spaces, in six octal digits, NUL, space.
    total = headers.sum(axis=1, dtype=np.int64) - headers[:, CHECKSUM].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    powers = 8 ** np.arange(5, -1, -1, dtype=np.int64)
    headers[:, 148:154] = total[:, None] // powers % 8 + ord("0")
    return headers


class Member:
    """One member of a record: its suffix, its fixed prefix and payload size, and where it starts in the record."""

    def __init__(self, suffix: str, column: str, prefix: bytes, payload: int, start: int) -> None:
        self.suffix, self.column, self.prefix, self.start = suffix, column, prefix, start
        self.size = len(prefix) + payload
        self.offset = start + BLOCK + len(prefix)  # of the values
        self.end = start + BLOCK + _padded(self.size)


class WebDatasetLayout:
    base_kinds: tuple[str, ...] = ("x",)

    def file_path(self, kind: str, block: int, draw: int) -> str:
        return f"{kind}/{block:06d}.tar" if draw < 0 else f"{kind}/k{draw:03d}/{block:06d}.tar"

    def members(self, spec: Spec, kind: str) -> list[Member]:
        dtype = spec.dtype(kind)
        header = npy_header(dtype, spec.shape)
        members = [Member(f"{kind}.npy", kind, header, spec.dim * dtype.itemsize, 0)]
        if kind == "x":
            members.append(Member("cls", "label", b"", LABEL_DIGITS, members[0].end))
        return members

    def record_bytes(self, spec: Spec, kind: str) -> int:
        return self.members(spec, kind)[-1].end

    def file_size(self, spec: Spec, kind: str, rows: int) -> int:
        return rows * self.record_bytes(spec, kind) + END

    def encode_file(self, spec: Spec, kind: str, block: int, columns: dict[str, NDArray[Any]]) -> bytes:
        index = spec.indices(block)
        data = np.zeros(self.file_size(spec, kind, len(index)), dtype=np.uint8)
        records = data[:-END].reshape(len(index), -1)
        for member in self.members(spec, kind):
            records[:, member.start : member.start + BLOCK] = tar_headers(index, member.suffix, member.size)
            records[:, member.start + BLOCK : member.offset] = np.frombuffer(member.prefix, dtype=np.uint8)
            values = columns[member.column]
            assert len(values) == len(index) and values.dtype == spec.dtype(member.column)
            raw = _digits(values, LABEL_DIGITS) if member.column == "label" else _bytes_of(values)
            records[:, member.offset : member.offset + raw.shape[1]] = raw
        return data.tobytes()

    def row_placement(self, spec: Spec, kind: str) -> tuple[int, int]:
        members = self.members(spec, kind)
        return members[0].offset, members[-1].end

    def view_columns(self, spec: Spec, kind: str, block: int, data: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        index = spec.indices(block)
        assert len(data) == self.file_size(spec, kind, len(index))
        if data[-END:].any():
            raise StoreError("it does not end as a tar does")
        records = data[:-END].reshape(len(index), -1)
        columns: dict[str, NDArray[Any]] = {}
        for member in self.members(spec, kind):
            header = records[:, member.start : member.start + BLOCK]
            if not np.array_equal(header, tar_headers(index, member.suffix, member.size)):
                raise StoreError(f"the tar headers of its .{member.suffix} members are not those of this block")
            if records[:, member.start + BLOCK + member.size : member.end].any():
                raise StoreError(f"the padding of its .{member.suffix} members is not empty")
            prefix = np.frombuffer(member.prefix, dtype=np.uint8)
            if not (records[:, member.start + BLOCK : member.offset] == prefix).all():
                raise StoreError(f"the npy headers of its .{member.suffix} members are not those of the spec")
            if member.column == "label":
                columns["label"] = _labels(records[:, member.offset : member.offset + LABEL_DIGITS])
            else:
                dtype = spec.dtype(kind)
                inner = np.empty((1, *spec.shape), dtype).strides[1:]
                columns[kind] = np.ndarray(
                    (len(index), *spec.shape), dtype, data, member.offset, (records.shape[1], *inner)
                )
        if kind == "x":
            columns["index"] = index  # the keys, compared above
        return columns

    def metadata_files(self, spec: Spec) -> dict[str, bytes]:  # noqa: ARG002  (a tar needs none)
        return {}

    def describe_records(self, spec: Spec) -> dict[str, dict[str, Any]]:
        kinds = (*self.base_kinds, *spec.planes)
        return {
            kind: {
                "record_bytes": self.record_bytes(spec, kind),
                "members": [
                    {"name": f"<index>.{member.suffix}", "bytes": member.size, "value_offset": member.offset}
                    for member in self.members(spec, kind)
                ],
                "dtype": spec.dtype(kind).str,
                "shape": list(spec.shape),
            }
            for kind in kinds
        }


def _bytes_of(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)


def _labels(digits: NDArray[np.uint8]) -> NDArray[np.int64]:
    numbers = digits.astype(np.int64) - ord("0")
    if ((numbers < 0) | (numbers > 9)).any():
        raise StoreError("its .cls members are not decimal labels")
    return numbers @ (10 ** np.arange(LABEL_DIGITS - 1, -1, -1, dtype=np.int64))
