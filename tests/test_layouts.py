"""Stock readers get exactly what was written, and our reader gets the same."""

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
import zarr
from numpy.typing import NDArray

from nfm.storage_specs.format.layouts import LAYOUTS
from nfm.storage_specs.format.noise import standard_normal
from nfm.storage_specs.format.pixels import to_float
from nfm.storage_specs.format.schema import LayoutName, PixelSpec, Spec
from nfm.storage_specs.format.webdataset import tar_headers
from nfm.storage_specs.reading.store import Store
from tests.tools.small_run import Run

LAYOUT_NAMES: tuple[LayoutName, ...] = ("webdataset", "zarr")


def concatenate_blocks(store: Store, column: str, draw: int = -1) -> NDArray[Any]:
    return np.concatenate([store.column(column, block, draw) for block in range(store.spec.num_blocks)])


def test_headers_are_those_of_tarfile() -> None:
    index = np.array([0, 7, 123_456_789_012])
    for header, number in zip(tar_headers(index, "x.npy", 192), index.tolist(), strict=True):
        info = tarfile.TarInfo(f"{number:012d}.x.npy")
        info.size = 192
        assert header.tobytes() == info.tobuf(tarfile.USTAR_FORMAT)


def test_both_layouts_hold_the_same_values(run: Run) -> None:
    webdataset, zarr_store = (Store(run.couplings[layout]) for layout in LAYOUT_NAMES)
    for column in ("x", "label", "index"):
        assert np.array_equal(concatenate_blocks(webdataset, column), concatenate_blocks(zarr_store, column))
    for draw in range(webdataset.spec.num_draws):
        for column in ("z", "noise"):
            assert np.array_equal(
                concatenate_blocks(webdataset, column, draw), concatenate_blocks(zarr_store, column, draw)
            )
    assert np.array_equal(webdataset.sigma_f, zarr_store.sigma_f)


def test_tar_and_numpy_read_the_files(run: Run) -> None:
    store = Store(run.couplings["webdataset"])
    for member, column, draw in (("x", "x", -1), ("z", "z", 1), ("noise", "noise", 1)):
        path = Path(store.url) / LAYOUTS["webdataset"].file_path(member, 0, draw)
        with tarfile.open(path) as tar:
            for i, info in enumerate(info for info in tar if info.name.endswith(".npy")):
                content = tar.extractfile(info)
                assert content is not None
                array = np.load(io.BytesIO(content.read()), allow_pickle=False)
                assert info.name == f"{i:012d}.{member}.npy"
                assert np.array_equal(array, store.column(column, 0, draw)[i])


def test_stock_webdataset_reads_pairs_by_zipping_two_files(run: Run) -> None:
    store = Store(run.couplings["webdataset"])
    first = wds.WebDataset(f"{store.url}/x/000001.tar", shardshuffle=False).decode()
    second = wds.WebDataset(f"{store.url}/z/k002/000001.tar", shardshuffle=False).decode()
    pairs = list(zip(first, second, strict=True))
    assert len(pairs) == store.spec.rows_of(1)
    for i, (a, b) in enumerate(pairs):
        assert a["__key__"] == b["__key__"] == f"{store.column('index', 1)[i]:012d}"
        assert np.array_equal(a["x.npy"], store.column("x", 1)[i])
        assert np.array_equal(b["z.npy"], store.column("z", 1, 2)[i])
        assert a["cls"] == store.column("label", 1)[i]


def test_stock_zarr_reads_the_group(run: Run) -> None:
    store = Store(run.couplings["zarr"])
    group = zarr.open_group(f"{store.url}/columns.zarr", mode="r")
    for column in ("x", "label", "index"):
        array = group[column]
        assert isinstance(array, zarr.Array)
        assert np.array_equal(np.asarray(array[:]), concatenate_blocks(store, column))
    for column in ("z", "noise"):
        array = group[column]
        assert isinstance(array, zarr.Array)
        assert array.shape == (store.spec.num_draws, store.spec.rows, *store.spec.shape)
        for draw in range(store.spec.num_draws):
            assert np.array_equal(np.asarray(array[draw]), concatenate_blocks(store, column, draw))


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_manifest_lists_every_file_with_its_sha256(run: Run, layout: LayoutName) -> None:
    url = Path(run.couplings[layout])
    rows = pq.read_table(url / "versions" / "0001" / "manifest.parquet").to_pylist()
    data = [path for path in url.rglob("*") if path.is_file() and path.parent != url and path.name != "zarr.json"]
    assert {str(path.relative_to(url)) for path in data if not {"commits", "sums", "versions"} & set(path.parts)} == {
        row["path"] for row in rows
    }
    for row in rows:
        content = (url / row["path"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_the_tuple_is_what_the_teacher_did(run: Run, layout: LayoutName) -> None:
    """x, noise, z and label equal those computed from the definition, one image at a time."""
    from nfm.stages.encode import load_teacher

    store, samples = Store(run.couplings[layout]), Store(f"{run.samples}/train")
    teacher, _ = load_teacher(run.teacher)
    assert np.array_equal(concatenate_blocks(store, "x"), concatenate_blocks(samples, "x"))
    assert np.array_equal(concatenate_blocks(store, "label"), samples.labels())
    for index in (0, 31, 32, store.spec.rows - 1):
        block, row = divmod(index, store.spec.block_rows)
        for draw in range(store.spec.num_draws):
            noise = store.column("noise", block, draw)[row]
            drawn = standard_normal(0, np.array([index]), draw, store.spec.shape)[0]
            assert np.array_equal(noise, drawn.astype(np.float16))
            x = to_float(store.column("x", block)[row], store.spec.x)
            noisy = x + store.spec.nfm.eta * torch.from_numpy(noise.astype(np.float32))
            y = torch.tensor([store.column("label", block)[row]])
            with torch.no_grad():
                z = teacher(noisy[None], y).z[0].numpy()
            np.testing.assert_allclose(store.column("z", block, draw)[row], z, atol=2e-5, rtol=1e-3)


def test_sigma_f_is_the_rms_of_all_z(run: Run) -> None:
    store = Store(run.couplings["webdataset"])
    z = np.stack([concatenate_blocks(store, "z", draw) for draw in range(store.spec.num_draws)]).astype(np.float64)
    np.testing.assert_allclose(store.sigma_f, np.sqrt((z**2).mean(axis=(0, 1))), rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 100])
def test_round_trip_of_any_number_of_rows(layout: LayoutName, rows: int) -> None:
    spec = Spec(
        kind="samples",
        layout=layout,
        rows=rows,
        block_rows=32,
        shape=(3, 5, 7),
        x=PixelSpec(dtype="uint8"),
        views=["plain"],
        num_classes=1000,
        class_names=[str(i) for i in range(1000)],
        names=False,
        preprocessing={},
    )
    rng = np.random.default_rng(0)
    for block in range(spec.num_blocks):
        num_rows = spec.rows_of(block)
        written: dict[str, NDArray[Any]] = {
            "x": rng.integers(0, 256, (num_rows, 3, 5, 7), dtype=np.uint8),
            "label": rng.integers(0, 1000, num_rows).astype(np.int64),
        }
        if block == 0:
            written["x"][:] = 0  # a chunk of fill values still has its place
        read: dict[str, NDArray[Any]] = {}
        for kind in LAYOUTS[layout].base_columns(spec):
            data = LAYOUTS[layout].encode_file(spec, kind, block, written)
            assert data == LAYOUTS[layout].encode_file(spec, kind, block, written)
            assert len(data) == LAYOUTS[layout].file_size(spec, kind, num_rows)
            read |= LAYOUTS[layout].view_columns(spec, kind, block, np.frombuffer(data, np.uint8))
        assert np.array_equal(read["x"], written["x"])
        assert np.array_equal(read["label"], written["label"])
        assert np.array_equal(read["index"], spec.indices(block))
