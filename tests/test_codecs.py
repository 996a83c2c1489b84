"""How z is stored, and noise that is not."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nfm.storage_specs.format.card import summarize
from nfm.storage_specs.format.codecs import INT8_RANGE, ZDtype, all_finite, decode_z, encode_z, int8_scale
from nfm.storage_specs.format.croissant import croissant
from nfm.storage_specs.format.schema import NoiseDtype
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream
from nfm.storage_specs.reading.verify import find_faults
from tests.tools.random_couplings import write_random_couplings
from tests.tools.small_run import Run, encode_in_process

DTYPES: tuple[ZDtype, ...] = ("float32", "float16", "bfloat16", "int8")
RNG = np.random.default_rng(0)
Z = (RNG.standard_normal((500, 1, 4, 4)) * np.linspace(0.5, 3, 16).reshape(1, 4, 4)).astype(np.float32)


def test_bfloat16_is_torchs() -> None:
    special = np.array([0.0, -0.0, 1.0, 3.0e38, 1e-40, 1.00390625, 1.01171875], dtype=np.float32)  # ties both ways
    for values in (Z.ravel(), special):
        rounded = decode_z(encode_z(values, "bfloat16", None), "bfloat16", None)
        assert np.array_equal(rounded, torch.from_numpy(values).bfloat16().float().numpy())


def test_float16_is_numpys() -> None:
    assert np.array_equal(encode_z(Z, "float16", None), Z.astype("<f2"))
    assert encode_z(Z, "float16", None).dtype.str == "<f2"


def test_int8_is_off_by_half_a_step_and_clips_beyond_its_range() -> None:
    scale = int8_scale(Z)
    np.testing.assert_allclose(scale * 127, INT8_RANGE * np.sqrt((Z.astype(np.float64) ** 2).mean(axis=0)), rtol=1e-6)
    within = np.clip(Z, -127 * scale, 127 * scale)
    off = np.abs(decode_z(encode_z(within, "int8", scale), "int8", scale) - within)
    assert (off <= scale * 0.500001).all()
    far = encode_z(np.full_like(Z, 1e9), "int8", scale)
    assert far.dtype == np.int8 and (far == 127).all()
    assert (encode_z(np.full_like(Z, -1e9), "int8", scale) == -127).all()


def test_a_dimension_without_spread_has_no_scale() -> None:
    constant = Z.copy()
    constant[:, 0, 1, 2] = 0
    with pytest.raises(FloatingPointError, match="scale"):
        int8_scale(constant)


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_is_told_from_the_bits(dtype: ZDtype) -> None:
    scale = int8_scale(Z)
    stored = encode_z(Z, dtype, scale)
    assert all_finite(stored)
    if dtype == "int8":
        return
    for bad in (np.inf, -np.inf, np.nan):
        broken = Z.copy()
        broken[499, 0, 3, 3] = bad
        assert not all_finite(encode_z(broken, dtype, scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_store_says_how_to_read_z_and_how_to_compute_the_noise(tmp_path: Path, dtype: ZDtype) -> None:
    write_random_couplings(str(tmp_path), "webdataset", (1, 4, 4), 40, draws=2, z_dtype=dtype)
    readme = (tmp_path / "README.md").read_text()
    sentence = {
        "float32": "z is stored as float32.",
        "float16": "z is stored as float16.",
        "bfloat16": "z is stored as bfloat16: upper 16 bits of float32 z: (value.astype('<u4') << 16).view('<f4').",
        "int8": "z is stored as int8: z / z_scale.npy, rounded: value * z_scale.",
    }[dtype]
    assert sentence in readme.splitlines()
    assert "Philox" in readme and "docs/store.md" in readme
    dataset = Store(str(tmp_path)).dataset
    assert sentence in croissant(dataset)["description"]
    summary = summarize(dataset, sigma_f_rms=1.0)
    assert "K = 2 per image" in summary and "recomputed from the seed; the teacher got it as float16" in summary


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_store_of_each_dtype_streams_what_it_holds(run: Run, tmp_path: Path, dtype: ZDtype) -> None:
    """z / σ_f of the stream is, to the bit, what a reader without our code computes from the files; and the error
    that the store states is the one against the teacher's own z."""
    config = run.config.model_copy(
        update={"encode": run.config.encode.model_copy(update={"z_dtype": dtype, "noise": "derived"})}
    )
    encode_in_process(config, f"{run.samples}/train", run.teacher, str(tmp_path / "store"), "webdataset")
    encode_in_process(
        config.model_copy(update={"encode": config.encode.model_copy(update={"z_dtype": "float32"})}),
        f"{run.samples}/train",
        run.teacher,
        str(tmp_path / "exact"),
        "webdataset",
    )
    store, exact = Store(str(tmp_path / "store")), Store(str(tmp_path / "exact"))
    assert list(find_faults(store)) == []
    batch = next(CouplingStream(store.url, 64, seed=0))
    for i, (index, draw) in enumerate(zip(batch.index.tolist(), batch.draw.tolist(), strict=True)):
        block, row = divmod(index, store.spec.block_rows)
        raw = store.column("z", block, draw)[row]
        if dtype == "bfloat16":
            raw = (raw.astype("<u4") << 16).view("<f4")
        z = raw.astype(np.float32)
        if dtype == "int8":
            z = z * np.load(f"{store.url}/z_scale.npy")
        assert np.array_equal(batch.z[i].numpy(), z / np.load(f"{store.url}/versions/0001/sigma_f.npy"))
    blocks, draws = range(store.spec.num_blocks), range(store.spec.num_draws)
    error = np.concatenate([(store.z(b, k) - exact.z(b, k)).ravel() for b in blocks for k in draws]).astype(np.float64)
    assert store.dataset.totals.z_rms_error == pytest.approx(np.sqrt((error**2).mean()), rel=1e-9, abs=0)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_derived_noise_is_the_stored_noise(run: Run, tmp_path: Path, dtype: NoiseDtype) -> None:
    stores = []
    for noise in ("stored", "derived"):
        encode_config = run.config.encode.model_copy(update={"noise": noise, "noise_dtype": dtype})
        url = str(tmp_path / noise)
        encode_in_process(
            run.config.model_copy(update={"encode": encode_config}), f"{run.samples}/train", run.teacher, url, "zarr"
        )
        stores.append(Store(url))
    stored, derived = stores
    assert (tmp_path / "stored/columns.zarr/noise").exists()
    assert not (tmp_path / "derived/columns.zarr/noise").exists()
    for block in range(stored.spec.num_blocks):
        for draw in range(stored.spec.num_draws):
            stored_noise = stored.column("noise", block, draw)
            derived_noise = derived.column("noise", block, draw)
            assert stored_noise.dtype == derived_noise.dtype == np.dtype(dtype)
            assert np.array_equal(stored_noise, derived_noise)
            assert np.array_equal(stored.column("z", block, draw), derived.column("z", block, draw))
