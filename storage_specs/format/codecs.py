"""How z is stored: float32, float16, bfloat16, or int8 with a scale for each dimension.

NumPy has no bfloat16, so a file holds it as uint16, the upper half of the float32 it stands for. z is near Gaussian in
every dimension (NFM paper section 3), so int8 spreads its 255 levels evenly over ±INT8_RANGE root mean squares.
"""

import math
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.npy import npy_header

ZDtype = Literal["float32", "float16", "bfloat16", "int8"]

STORED_DTYPES: Final[dict[ZDtype, str]] = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "|i1"}
STORED_MEANING: Final[dict[ZDtype, str]] = {
    "float32": "z",
    "float16": "z",
    "bfloat16": "upper 16 bits of float32 z: (value.astype('<u4') << 16).view('<f4')",
    "int8": "z / z_scale.npy, rounded: value * z_scale",
}
MAX_MAGNITUDE: Final = 2.0**100  # of stored numbers, so that they stay finite when divided by σ_f
MIN_SCALE, MAX_SCALE = 1e-8, 1e20  # of σ_f and the int8 scale, so that z / σ_f stays finite
INT8_RANGE: Final = 5.0  # beyond it, 6e-7 of a normal distribution is clipped


def int8_scale(z: NDArray[np.float32]) -> NDArray[np.float32]:
    """The step of each dimension, float32 (C, H, W), from a sample z (rows, C, H, W)."""
    rms = np.sqrt(np.square(z.astype(np.float64)).mean(axis=0))
    if not (np.isfinite(rms) & (rms > 0)).all():
        raise FloatingPointError("z is zero or not finite in some dimension, which leaves int8 without a scale")
    scale: NDArray[np.float32] = (rms * (INT8_RANGE / 127)).astype("<f4")
    return scale


def encode_z(z: NDArray[np.float32], dtype: ZDtype, scale: NDArray[np.float32] | None) -> NDArray[Any]:
    """z (…, C, H, W) float32 as it is stored, rounded to nearest, ties to even."""
    stored = np.dtype(STORED_DTYPES[dtype])
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(z, "<f4").view("<u4")
        return np.asarray((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, dtype=stored)
    if dtype == "int8":
        assert scale is not None
        return np.asarray(np.clip(np.rint(z / scale), -127, 127), dtype=stored)
    # By torch: NumPy converts to and from float16 ten times slower. The writer refuses what became infinite.
    return torch.from_numpy(np.ascontiguousarray(z)).to(getattr(torch, dtype)).numpy()


def decode_z(stored: NDArray[Any], dtype: ZDtype, scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """The float32 values that stored z stands for, as `encode` takes them."""
    if dtype == "bfloat16":
        bits: NDArray[np.float32] = (stored.astype("<u4") << 16).view("<f4")
        return bits
    values = torch.from_numpy(np.array(stored, order="C")).float().numpy()
    if dtype == "int8":
        assert scale is not None
        return np.asarray(values * scale)
    return np.asarray(values)


def all_finite(stored: NDArray[Any]) -> bool:
    """Whether every stored number is finite, and below MAX_MAGNITUDE = 2¹⁰⁰; told from the exponent bits."""
    exponents = {
        "<f4": ("<u4", 0x7F800000, 227 << 23),
        "<f2": ("<u2", 0x7C00, 0x7C00),
        "<u2": ("<u2", 0x7F80, 227 << 7),
    }
    if stored.dtype == np.int8:
        return True
    dtype, mask, limit = exponents[stored.dtype.str]
    bits = stored.view(dtype)
    return all(
        not ((bits[start : start + 64] & bits.dtype.type(mask)) >= limit).any() for start in range(0, len(bits), 64)
    )


def parse_positive_npy(data: bytes, shape: tuple[int, int, int], name: str) -> NDArray[np.float32]:
    """The values of an npy file that must hold positive finite float32 (C, H, W), which no header of its own can
    change.
    """
    header = npy_header(np.dtype("<f4"), shape)
    if not data.startswith(header) or len(data) != len(header) + 4 * math.prod(shape):
        raise StoreError(f"{name}: expected an npy file of float32 with shape {shape}")
    values: NDArray[np.float32] = np.frombuffer(data, "<f4", offset=len(header)).reshape(shape)
    if not ((values > MIN_SCALE) & (values < MAX_SCALE)).all():
        raise StoreError(f"{name}: expected values between {MIN_SCALE} and {MAX_SCALE}")
    return values
