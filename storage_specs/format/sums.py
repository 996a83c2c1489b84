"""Sums over z, from which σ_f and the moments of z follow: a commit record has those of its unit, a store those of all.

They show how Gaussian z is, in each dimension and in each class. Both together, by class and dimension, would take more
room than z itself on ImageNet, where a block has hardly two images of a class.

The order of every addition is fixed, so that the bits depend neither on the machine nor on how draws were spread over
units.
"""

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from nfm.storage_specs.format.schema import Spec

NUM_POWERS = 4  # z, z², z³, z⁴
_ROWS_AT_ONCE = 64  # keeps the temporary arrays in the cache of a CPU


class ZSums(NamedTuple):
    """Σ z, Σ z², Σ z³, Σ z⁴ over rows, in float64."""

    by_dimension: NDArray[np.float64]  # (4, C, H, W)
    by_class: NDArray[np.float64]  # (classes, 4): over all dimensions of the rows of each class

    @classmethod
    def zero(cls, spec: Spec) -> Self:
        """The sums over no rows."""
        return cls(np.zeros((NUM_POWERS, *spec.shape)), np.zeros((spec.num_classes, NUM_POWERS)))

    def add(self, other: "ZSums") -> None:
        """Add other sums to these."""
        self.by_dimension[...] += other.by_dimension
        self.by_class[...] += other.by_class


def sum_z(spec: Spec, z: NDArray[np.float32], label: NDArray[np.int64]) -> ZSums:
    """The sums over z (rows, C, H, W) with labels (rows,), which are ignored where the spec has no classes."""
    sums = ZSums.zero(spec)
    by_dimension = sums.by_dimension.reshape(NUM_POWERS, -1)
    for start in range(0, len(z), _ROWS_AT_ONCE):
        base = z[start : start + _ROWS_AT_ONCE].reshape(-1, spec.dim).astype(np.float64)
        labels = label[start : start + _ROWS_AT_ONCE]
        power = np.ones_like(base)
        for number in range(NUM_POWERS):
            power *= base
            by_dimension[number] += power.sum(axis=0)
            if spec.has_labels:
                sums.by_class[:, number] += np.bincount(labels, _sum_rows(power), minlength=spec.num_classes)
    return sums


def _sum_rows(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of each row of values (rows, n), (rows,), by adding halves."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        sums = values[:, :half] + values[:, half : 2 * half]
        if values.shape[1] % 2:
            sums[:, 0] += values[:, -1]
        values = sums
    return values[:, 0]


def sigma_f(spec: Spec, sums: ZSums) -> NDArray[np.float32]:
    """σ_f = √(mean of z²), float32 (C, H, W), over the data set and draws (NFM paper section 3.2)."""
    scale: NDArray[np.float32] = np.sqrt(sums.by_dimension[1] / (spec.rows * spec.num_draws)).astype(np.float32)
    return scale


class Moments(NamedTuple):
    """How far z is from a Gaussian: root mean squares over dimensions of its mean, skewness and excess kurtosis, which
    are 0 for a Gaussian of mean 0."""

    mean: float  # in units of the standard deviation
    skewness: float
    excess_kurtosis: float


def moments(spec: Spec, by_dimension: NDArray[np.float64]) -> Moments:
    """The moments of z from its sums by dimension, (4, C, H, W). They are not finite where z does not vary, or where
    the sums are not those of any values."""
    with np.errstate(all="ignore"):
        m1, m2, m3, m4 = by_dimension.reshape(NUM_POWERS, -1) / (spec.rows * spec.num_draws)
        variance = np.maximum(m2 - m1**2, np.finfo(np.float64).tiny)
        third = m3 - 3 * m1 * m2 + 2 * m1**3  # central moments
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        return Moments(_rms(m1 / np.sqrt(variance)), _rms(third / variance**1.5), _rms(fourth / variance**2 - 3))


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
