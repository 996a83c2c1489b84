"""PyTorch's own files (.pt, .pth), read without running anything that is in them.

Such a file is a zip archive of a pickle and, for each storage, its bytes (https://docs.pytorch.org/docs/stable/notes/serialization.html).
The pickle may name nothing but dicts and tensors, and gives tensors without values; those are read afterwards, of the
tensors that are wanted alone, so that no more memory is filled than they take.
"""

import argparse
import io
import pickletools
import zipfile
from bisect import bisect
from collections.abc import Mapping
from typing import IO, Any, cast

import torch
from torch import Tensor

from nfm.stages.errors import StageError
from nfm.stages.memory import check_memory
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import Root
from nfm.storage_specs.storage.messages import list_fields

ZIP_MAGIC = b"PK\x03\x04"
MAX_READ_BYTES = 1 << 24  # at once, of the list of members or of the pickle; those of published files take a few 100 kB
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
ALLOWED_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "argparse Namespace",  # the arguments of the command that wrote a SiT checkpoint
    *(f"torch {name}Storage" for name in STORAGES),
}


class RangeFile(io.RawIOBase):
    """A file of `size` bytes on any file system, read range by range, and never more than MAX_READ_BYTES at once."""

    def __init__(self, root: Root, name: str, size: int) -> None:
        self.root = root
        self.name = name
        self.size = size
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int | None = -1) -> bytes:
        size = self.size if size is None or size < 0 else size
        end = min(self.position + size, self.size)
        if end - self.position > MAX_READ_BYTES:
            raise ValueError(f"got a part of {end - self.position} bytes, expected at most {MAX_READ_BYTES}")
        data = self.root.read_range(self.name, self.position, end) if end > self.position else b""
        self.position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class TorchFile:
    """A file that torch.save wrote. `content` is what was saved, its tensors on the meta device, without values.

    Raises StageError if it is not one, or if its pickle names anything but dicts, tensors and the arguments of a
    command.
    """

    def __init__(self, root: Root, name: str, size: int) -> None:
        self.root = root
        self.name = name
        self.url = f"{root.url}/{name}"
        self.size = size
        try:
            opened = cast(IO[bytes], RangeFile(root, name, size))
            with zipfile.ZipFile(opened) as archive:
                self._check_members(archive)
            opened.seek(0)
            with torch.serialization.safe_globals([argparse.Namespace]):
                self.content: Any = torch.load(opened, map_location="meta", weights_only=True)
        except (StageError, StoreError):
            raise
        except Exception as error:  # a hostile file can make the parsers of zip and pickle raise anything
            reason = str(error).partition("\n")[0][:200]
            raise StageError(
                f"{self.url}: got a file that cannot be read ({type(error).__name__}: {reason}); expected one that "
                "torch.save wrote"
            ) from error

    def _check_members(self, archive: zipfile.ZipFile) -> None:
        """Raise StageError for an archive that torch.save does not write, or whose pickle names other things than the
        ALLOWED_GLOBALS."""
        members = archive.infolist()
        pickles = [member for member in members if member.filename.partition("/")[2] == "data.pkl"]
        if len(pickles) != 1 or any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise StageError(
                f"{self.url}: got a zip archive that torch.save did not write; expected a file of torch.save"
            )
        names = {
            str(argument) if opcode.name == "GLOBAL" else opcode.name
            for opcode, argument, _ in pickletools.genops(archive.read(pickles[0]))
            if "GLOBAL" in opcode.name or opcode.name in ("INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")
        }
        if unknown := sorted(names - ALLOWED_GLOBALS):
            raise StageError(
                f"{self.url}: got a pickle that uses {list_fields(unknown)}, which could run code; expected tensors in "
                "dicts alone: save the state dict of the network by itself"
            )
        prefix = pickles[0].filename.removesuffix("data.pkl")
        if f"{prefix}byteorder" in archive.namelist() and archive.read(f"{prefix}byteorder") != b"little":
            raise StageError(f"{self.url}: got numbers of the other byte order; save the file on a common machine")
        storages = sorted((member.header_offset, member.file_size) for member in members)
        self.member_offsets = [offset for offset, _ in storages]
        self.member_sizes = [member_size for _, member_size in storages]

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values of tensors of `content`, contiguous, by the same names.

        Raises StageError for a dtype that weights do not have, and for a tensor that is not inside its storage.
        """
        for name, tensor in tensors.items():
            if tensor.dtype not in WEIGHT_DTYPES:
                expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
                got = str(tensor.dtype).removeprefix("torch.")
                raise StageError(f"{self.url}: got tensor {name!r} of dtype {got}, expected one of {expected}")
        needed_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if needed_bytes > self.size:
            raise StageError(f"{self.url}: got tensors of {needed_bytes} bytes in a file of {self.size}")
        # The tensors, copies of them to save, their bytes, and the file of those.
        check_memory(4 * needed_bytes, self.url, "read it on a larger one")
        return {name: self._read_tensor(name, tensor) for name, tensor in tensors.items()}

    def _read_tensor(self, name: str, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        begin, size = storage._checkpoint_offset, storage.nbytes()
        assert begin is not None  # torch.load sets it for the meta device
        member = bisect(self.member_offsets, begin) - 1
        is_storage = member >= 0 and self.member_sizes[member] == size
        if not is_storage or tensor.numel() * tensor.element_size() > size:
            raise StageError(
                f"{self.url}: got tensor {name!r} of shape {list(tensor.shape)} in other bytes than it says; "
                "the file is damaged"
            )
        data = bytearray(self.root.read_range(self.name, begin, begin + size))
        if len(data) != size:
            raise StageError(f"{self.url}: got a file that ends inside tensor {name!r}; copy it again")
        values = torch.frombuffer(data, dtype=tensor.dtype)
        try:
            return values.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).clone(
                memory_format=torch.contiguous_format
            )
        except RuntimeError as error:
            raise StageError(f"{self.url}: got tensor {name!r} that is not inside its storage") from error
