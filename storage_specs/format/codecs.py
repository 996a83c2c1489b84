"""How numbers are stored: float32, float16 or bfloat16, and z also as int8 with a scale for each dimension.

NumPy has no bfloat16, so a file holds it as uint16, the upper half of the float32 it stands for. z is near Gaussian in
every dimension (NFM paper, section 3), so int8 spreads its 255 levels evenly over ±INT8_RANGE root mean squares.
"""

import math
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.npy import npy_header

FloatDtype = Literal["float32", "float16", "bfloat16"]
ZDtype = Literal[FloatDtype, "int8"]

STORED_DTYPES: Final[dict[ZDtype, str]] = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "|i1"}
# For the card: how to get z from a stored value, where the value is not z itself.
STORED_MEANING: Final[dict[ZDtype, str]] = {
    "bfloat16": "upper 16 bits of float32 z: (value.astype('<u4') << 16).view('<f4')",
    "int8": "z / z_scale.npy, rounded: value * z_scale",
}
MAX_MAGNITUDE: Final = 2.0**100  # of a stored number, so that it stays finite when divided by σ_f
MIN_SCALE, MAX_SCALE = 1e-8, 1e20  # of σ_f and of the int8 scale, so that z / σ_f stays finite
INT8_RANGE: Final = 5.0  # int8 clips 6e-7 of a normal distribution, what lies beyond so many standard deviations
_ROWS_PER_CHECK = 64  # that `all_finite` tests at once, which keeps its temporary arrays small


def int8_scale(z: NDArray[np.float32]) -> NDArray[np.float32]:
    """The step between two int8 levels in each dimension, float32 (C, H, W), from a sample of z (rows, C, H, W).

    Raises FloatingPointError if z is zero or not finite in some dimension.
    """
    rms = np.sqrt(np.square(z.astype(np.float64)).mean(axis=0))
    if not (np.isfinite(rms) & (rms > 0)).all():
        raise FloatingPointError("z is zero or not finite in some dimension, which leaves int8 without a scale")
    scale: NDArray[np.float32] = (rms * (INT8_RANGE / 127)).astype("<f4")
    return scale


def encode_float(values: NDArray[np.float32], dtype: FloatDtype) -> NDArray[Any]:
    """float32 values in their stored form, rounded to nearest, ties to even."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, "<f4").view("<u4")
        lowest_kept_bit = (bits >> 16) & 1
        return np.asarray((bits + 0x7FFF + lowest_kept_bit) >> 16, dtype=STORED_DTYPES[dtype])
    # By torch: NumPy converts to and from float16 ten times slower. The writer refuses what overflows to infinity.
    return torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, dtype)).numpy()


def decode_float(stored: NDArray[Any], dtype: FloatDtype) -> NDArray[np.float32]:
    """The float32 values that stored ones stand for."""
    if dtype == "bfloat16":
        return np.asarray((stored.astype("<u4") << 16).view("<f4"))
    return np.asarray(torch.from_numpy(np.array(stored, order="C")).float().numpy())


def encode_z(z: NDArray[np.float32], dtype: ZDtype, scale: NDArray[np.float32] | None) -> NDArray[Any]:
    """z (…, C, H, W) float32 in its stored form, rounded to nearest, ties to even. `scale` (C, H, W) is for int8."""
    if dtype == "int8":
        assert scale is not None
        return np.asarray(np.clip(np.rint(z / scale), -127, 127), dtype=STORED_DTYPES[dtype])
    return encode_float(z, dtype)


def decode_z(stored: NDArray[Any], dtype: ZDtype, scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """The float32 z that stored values stand for; the inverse of `encode_z` but for its rounding."""
    if dtype == "int8":
        assert scale is not None
        return np.asarray(stored.astype(np.float32) * scale)
    return decode_float(stored, dtype)


# By stored dtype: the unsigned type of its bits, the mask of its exponent, and the exponent that is too large: that of
# MAX_MAGNITUDE = 2¹⁰⁰ (100 + the bias of 127), or for float16 that of infinity.
_EXPONENT_BITS = {
    "<f4": ("<u4", 0x7F800000, 227 << 23),
    "<f2": ("<u2", 0x7C00, 0x7C00),
    "<u2": ("<u2", 0x7F80, 227 << 7),
}


def all_finite(stored: NDArray[Any]) -> bool:
    """Whether every stored number (rows, …) is finite and below MAX_MAGNITUDE = 2¹⁰⁰; always true of int8.

    It looks at the exponent bits, which is faster than a conversion to float32.
    """
    if stored.dtype == np.int8:
        return True
    bits_dtype, mask, first_bad_exponent = _EXPONENT_BITS[stored.dtype.str]
    bits = stored.view(bits_dtype)
    for start in range(0, len(bits), _ROWS_PER_CHECK):
        exponents = bits[start : start + _ROWS_PER_CHECK] & bits.dtype.type(mask)
        if (exponents >= first_bad_exponent).any():
            return False
    return True


def parse_positive_npy(data: bytes, shape: tuple[int, int, int], name: str) -> NDArray[np.float32]:
    """The values of an npy file that must hold float32 (C, H, W) between MIN_SCALE and MAX_SCALE, such as σ_f.

    The file's own header is compared and never interpreted, so it cannot ask for another type or for memory. Raises
    StoreError with the file's `name` if the header or the values are others.
    """
    header = npy_header(np.dtype("<f4"), shape)
    if not data.startswith(header) or len(data) != len(header) + 4 * math.prod(shape):
        raise StoreError(f"{name}: expected an npy file of float32 with shape {shape}")
    values: NDArray[np.float32] = np.frombuffer(data, "<f4", offset=len(header)).reshape(shape)
    if not ((values > MIN_SCALE) & (values < MAX_SCALE)).all():
        raise StoreError(f"{name}: expected values between {MIN_SCALE} and {MAX_SCALE}")
    return values
