"""One image file of a user's: its bytes, and its pixels as upright RGB or grey squares.

Every file of FORMATS is read, whatever its name says, in one way for each kind of pixels (see DECODING). What a file
says of its size is bounded before memory is taken for it.
"""

import hashlib
import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from threading import Lock, RLock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from nfm.stages.errors import StageError
from nfm.stages.progress import print_line

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
MAX_FILE_BYTES = 1 << 28
MAX_PIXELS = 178_956_970  # of one image; Pillow's own limit. Decoding one takes up to 2 GB
MAX_SCANS = 64  # of a JPEG, each of which passes over all pixels; encoders write at most some 20
LARGE = 1 << 24  # pixels or bytes from which on images are decoded one at a time, so that their memory does not add up
# What the pixels of a file become, as stores record it.
DECODING = {
    "orientation": "EXIF",
    "transparency": "over white",
    "16 bits a channel": "the upper 8",
    "animation": "first frame",
    "colour profile": "ignored",
}
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF's numbers, as in PIL.ImageOps.exif_transpose
_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"}  # of Pillow, that files of FORMATS can have
# The start of a scan of 1 to 4 components, as decoders demand it. It cannot stand inside the coded pixels.
_JPEG_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
_BMP_RLE = (1, 2)  # compressions that Pillow decodes in Python, byte by byte
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks that pixels do not need, and that decompress to any length

_large_image = RLock()


class BadImageError(StageError):
    """A file holds no image that can be used; `reason` says why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


class SourceImage(NamedTuple):
    """An image as stores hold it, and the sha256 of the bytes that it was decoded from."""

    pixels: NDArray[np.uint8]  # (C, H, W)
    sha256: str


class SquareNotice:
    """Says once, on stderr, how images that are not square become square."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size
        self.is_printed = False
        self.lock = Lock()  # images are decoded by several threads

    def print_once(self, path: Path, width: int, height: int) -> None:
        """Print the notice, if this is the first image that is not square."""
        if width == height:
            return
        with self.lock:
            if self.is_printed:
                return
            self.is_printed = True
        print_line(
            f"note: {path} is {width}×{height}; "
            f"images that are not square are stretched to {self.image_size}×{self.image_size} as a whole, "
            "without a crop (PIL's box filter, as in the paper)"
        )


@contextmanager
def without_pillow_warnings() -> Iterator[None]:
    """Inside the block, Pillow's warnings are not printed: what they say of a file, such as damaged EXIF data, does its
    pixels no harm or is an error as well. The filter is that of the whole process, threads included."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def read_image(path: Path, channels: int, size: int, notice: SquareNotice) -> SourceImage:
    """The image in a file, upright, as uint8 (channels, size, size). Its bytes are read once.

    Raises BadImageError if they are no whole image of FORMATS, or a larger one than MAX_FILE_BYTES and MAX_PIXELS
    allow, OSError if the file cannot be read.
    """
    with ExitStack() as stack, open(path, "rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > MAX_FILE_BYTES:
            raise BadImageError(path, f"got {num_bytes} bytes, expected at most {MAX_FILE_BYTES}")
        if num_bytes > LARGE:
            stack.enter_context(_large_image)
        data = file.read(num_bytes)
        image = _decode(path, data, "L" if channels == 1 else "RGB", stack)
        notice.print_once(path, *image.size)
        pixels = np.atleast_3d(np.asarray(image.resize((size, size), Image.Resampling.BOX)))
    return SourceImage(np.ascontiguousarray(pixels.transpose(2, 0, 1)), hashlib.sha256(data).hexdigest())


def _decode(path: Path, data: bytes, mode: str, stack: ExitStack) -> Image.Image:
    """The first image in the bytes of a file, upright, in Pillow's mode "L" or "RGB". While `stack` is open, no other
    image is decoded if this one is large."""
    try:
        _check_scans(data)
        image = Image.open(io.BytesIO(_without_png_text(data)), formats=FORMATS)
        num_pixels = image.width * image.height
        if num_pixels > MAX_PIXELS:
            raise ValueError(f"got {num_pixels} pixels, expected at most {MAX_PIXELS}")
        if num_pixels > LARGE and image.format == "BMP" and image.info.get("compression") in _BMP_RLE:
            raise ValueError(f"got {num_pixels} pixels of an RLE-compressed BMP, expected at most {LARGE}; save as PNG")
        if num_pixels > LARGE:
            stack.enter_context(_large_image)
        image.load()
        transposition = _ORIENTATIONS.get(_orientation(image))
        upright = image if transposition is None else image.transpose(transposition)
        return _flatten(upright, mode)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        expected = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
        raise BadImageError(path, f"no readable {expected}" if data else "an empty file") from error
    except Exception as error:  # decoders raise many kinds for damaged bytes, and have nothing but these bytes
        raise BadImageError(path, f"{error or type(error).__name__}") from error


def _check_scans(data: bytes) -> None:
    """Raise ValueError for a JPEG of more scans than MAX_SCANS, with those of pictures inside or behind it."""
    if data.startswith(b"\xff\xd8") and any(islice(_JPEG_SCAN.finditer(data), MAX_SCANS, None)):
        raise ValueError(f"got a JPEG of more than {MAX_SCANS} scans; save it again")


def _without_png_text(data: bytes) -> bytes:
    """The bytes of a PNG without its texts and its colour profile; other bytes as they are."""
    if not data.startswith(_PNG_SIGNATURE):
        return data
    kept = bytearray(_PNG_SIGNATURE)
    position = len(_PNG_SIGNATURE)
    while position < len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")  # length, name, content, CRC
        if data[position + 4 : position + 8] not in _PNG_TEXT:
            kept += memoryview(data)[position:end]
        position = end
    return bytes(kept)


def _orientation(image: Image.Image) -> int:
    """The orientation that EXIF gives to an image; 1, upright, if it gives none or cannot be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of many kinds; damaged EXIF data do not harm the pixels
        return 1
    return value if isinstance(value, int) else 1


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    """The image in the mode "L" or "RGB", as DECODING says. Raises ValueError for pixels of another kind."""
    if image.mode not in _MODES:
        raise ValueError(f"got pixels of Pillow's mode {image.mode}, expected grey, RGB, CMYK or a palette")
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(rgba, mask=rgba)
    return image if image.mode == mode else image.convert(mode)  # which would copy it
