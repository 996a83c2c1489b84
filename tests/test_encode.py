"""One worker's part of encoding: what fixes its bytes, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nfm.stages.encode as encode
from nfm.stages.checkpoint import weights_sha256
from nfm.stages.encode import EncodeConfig, UnitEncoder, output_spec
from nfm.stages.errors import StageError
from nfm.storage_specs.format.schema import Spec
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.writing.units import Unit
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.small_run import Run, infinite_teacher
from tests.tools.stores import content

FP32_TOLERANCE = 1e-5  # of z between batch shapes, devices and machines, in units of rms(z); docs/encode.md


def begin(run: Run, out: str, **changes: Any) -> tuple[StoreWriter, dict[str, Any]]:
    config = EncodeConfig.model_validate(run.config.encode.model_dump() | changes)
    spec, scale = output_spec(config, Store(f"{run.samples}/train"), run.teacher, out)
    writer = StoreWriter(out, spec)
    writer.initialize(scale)
    return writer, spec.model_dump(mode="json")


def encoder(run: Run, out: str, **changes: Any) -> UnitEncoder:
    return UnitEncoder(f"{run.samples}/train", run.teacher, out, begin(run, out, **changes)[1])


def test_z_agrees_between_batch_shapes_within_the_stated_tolerance(run: Run, tmp_path: Path) -> None:
    one = encoder(run, str(tmp_path))
    x = torch.randn(32, *one.writer.spec.shape, generator=torch.Generator().manual_seed(0))
    y = torch.arange(32) % 10
    whole = one.forward(x, y)
    for rows in (1, 5, 7, 31):
        one.batch_rows = rows
        difference = (one.forward(x, y) - whole).abs().max() / whole.square().mean().sqrt()
        assert difference <= FP32_TOLERANCE, rows


def test_a_row_has_the_same_bits_whatever_shares_its_batch(run: Run, tmp_path: Path) -> None:
    """The batch has one shape, so a short block passes through the kernels of a whole one."""
    one = encoder(run, str(tmp_path))
    x = torch.randn(one.batch_rows, *one.writer.spec.shape, generator=torch.Generator().manual_seed(0))
    y = torch.arange(one.batch_rows) % 10
    whole = one.forward(x, y)
    for rows in (1, 3, one.batch_rows - 1):
        assert torch.equal(one.forward(x[:rows], y[:rows]), whole[:rows])


@pytest.mark.parametrize("threads", [1, 2])
def test_bytes_do_not_depend_on_order_or_threads(run: Run, tmp_path: Path, threads: int) -> None:
    writer, spec = begin(run, str(tmp_path))
    torch.set_num_threads(threads)
    try:
        one = UnitEncoder(f"{run.samples}/train", run.teacher, str(tmp_path), spec, threads)
        for unit in reversed(writer.list_missing_units()):
            one.encode(unit)
    finally:
        torch.set_num_threads(1)
    writer.finalize()
    assert content(str(tmp_path)) == content(run.couplings["webdataset"])


def test_the_teacher_sees_the_stored_noise(run: Run, tmp_path: Path) -> None:
    """Slow and obvious: each image by itself from what the store says of it."""
    store, network = Store(run.couplings["webdataset"]), encode.load_teacher(run.teacher)[0]
    for image, draw in ((0, 0), (40, 2), (178, 1)):
        block, row = divmod(image, store.spec.block_rows)
        noise = torch.from_numpy(np.array(store.column("noise", block, draw)[row])).float()
        x = torch.from_numpy(store.column("x", block)[row] / 127.5 - 1).float()
        z = network((x + store.spec.nfm.eta * noise)[None], torch.tensor([store.column("label", block)[row]])).z[0]
        np.testing.assert_allclose(store.z(block, draw)[row], z.numpy(), atol=2e-3)


def test_a_committed_unit_is_not_encoded_again(run: Run, tmp_path: Path) -> None:
    one, unit = encoder(run, str(tmp_path)), Unit(2, 0, 3)
    assert one.encode(unit).pairs == 3 * 32
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert one.encode(unit).pairs == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_is_not_finite_is_named_and_nothing_of_it_committed(run: Run, tmp_path: Path) -> None:
    teacher, out = infinite_teacher(run, tmp_path, 3), f"{tmp_path}/out"
    spec, _ = output_spec(run.config.encode, Store(f"{run.samples}/train"), teacher, out)
    writer = StoreWriter(out, spec)
    writer.initialize()
    one = UnitEncoder(f"{run.samples}/train", teacher, out, spec.model_dump(mode="json"))
    labels = Store(f"{run.samples}/train").column("label", 1)
    encoded = one.encode(Unit(1, 0, 3))
    expected = {(32 + row, draw) for row in np.flatnonzero(labels == 3).tolist() for draw in range(3)}
    assert set(encoded.bad) == expected and len(expected) > 0
    assert Unit(1, 0, 3) in writer.list_missing_units()
    assert not list(Path(out).glob("z/**/*.tar")), "each draw has such an image"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "coupling.noise.seed: existing 0, requested 1"),
        ({"draws": 2}, r"coupling.draws: existing 3, requested 2 \(draws can be added, not taken away\)"),
        ({"precision": "bf16"}, 'coupling.precision: existing "fp32", requested "bf16"'),
        ({"z_dtype": "float32"}, 'coupling.z_dtype: existing "float16", requested "float32"'),
        ({"layout": "zarr"}, 'layout: existing "webdataset", requested "zarr"'),
        ({"noise": "derived"}, "coupling.noise.stored: existing true, requested false"),
    ],
)
def test_other_settings_at_an_output_are_refused_with_both_values(
    run: Run, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    begin(run, str(tmp_path))
    with pytest.raises(StoreError, match=said):
        begin(run, str(tmp_path), **changes)


@pytest.mark.parametrize("what", ["teacher", "eta", "source", "preprocessing"])
def test_another_origin_is_refused_with_both_values(run: Run, tmp_path: Path, what: str) -> None:
    writer, document = begin(run, str(tmp_path))
    coupling = document["coupling"]
    if what == "teacher":
        other = encode.load_teacher(infinite_teacher(run, tmp_path, 0))[0]
        coupling["teacher"]["sha256"] = weights_sha256(other.state_dict())
    elif what == "preprocessing":
        document["preprocessing"]["resize"] = "another"
    else:
        coupling[what] = {"eta": 0.25, "source": "0" * 64}[what]
    with pytest.raises(StoreError, match=f"{what}.*: existing .*, requested "):
        StoreWriter(str(tmp_path), Spec.model_validate(document, strict=False)).initialize()
    assert writer.list_missing_units() == [Unit(block, 0, 3) for block in range(6)]


def test_another_teacher_file_on_a_node_is_refused(run: Run, tmp_path: Path) -> None:
    _, spec = begin(run, f"{tmp_path}/out")
    with pytest.raises(StageError, match="another teacher on this node than on the driver"):
        UnitEncoder(f"{run.samples}/train", infinite_teacher(run, tmp_path, 0), f"{tmp_path}/out", spec)


def test_other_samples_on_a_node_are_refused(run: Run, tmp_path: Path) -> None:
    """Of the same shape: nothing else would tell."""
    _, spec = begin(run, f"{tmp_path}/out")
    with pytest.raises(StageError, match="other samples on this node than on the driver"):
        UnitEncoder(f"{run.samples}/val", run.teacher, f"{tmp_path}/out", spec)


def test_tf32_needs_a_gpu(run: Run, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="tf32, which only GPUs have"):
        encoder(run, str(tmp_path), precision="tf32")


def test_bf16_is_another_z_in_the_same_dtype(run: Run, tmp_path: Path) -> None:
    fine, coarse = encoder(run, f"{tmp_path}/a"), encoder(run, f"{tmp_path}/b", precision="bf16")
    x = torch.randn(32, *fine.writer.spec.shape, generator=torch.Generator().manual_seed(0))
    y = torch.arange(32) % 10
    exact, z = fine.forward(x, y), coarse.forward(x, y)
    assert z.dtype == torch.float32
    assert 0 < (z - exact).abs().max() < 0.05


def test_the_speed_is_of_the_teacher(run: Run, tmp_path: Path) -> None:
    speed = encoder(run, str(tmp_path)).measure_speed(seconds=0.05)
    assert speed.device == "CPU" and speed.pairs_per_second > 0
