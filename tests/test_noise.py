"""ε′ must be the same bits everywhere, forever, and standard normal."""

import numpy as np
import pytest
from scipy import special, stats

from storage_specs.noise import inverse_normal_cdf, standard_normal

FROZEN = {
    (0, 0, 0): [
        "-0x1.d0b4f00000000p+0",
        "-0x1.22cd1a0000000p+1",
        "0x1.233b400000000p-2",
        "-0x1.6714740000000p-1",
        "-0x1.6019000000000p-2",
        "-0x1.380f160000000p+0",
    ],
    (3, 7, 2): [
        "-0x1.a0aba20000000p-2",
        "-0x1.e3eaae0000000p-2",
        "-0x1.338b120000000p-3",
        "0x1.cc4bd40000000p-4",
        "0x1.7ee2e80000000p-5",
        "0x1.d10fb00000000p-4",
    ],
    (2**31 - 1, 1_281_166, 7): [
        "-0x1.5167ae0000000p-1",
        "0x1.3ea7a20000000p+0",
        "-0x1.7743b60000000p-4",
        "0x1.db4d3a0000000p-1",
        "0x1.4e05720000000p-4",
        "0x1.30e55a0000000p+0",
    ],
}


@pytest.mark.parametrize(("key", "bits"), FROZEN.items())
def test_frozen_values(key: tuple[int, int, int], bits: list[str]) -> None:
    seed, index, draw = key
    values = standard_normal(seed, np.array([index]), draw, (1, 2, 3))
    assert [value.hex() for value in values.flatten().tolist()] == bits


def test_a_value_depends_on_its_own_key_alone() -> None:
    together = standard_normal(1, np.arange(10), 4, (3, 5, 5))
    for index in (0, 3, 9):
        assert np.array_equal(standard_normal(1, np.array([index]), 4, (3, 5, 5))[0], together[index])


def test_keys_give_different_noise() -> None:
    index = np.arange(2)
    draws = [standard_normal(seed, index, draw, (8, 8, 8)).ravel() for seed in (0, 1) for draw in (0, 1)]
    correlation = np.corrcoef([half for noise in draws for half in np.split(noise, 2)])
    assert np.abs(correlation - np.eye(8)).max() < 0.2  # 512 values: 4.5 standard errors


def test_inverse_normal_cdf_agrees_with_scipy_to_the_last_bits() -> None:
    u = np.concatenate([np.linspace(1e-9, 1 - 1e-9, 100_001), 2.0 ** -np.arange(1, 34), 1 - 2.0 ** -np.arange(1, 34)])
    np.testing.assert_allclose(inverse_normal_cdf(u), special.ndtri(u), atol=1e-14, rtol=1e-14)


def test_moments_and_tails_of_a_million_values() -> None:
    values = standard_normal(5, np.arange(64), 0, (1, 128, 128)).astype(np.float64).ravel()
    n = values.size
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((values**power).mean() - expected) < 4.5 * (variance / n) ** 0.5
    assert stats.kstest(values, "norm").pvalue > 1e-3
    for threshold in (2.0, 3.0, 4.0):
        p = 2 * special.ndtr(-threshold)
        assert abs((np.abs(values) > threshold).sum() - n * p) < 4.5 * (n * p) ** 0.5
