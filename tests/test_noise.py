"""ε′ must be the same bits everywhere, forever, and standard normal."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from scipy import special, stats

from nfm.storage_specs.format.noise import normal_from_words, standard_normal

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


FROZEN_BATCHES = {
    (1, 1, 1): "f801713344772c960b1593bd18407df6bb5c26ef17cd301de2658c0cd77cd959",
    (1, 8, 8): "e0a2b802f9325a6a78cbbf48be184003c2113a84b3a27c2ed400f93cd42daec1",
    (3, 5, 5): "9168722376811f382aee0bd841bc607ce084a50c234e4efdb114bb457ce5c89b",
    (3, 32, 32): "6a3b308abe008d286cc8ef34cb731d895f73a25d2fe84f7e1928bbe876233540",
    (3, 64, 64): "ba857f2d2a34d4e1bf2ba6607d5364da57ddb7771b7b2d8c52a8f9aa4947799d",
}


@pytest.mark.parametrize(("shape", "sha256"), FROZEN_BATCHES.items())
def test_frozen_batches(shape: tuple[int, ...], sha256: str) -> None:
    index = np.arange(64 if shape != (3, 64, 64) else 8) * 20_011
    noise = np.stack([standard_normal(11, index, draw, shape) for draw in (0, 1, 7)])
    assert noise.dtype == np.float32 and noise.shape == (3, len(index), *shape)
    assert hashlib.sha256(noise.astype("<f4").tobytes()).hexdigest() == sha256


def test_frozen_and_antisymmetric_over_the_range_of_words() -> None:
    words = np.arange(0, 2**32, 8191, dtype=np.uint32)
    low, high = normal_from_words(words.copy()), normal_from_words(~words)
    assert np.array_equal(low, -high)
    sha256 = hashlib.sha256(np.concatenate([low, high]).astype("<f4").tobytes()).hexdigest()
    assert sha256 == "3a166d3e4ab59c2e76a738463e2b2dbf75d04edca2c802ba9c1774243b3caf90"


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 8), (3, 5, 5), (3, 32, 32)])
def test_the_same_for_every_world_size_and_batch_size_and_from_threads_at_once(shape: tuple[int, ...]) -> None:
    index = np.random.default_rng(0).permutation(1_281_167)[:37]
    all_at_once = standard_normal(1, index, 4, shape)  # (3, 32, 32) is more than one chunk
    parts = [
        rank_rows[start : start + batch]
        for world, batch in ((1, 1), (2, 16), (3, 5), (8, 2))
        for rank_rows in (np.arange(37)[rank::world] for rank in range(world))
        for start in range(0, len(rank_rows), batch)
    ]
    with ThreadPoolExecutor(8) as pool:
        noises = pool.map(lambda rows: standard_normal(1, index[rows], 4, shape), parts)
        for rows, noise in zip(parts, noises, strict=True):
            assert np.array_equal(noise, all_at_once[rows]) and noise.flags.c_contiguous


def test_the_same_without_the_vector_instructions_of_this_cpu() -> None:
    """As another machine would draw it: NumPy takes other loops where a CPU has fewer instructions."""
    script = """
import sys
import numpy as np
from nfm.storage_specs.format.noise import standard_normal
sys.stdout.buffer.write(standard_normal(11, np.arange(16), 1, (3, 32, 32)).astype("<f4").tobytes())
"""
    extensions = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    env = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(extensions)}
    root = Path(__file__).parents[1]
    drawn = subprocess.run([sys.executable, "-c", script], env=env, cwd=root, check=True, capture_output=True).stdout
    assert drawn == standard_normal(11, np.arange(16), 1, (3, 32, 32)).astype("<f4").tobytes()


def test_no_images_or_no_values() -> None:
    assert standard_normal(0, np.arange(0), 0, (3, 2, 2)).shape == (0, 3, 2, 2)
    assert standard_normal(0, np.arange(2), 0, (3, 0, 2)).shape == (2, 3, 0, 2)


def test_keys_give_different_noise() -> None:
    index = np.arange(2)
    draws = [standard_normal(seed, index, draw, (8, 8, 8)).ravel() for seed in (0, 1) for draw in (0, 1)]
    correlation = np.corrcoef([half for noise in draws for half in np.split(noise, 2)])
    assert np.abs(correlation - np.eye(8)).max() < 0.2  # 512 values: 4.5 standard errors


def test_inverse_normal_cdf_is_that_of_scipy() -> None:
    powers = 2 ** np.arange(32, dtype=np.uint32)
    edges = np.round(np.array([0.075, 0.5, 0.925]) * 2**32).astype(np.uint32)  # of the branches, and the sign
    near = (edges[:, None] + np.arange(-500, 500)).astype(np.uint32).ravel()
    words = np.concatenate([powers, powers - 1, ~powers, near, np.linspace(0, 2**32 - 1, 100_001).astype(np.uint32)])
    expected = special.ndtri((words + 0.5) / 2.0**32).astype(np.float32)
    assert np.array_equal(normal_from_words(words), expected)  # their float64 values differ a little


def test_moments_and_tails_of_a_million_values() -> None:
    values = standard_normal(5, np.arange(64), 0, (1, 128, 128)).astype(np.float64).ravel()
    n = values.size
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((values**power).mean() - expected) < 4.5 * (variance / n) ** 0.5
    assert stats.kstest(values, "norm").pvalue > 1e-3
    for threshold in (2.0, 3.0, 4.0):
        p = 2 * special.ndtr(-threshold)
        assert abs((np.abs(values) > threshold).sum() - n * p) < 4.5 * (n * p) ** 0.5
