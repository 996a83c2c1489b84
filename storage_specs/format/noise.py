"""ε′: standard normal noise as a pure function of (seed, image index, draw).

Law `philox-as241-v1`: NumPy's `Philox` (Philox 4x64-10), constructed with key (seed, 0) and counter
(0, 0, draw, index), gives 32-bit words w, low word first. NumPy increments the counter before each block of words, so
the first block is that of counter (1, 0, draw, index). Each word becomes u = (w + ½) / 2³² and then Φ⁻¹(u) by
Wichura's algorithm AS 241 in float64, rounded to float32.

Only + - * / and square root are applied to a value. IEEE 754 rounds each of them correctly, so the bits are the same on
every machine, NumPy version and batch size. NumPy's own normal sampler promises none of that. The order of the
operations below is part of the law.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

NOISE_LAW: Final = "philox-as241-v1"

# AS 241 (Wichura 1988), PPND16: coefficients of its rational approximations, lowest power first. Its names are a, b for
# the centre and c, d for the tail.
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
_ARTANH = tuple(1 / (2 * k + 1) for k in range(12))  # artanh(s) / s as a polynomial in s²
_LN2 = 0.6931471805599453
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD  # of the float64 0.7071067811865476
_CHUNK = 1 << 16  # values at a time: 2 MiB of scratch stay in a CPU cache, and the GIL is not taken too often


def _polynomial(coefficients: tuple[float, ...], x: NDArray[np.float64], out: NDArray[np.float64]) -> None:
    """out = Σ coefficients[i] · xⁱ, by Horner's scheme."""
    np.multiply(x, coefficients[-1], out=out)
    for coefficient in coefficients[-2:0:-1]:
        out += coefficient
        out *= x
    out += coefficients[0]


def _natural_log(
    x: NDArray[np.float64], out: NDArray[np.float64], scratch_1: NDArray[np.float64], scratch_2: NDArray[np.float64]
) -> None:
    """out = ln x for positive x. It consists of correctly rounded operations, unlike the logarithm of libm, which
    differs between machines. x and both scratch arrays are overwritten.

    With x = 2ᵏ · m, m in [√½, √2) and s = (m - 1) / (m + 1): ln x = k · ln 2 + 2 artanh(s).
    """
    bits = x.view(np.int64)
    exponent = scratch_2.view(np.int64)
    np.subtract(bits, _SQRT_HALF_BITS, out=exponent)
    exponent >>= 52  # k
    shifted_exponent = scratch_1.view(np.int64)
    np.left_shift(exponent, 52, out=shifted_exponent)
    bits -= shifted_exponent  # x now holds m
    s = scratch_1
    np.subtract(x, 1, out=s)
    x += 1
    s /= x  # |s| <= 0.172
    np.multiply(s, s, out=x)
    _polynomial(_ARTANH, x, out)
    s *= 2
    out *= s
    np.multiply(exponent, _LN2, out=s)
    out += s


def _normal_from_chunk(words: NDArray[np.uint32], scratch: NDArray[np.float64]) -> None:
    """`normal_from_words` for at most as many words as `scratch`, float64 (4, _CHUNK), has columns."""
    q, r, value, divisor = scratch[:, : len(words)]
    np.copyto(q, words)
    q -= 2.0**31 - 0.5
    q *= 2.0**-32  # u - ½, exactly
    # The centre, |q| <= 0.425: Φ⁻¹ = q · P(r) / Q(r) with r = 0.180625 - q². It is computed for all values.
    np.multiply(q, q, out=r)
    np.subtract(0.180625, r, out=r)
    _polynomial(_CENTRE_P, r, value)
    _polynomial(_CENTRE_Q, r, divisor)
    value *= q
    value /= divisor
    out = words.view(np.float32)
    out[:] = value
    # The tails: Φ⁻¹ = ± P(r) / Q(r) with r = √(-ln min(u, 1 - u)) - 1.6.
    tail = np.flatnonzero(np.abs(q, out=r) > 0.425)
    q = q[tail]
    p, r, value, divisor = scratch[:, : len(tail)]
    np.subtract(0.5, np.abs(q, out=p), out=p)  # the smaller of u and 1 - u, exactly
    _natural_log(p, value, r, divisor)
    np.sqrt(np.negative(value, out=value), out=r)
    r -= 1.6
    _polynomial(_TAIL_P, r, value)
    _polynomial(_TAIL_Q, r, divisor)
    value /= divisor
    out[tail] = np.copysign(value, q, out=value)


def normal_from_words(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Φ⁻¹((w + ½) / 2³²) of every word w, by AS 241 (PPND16). Words are never so small that its far tail is needed.

    `words` (n,) is overwritten: the result (n,) is a view of its memory.
    """
    scratch = np.empty((4, min(_CHUNK, len(words))))
    for start in range(0, len(words), _CHUNK):
        _normal_from_chunk(words[start : start + _CHUNK], scratch)
    return words.view(np.float32)


def standard_normal(seed: int, index: NDArray[np.int64], draw: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """ε′ of one draw for the images `index` (B,): float32 (B, *shape)."""
    num_values = int(np.prod(shape))
    words = np.empty((len(index), -(-num_values // 2)), dtype="<u8")  # 64 bits give two values
    key = np.array([seed, 0], dtype=np.uint64)
    counter = np.array([0, 0, draw, 0], dtype=np.uint64)
    philox = np.random.Philox(key=key, counter=counter)
    state = philox.state
    for row, image in zip(words, index.tolist(), strict=True):
        state["state"]["counter"][3] = image
        philox.state = state  # takes a tenth of the time of a new Philox
        row[:] = philox.random_raw(len(row))
    return normal_from_words(words.view("<u4")[:, :num_values].ravel()).reshape(len(index), *shape)
