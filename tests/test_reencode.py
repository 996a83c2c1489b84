"""Encoding again: what the teacher gives now is what the store holds, in units that the store cannot choose."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nfm.models.tarflow import TarFlow
from nfm.stages.checkpoint import load_any_network
from nfm.stages.errors import StageError
from nfm.stages.reencode import verify_by_reencoding
from nfm.storage_specs.format.pixels import to_uint8
from nfm.storage_specs.format.schema import Spec
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.verify import find_faults
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import sha256
from nfm.storage_specs.storage.npy import npy_bytes
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.small_run import Run, encode_in_process
from tests.tools.stores import change_document, reseal


def test_noise_that_is_not_that_of_the_law_is_a_fault(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.couplings["webdataset"], tmp_path / "store")
    change_document(tmp_path / "store", spec__coupling__noise__seed=5)
    reseal(tmp_path / "store")
    messages = [fault.message for fault in find_faults(Store(f"{tmp_path}/store"))]
    assert messages and all("is not that of law philox-as241-v1 with seed 5" in message for message in messages)


def store_of_other_z(run: Run, out: str, z_of: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Spec:
    """Write a store with the documents of `run`'s couplings and another z."""
    source = Store(run.couplings["webdataset"])
    writer = StoreWriter(out, source.spec)
    writer.initialize()
    for unit in writer.list_missing_units():
        unit_writer = writer.unit_writer(unit, source.column("label", unit.block))
        unit_writer.write_base({"x": source.column("x", unit.block)}, source.image_names_of(unit.block))
        for draw in unit.draws:
            z = z_of(source.z(unit.block, draw)).astype(np.float32)
            unit_writer.write_draw(draw, z, source.column("noise", unit.block, draw))
        unit_writer.commit()
    writer.finalize()
    return source.spec


@pytest.mark.parametrize(
    "z_of",
    [
        lambda z: np.random.default_rng(0).standard_normal(z.shape),
        lambda z: z * 1.01,
        lambda z: z[::-1],
        lambda z: np.full_like(z, 1e-3),
        lambda z: z + 60000 * (np.arange(z.size).reshape(z.shape) == 0),
    ],
)
def test_random_numbers_in_place_of_z_are_not_called_sound(run: Run, tmp_path: Path, z_of: Any) -> None:
    store_of_other_z(run, f"{tmp_path}/store", z_of)
    store = Store(f"{tmp_path}/store")
    assert list(find_faults(store)) == [], "only the teacher can tell"
    with pytest.raises(StoreError, match="the store is not what its spec says"):
        verify_by_reencoding(store, run.teacher, store.spec.rows * store.spec.num_draws, seed=0)


def test_no_scale_of_the_store_makes_random_numbers_sound(run: Run, tmp_path: Path) -> None:
    """σ_f = 1e19 shrank every difference, when differences were measured in σ_f."""
    store_of_other_z(run, f"{tmp_path}/store", lambda z: np.random.default_rng(0).standard_normal(z.shape))
    sigma_f = np.full(Store(f"{tmp_path}/store").spec.shape, 1e19, np.float32)
    (tmp_path / "store/versions/0001/sigma_f.npy").write_bytes(npy_bytes(sigma_f))
    reseal(tmp_path / "store")
    with pytest.raises(StoreError, match="the store is not what its spec says"):
        verify_by_reencoding(Store(f"{tmp_path}/store"), run.teacher, 4, seed=0)


@pytest.mark.parametrize("factor", [1e-4, 0.2, 30.0])
def test_no_scale_of_int8_makes_other_z_sound(run: Run, tmp_path: Path, factor: float) -> None:
    """With a small scale many z are clipped, with a large one most are 0."""
    config = run.config.model_copy(update={"encode": run.config.encode.model_copy(update={"z_dtype": "int8"})})
    encode_in_process(config, f"{run.samples}/train", run.teacher, f"{tmp_path}/sound", "webdataset")
    sound = Store(f"{tmp_path}/sound")
    assert verify_by_reencoding(sound, run.teacher, 40, seed=0).largest_difference < 0.04
    assert sound.z_scale is not None
    scale = sound.z_scale * np.float32(factor)
    coupling = sound.spec.nfm.model_copy(update={"z_scale_sha256": sha256(npy_bytes(scale))})
    writer = StoreWriter(f"{tmp_path}/other", sound.spec.model_copy(update={"coupling": coupling}))
    writer.initialize(scale)
    for unit in writer.list_missing_units():
        unit_writer = writer.unit_writer(unit, sound.column("label", unit.block))
        unit_writer.write_base({"x": sound.column("x", unit.block)}, sound.image_names_of(unit.block))
        for draw in unit.draws:
            unit_writer.write_draw(draw, sound.z(unit.block, draw), sound.column("noise", unit.block, draw))
        unit_writer.commit()
    writer.finalize()
    with pytest.raises(StoreError, match="the store is not what its spec says"):
        verify_by_reencoding(Store(f"{tmp_path}/other"), run.teacher, 40, seed=0)


def test_another_eta_or_teacher_is_not_sound(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.couplings["webdataset"], tmp_path / "store")
    change_document(tmp_path / "store", spec__coupling__eta=0.31)
    reseal(tmp_path / "store")
    with pytest.raises(StoreError, match=r"got η = 0\.31, expected 0\.3"):
        verify_by_reencoding(Store(f"{tmp_path}/store"), run.teacher, 4, seed=0)
    change_document(tmp_path / "store", spec__coupling__teacher__sha256="1" * 64)
    reseal(tmp_path / "store")
    with pytest.raises(StageError, match="another teacher than the one that encoded"):
        verify_by_reencoding(Store(f"{tmp_path}/store"), run.teacher, 4, seed=0)


def test_z_with_its_teacher_and_noise_is_the_image(run: Run) -> None:
    """Decoding float16 z and taking η·ε′ away gives back every pixel, so a store without x would protect nothing."""
    store = Store(run.couplings["webdataset"])
    assert store.spec.nfm.z_dtype == "float16"
    teacher = load_any_network(run.teacher)
    assert isinstance(teacher, TarFlow)
    for block in range(store.spec.num_blocks):
        label = torch.from_numpy(store.column("label", block))
        for draw in range(store.spec.num_draws):
            noisy = teacher.decode(torch.from_numpy(store.z(block, draw)), label)
            noise = torch.from_numpy(store.column("noise", block, draw).astype(np.float32))
            pixels = to_uint8(noisy - store.spec.nfm.eta * noise)
            assert np.array_equal(pixels, store.column("x", block))


def test_statements_of_less_precision_hide_no_other_images(run: Run, tmp_path: Path) -> None:
    """bf16 allows single values to differ; noise in all of them is more than it makes."""
    rng = np.random.default_rng(0)
    store_of_other_z(run, f"{tmp_path}/store", lambda z: z + rng.uniform(-0.15, 0.15, z.shape))
    change_document(tmp_path / "store", spec__coupling__precision="bf16")
    reseal(tmp_path / "store")
    with pytest.raises(StoreError, match="in the root mean square, expected at most"):
        verify_by_reencoding(Store(f"{tmp_path}/store"), run.teacher, 50, seed=0)
