"""ε′: standard normal noise as a pure function of (seed, image index, draw).

Law `philox-as241-v1`: 32-bit words w of Philox 4x64 with key (seed, 0) and counter (0, 0, draw, index), low word first,
become u = (w + ½) / 2³² and then Φ⁻¹(u) by Wichura's algorithm AS 241 in float64, rounded to float32. Only + - * / and
square root touch a value, each correctly rounded by IEEE 754, so the bits are the same on every machine, NumPy version
and batch size; NumPy's own normal sampler promises that for none of them.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

NOISE_LAW: Final = "philox-as241-v1"

_CENTRE_P = (
    3.3871328727963666080e0,
    1.3314166789178437745e2,
    1.9715909503065514427e3,
    1.3731693765509461125e4,
    4.5921953931549871457e4,
    6.7265770927008700853e4,
    3.3430575583588128105e4,
    2.5090809287301226727e3,
)
_CENTRE_Q = (
    1.0,
    4.2313330701600911252e1,
    6.8718700749205790830e2,
    5.3941960214247511077e3,
    2.1213794301586595867e4,
    3.9307895800092710610e4,
    2.8729085735721942674e4,
    5.2264952788528545610e3,
)
_TAIL_P = (
    1.42343711074968357734e0,
    4.63033784615654529590e0,
    5.76949722146069140550e0,
    3.64784832476320460504e0,
    1.27045825245236838258e0,
    2.41780725177450611770e-1,
    2.27238449892691845833e-2,
    7.74545014278341407640e-4,
)
_TAIL_Q = (
    1.0,
    2.05319162663775882187e0,
    1.67638483018380384940e0,
    6.89767334985100004550e-1,
    1.48103976427480074590e-1,
    1.51986665636164571966e-2,
    5.47593808499534494600e-4,
    1.05075007164441684324e-9,
)
_LN2 = 0.6931471805599453


def _polynomial(coefficients: tuple[float, ...], r: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.full_like(r, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * r + coefficient
    return total


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm from exactly rounded operations alone; libm's differs between machines."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < 0.7071067811865476
    mantissa, exponent = np.where(small, 2 * mantissa, mantissa), exponent - small
    s = (mantissa - 1) / (mantissa + 1)  # |s| <= 0.172
    series = _polynomial(tuple(1 / (2 * k + 1) for k in range(12)), s * s)
    result: NDArray[np.float64] = 2 * s * series + exponent * _LN2
    return result


def inverse_normal_cdf(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Φ⁻¹(u) for u in [2⁻³³, 1 - 2⁻³³] (AS 241, PPND16; its far-tail branch is out of this range)."""
    q = u - 0.5
    r = 0.180625 - q * q
    out = q * _polynomial(_CENTRE_P, r) / _polynomial(_CENTRE_Q, r)
    tail = np.abs(q) > 0.425
    q = q[tail]
    r = np.sqrt(-_log(np.where(q < 0, u[tail], 1 - u[tail]))) - 1.6
    out[tail] = np.copysign(_polynomial(_TAIL_P, r) / _polynomial(_TAIL_Q, r), q)
    return out


def standard_normal(seed: int, index: NDArray[np.int64], draw: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """ε′ for images `index` (B,) and one draw: float32 (B, *shape)."""
    count = int(np.prod(shape))
    words = np.empty((len(index), -(-count // 2)), dtype="<u8")
    for row, image in zip(words, index.tolist(), strict=True):
        philox = np.random.Philox(
            key=np.array([seed, 0], dtype=np.uint64), counter=np.array([0, 0, draw, image], dtype=np.uint64)
        )
        row[:] = philox.random_raw(len(row))
    u = (words.view("<u4")[:, :count] + 0.5) / 2.0**32
    return inverse_normal_cdf(u).astype(np.float32).reshape(len(index), *shape)
