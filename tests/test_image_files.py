"""Image files as users have them: what their pixels become, which are refused, and how much memory they may take."""

import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nfm.stages.errors import StageError
from nfm.stages.image_files import (
    MAX_FILE_BYTES,
    MAX_SCANS,
    BadImageError,
    SourceImage,
    SquareNotice,
    read_image,
    without_pillow_warnings,
)
from nfm.stages.prepare import DataConfig, prepare
from nfm.storage_specs.storage.errors import StoreError
from tests.tools.memory import run_watched

SIZE = 12
COLOURS = np.random.default_rng(0).integers(0, 256, (9, 14, 4), dtype=np.uint8)
RGB = Image.fromarray(COLOURS[..., :3])
RGBA = Image.fromarray(COLOURS)
DEEP = np.random.default_rng(0).integers(0, 1 << 16, (9, 14), dtype=np.uint16)


def read(path: Path, channels: int = 3) -> SourceImage:
    return read_image(path, channels, SIZE, SquareNotice(SIZE))


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def expected_pixels(image: Image.Image, channels: int = 3) -> NDArray[np.uint8]:
    pixels = np.asarray(image.convert("RGB" if channels == 3 else "L").resize((SIZE, SIZE), Image.Resampling.BOX))
    return np.atleast_3d(pixels).transpose(2, 0, 1)


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes, before: bytes = b"") -> bytes:
    """A PNG of these rows, each of which begins with its filter; `before` are chunks before the pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_images_are_turned_upright(tmp_path: Path, file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image"
    path.write_bytes(encoded(RGB, file_format, exif=exif))
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        assert (upright.size == RGB.size) == (orientation <= 4)
    assert np.array_equal(read(path).pixels, expected_pixels(upright))


@pytest.mark.parametrize("damage", [b"II*\0" + struct.pack("<I", 0xFFFFFFF0), b"II*\0\x08\0\0\0\xff\xff" * 40, b"junk"])
def test_damaged_exif_data_do_no_harm_and_print_nothing(tmp_path: Path, damage: bytes) -> None:
    sound = encoded(RGB, "JPEG")
    segment = b"Exif\0\0" + damage + bytes(40)
    path = tmp_path / "image.jpg"
    path.write_bytes(sound[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + sound[2:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with without_pillow_warnings():
            pixels = read(path).pixels
    assert np.array_equal(pixels, expected_pixels(Image.open(io.BytesIO(sound))))


def over_white(rgba: NDArray[np.uint8]) -> Image.Image:
    alpha = rgba[..., 3:].astype(float) / 255
    return Image.fromarray(np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8))


def palette_with_transparency() -> tuple[bytes, Image.Image]:
    image = RGB.quantize(16)
    transparent = image.getpixel((3, 3))
    rgba = np.asarray(image.convert("RGBA")).copy()
    rgba[np.asarray(image) == transparent, 3] = 0
    return encoded(image, "PNG", transparency=transparent), over_white(rgba)


def deep_rgb() -> bytes:
    return png(14, 9, 16, 2, b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in DEEP))


GREY_AND_ALPHA = Image.fromarray(COLOURS[..., [0, 3]])
UPPER_BYTES = Image.fromarray((DEEP >> 8).astype(np.uint8))
KINDS: dict[str, tuple[bytes, Image.Image]] = {  # the bytes of a file, and the image that they should be read as
    "grey": (encoded(RGB.convert("L"), "PNG"), RGB.convert("L")),
    "black and white": (encoded(RGB.convert("1"), "PNG"), RGB.convert("1")),
    "palette": (encoded(RGB.quantize(16), "PNG"), RGB.quantize(16)),
    "palette with transparency": palette_with_transparency(),
    "transparent": (encoded(RGBA, "PNG"), over_white(COLOURS)),
    "transparent WebP": (encoded(RGBA, "WEBP", lossless=True, exact=True), over_white(COLOURS)),
    "transparent grey": (encoded(GREY_AND_ALPHA, "PNG"), over_white(COLOURS[..., [0, 0, 0, 3]])),
    "16 bits grey": (encoded(Image.fromarray(DEEP), "PNG"), UPPER_BYTES),
    "16 bits RGB": (deep_rgb(), UPPER_BYTES),
    "animated GIF": (
        encoded(RGB.quantize(16), "GIF", save_all=True, append_images=[RGB.quantize(4)]),
        RGB.quantize(16),
    ),
    "animated PNG": (encoded(RGB, "PNG", save_all=True, append_images=[RGB.rotate(180)]), RGB),
    "BMP": (encoded(RGB, "BMP"), RGB),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_pixels_has_one_treatment(tmp_path: Path, kind: str, channels: int) -> None:
    """Whatever the file is called."""
    data, image = KINDS[kind]
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    got = read(path, channels)
    difference = got.pixels.astype(int) - expected_pixels(image, channels)
    assert np.abs(difference).max() <= (1 if "transparen" in kind else 0)  # Pillow blends in integers
    assert got.sha256 == hashlib.sha256(data).hexdigest()


def test_cmyk_is_what_pillow_makes_of_it(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(encoded(RGB.convert("CMYK"), "JPEG"))
    with Image.open(path) as image:
        assert np.array_equal(read(path).pixels, expected_pixels(image))


def test_transparent_pixels_are_white_whatever_colour_they_hide(tmp_path: Path) -> None:
    Image.new("RGBA", (5, 5), (255, 0, 0, 0)).save(tmp_path / "image.png")
    assert (read(tmp_path / "image.png").pixels == 255).all()


def long_text(name: bytes) -> bytes:
    """A PNG whose chunk of text, or colour profile, takes 4 MB, more than Pillow reads."""
    text = zlib.compress(bytes(4_000_000))
    content = b"key\0" + (b"\1\0\0\0" if name == b"iTXt" else b"\0") + text
    rows = b"".join(b"\0" + row.tobytes() for row in COLOURS[..., :3])
    return png(14, 9, 8, 2, rows, before=png_chunk(name, content))


@pytest.mark.parametrize("name", [b"iTXt", b"zTXt", b"iCCP"])
def test_long_texts_of_a_png_are_not_read(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(long_text(name))
    assert np.array_equal(read(path).pixels, expected_pixels(RGB))


def progressive(num_scans: int) -> bytes:
    """A JPEG whose last scan is there so often that it has this many."""
    data = encoded(RGB, "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * (num_scans - data.count(b"\xff\xda")) + data[-2:]


def test_a_jpeg_may_have_64_scans(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(progressive(MAX_SCANS))
    assert read(path).pixels.shape == (3, SIZE, SIZE)


def rle_bmp(side: int) -> bytes:
    """A square BMP of 4 bytes a row: one pixel of colour 9, and the end of the row."""
    rows = b"\x01\x09\x00\x00" * side + b"\x00\x01"
    size = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(rows), 0, 0, 256, 0)
    palette = b"".join(bytes([i, i, i, 0]) for i in range(256))
    return b"BM" + struct.pack("<IHHI", 1078 + len(rows), 0, 0, 1078) + size + palette + rows


def test_a_small_rle_bmp_is_read(tmp_path: Path) -> None:
    path = tmp_path / "image.bmp"
    path.write_bytes(rle_bmp(SIZE))
    assert (read(path).pixels[:, :, 0] == 9).all()


WHOLE = encoded(RGB, "JPEG")
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "text": (b"no image", "no readable JPEG, PNG, WEBP, GIF or BMP image"),
    "TIFF": (encoded(RGB, "TIFF"), "no readable JPEG"),
    "cut JPEG": (WHOLE[: len(WHOLE) // 2], "."),
    "too many scans": (progressive(MAX_SCANS + 1), "got a JPEG of more than 64 scans"),
    "large RLE": (rle_bmp(5000), "got 25000000 pixels of an RLE-compressed BMP, expected at most 16777216"),
    "cut PNG": (encoded(RGB, "PNG")[:-60], "."),
    "cut chunk": (encoded(RGB, "PNG")[:50], "."),
    "damaged PNG": (encoded(RGB, "PNG").replace(b"IDAT", b"IDAX"), "."),
    "macOS companion": (bytes.fromhex("00051607000200004d6163204f532058") + bytes(4080), "no readable JPEG"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_whole_image_is_refused(tmp_path: Path, kind: str) -> None:
    data, reason = BAD[kind]
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    with pytest.raises(BadImageError, match=reason) as caught:
        read(path)
    assert caught.value.reason
    assert str(caught.value) == f"{path}: {caught.value.reason}"


def bomb(path: Path) -> None:
    path.write_bytes(png(60_000, 60_000, 8, 6, bytes(1 << 20)))


def webp_bomb(path: Path) -> None:
    data = bytearray(encoded(RGBA, "WEBP", exif=b"Exif\0\0II*\0"))
    assert data[12:16] == b"VP8X"
    data[24:30] = b"\xfe\x3f\0\xfe\x3f\0"  # 16383 × 16383
    path.write_bytes(data)


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(200 << 30)


@pytest.mark.parametrize(
    ("make", "message"), [(bomb, "pixels"), (webp_bomb, "limit"), (sparse, f"expected at most {MAX_FILE_BYTES}")]
)
def test_what_a_file_says_of_its_size_takes_no_memory(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "image.png"
    make(path)
    outcome = run_watched(read, path, max_bytes=100 << 20, timeout=10)
    assert outcome.error == "BadImageError", outcome
    assert message in outcome.message


def test_an_output_that_cannot_be_written_is_refused_before_images_are_decoded(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("nfm.stages.prepare.find_fault")
    config = DataConfig(source="folder", image_size=SIZE, channels=3, holdout=0.34, block_rows=4)
    with pytest.raises(StoreError, match=r"^/proc/nothing: No such file or directory; expected a folder to write to"):
        prepare(config, "/proc/nothing", images)


@pytest.mark.parametrize("out", ["train/stores", "train", "val/deep/er"])
def test_stores_are_not_written_into_a_folder_of_images(images: Path, out: str) -> None:
    """There they would be a class."""
    with pytest.raises((StageError, StoreError), match="lies inside|expected an empty folder"):
        prepare(
            DataConfig(source="folder", image_size=8, channels=3, holdout=0.34, block_rows=4), f"{images}/{out}", images
        )
    assert not (images / out / "train").exists()
