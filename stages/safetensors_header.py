"""The header of a safetensors file: what the file holds, checked before any of its values is read.

A file is eight bytes with the length of the header, the header in JSON, and the values of the tensors one after another
(https://github.com/huggingface/safetensors#format).
"""

import math
from dataclasses import dataclass
from typing import Any

from nfm.stages.errors import StageError
from nfm.storage_specs.storage.documents import load_json
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import Root

LENGTH_BYTES = 8  # of the length of the header
MAX_HEADER_BYTES = 1 << 25
MAX_DIMENSIONS = 8
MAX_SIZE = 1 << 48  # of one dimension
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # of the dtypes that weights may have
METADATA_KEY = "__metadata__"
# How files begin that are given for a checkpoint by mistake.
OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive, as PyTorch's .pt and .pth files are (which may run code when they are read)",
    b"\x80": "a pickle, as old .pt and .pth files are (which may run code when they are read)",
    b"{": "a JSON document",
    b"\x89HDF": "an HDF5 file",
    b"\x89PNG": "a picture",
    b"\x93NUMPY": "a NumPy array",
}


@dataclass(frozen=True)
class Header:
    """The shapes of a file's tensors by their names, its metadata, its own bytes, and the size of the file."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, Any]
    data: bytes
    file_bytes: int


def read_header(root: Root, name: str) -> Header:
    """Read and check the header of the file `name`: its tensors must be of DTYPE_BYTES, and fill the file exactly.

    Raises StoreError if there is no file or its header is no JSON, StageError if it is no safetensors file or one of
    other tensors.
    """
    url = f"{root.url}/{name}"
    file_bytes = root.size(name)
    if file_bytes is None:
        raise StoreError(f"{url} is missing; the URL is wrong, or what writes it has not finished")
    if file_bytes < LENGTH_BYTES:
        raise NoCheckpointError(url, f"a file of {file_bytes} bytes")
    start = root.read_range(name, 0, LENGTH_BYTES)
    header_bytes = int.from_bytes(start, "little")
    if header_bytes > min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        kinds = (kind for beginning, kind in OTHER_KINDS.items() if start.startswith(beginning))
        raise NoCheckpointError(url, next(kinds, f"a header of {header_bytes} bytes in a file of {file_bytes}"))
    data = root.read_range(name, LENGTH_BYTES, LENGTH_BYTES + header_bytes)
    return _parse_header(data, file_bytes, url)


def _parse_header(data: bytes, file_bytes: int, url: str) -> Header:
    header = parse_object(data, url)
    metadata = header.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict):
        raise NoCheckpointError(url, f"{METADATA_KEY} that is no object")
    ranges = [(*_value_range(entry, tensor, url), tensor) for tensor, entry in header.items()]
    end = 0
    for begin, next_begin, tensor in sorted(ranges):
        if begin != end:
            raise NoCheckpointError(url, f"tensor {tensor!r} at {begin}, where {end} is next")
        end = next_begin
    if LENGTH_BYTES + len(data) + end != file_bytes:
        raise NoCheckpointError(url, f"{end} bytes of tensors in a file of {file_bytes}")
    return Header({tensor: tuple(entry["shape"]) for tensor, entry in header.items()}, metadata, data, file_bytes)


def _value_range(entry: Any, tensor: str, url: str) -> tuple[int, int]:
    """Where the values of a tensor begin and end, as its entry in the header says."""
    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}):
        raise NoCheckpointError(url, f"tensor {tensor!r} without dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and dtype in DTYPE_BYTES):
        raise StageError(f"{url}: got tensor {tensor!r} of dtype {dtype}, expected one of {', '.join(DTYPE_BYTES)}")
    if not (_are_sizes(shape) and len(shape) <= MAX_DIMENSIONS and _are_sizes(offsets) and len(offsets) == 2):
        raise NoCheckpointError(url, f"tensor {tensor!r} whose shape or data_offsets are no sizes")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise NoCheckpointError(url, f"tensor {tensor!r} of shape {shape} in {end - begin} bytes")
    return begin, end


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= MAX_SIZE for value in values)


def parse_object(data: bytes, url: str) -> dict[str, Any]:
    """The JSON object in a header or in its metadata. Raises StoreError if it is no JSON, StageError if no object."""
    value = load_json(data, f"{url}, its header")
    if not isinstance(value, dict):
        raise NoCheckpointError(url, "a header that is no JSON object")
    return value


class NoCheckpointError(StageError):
    """A file is no checkpoint of nfm; `got` says what it is instead."""

    def __init__(self, url: str, got: str) -> None:
        super().__init__(
            f"{url}: got no checkpoint of nfm ({got}); "
            "expected a safetensors file that train-teacher or train-student wrote; nfm import reads published ones"
        )
        self.got = got
