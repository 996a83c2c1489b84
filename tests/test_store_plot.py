"""The picture of `nfm store info --plot`: it shows the values of the store, whatever x is."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfm.pipeline.store_plot import COLUMNS, ROWS, plot_store
from nfm.storage_specs.reading.store import Store
from tests.tools.kinds import BOTH, Kind
from tests.tools.memory import run_watched


@pytest.mark.parametrize(
    "kind",
    [
        Kind(),
        Kind(z="int8", rows=70, block_rows=64),
        Kind(z="float16", x="bfloat16", views=BOTH, classes=0, shape=(4, 6, 4)),
    ],
)
def test_every_kind_of_x_is_drawn(tmp_path: Path, kind: Kind) -> None:
    kind.write(f"{tmp_path}/store", "webdataset")
    plot_store(Store(f"{tmp_path}/store"), f"{tmp_path}/plot.png")
    picture = np.asarray(Image.open(tmp_path / "plot.png").convert("RGB"))
    assert picture.shape[1] > picture.shape[0] > 100
    distinct = len(np.unique(picture.reshape(-1, 3), axis=0))
    assert distinct > min(kind.rows, ROWS * COLUMNS), "more than axes and text"


def plot(url: str, out: str) -> None:
    plot_store(Store(url), out)


@pytest.mark.parametrize("kind", [Kind(shape=(3, 1200, 900), rows=2), Kind(z="int8", shape=(1, 900, 900), rows=2)])
def test_large_images_take_little_memory(tmp_path: Path, kind: Kind) -> None:
    kind.write(f"{tmp_path}/store", "zarr")
    outcome = run_watched(plot, f"{tmp_path}/store", f"{tmp_path}/plot.png", max_bytes=200 << 20, timeout=60)
    assert outcome.error == "", outcome
    assert len(np.unique(np.asarray(Image.open(tmp_path / "plot.png").convert("RGB")).reshape(-1, 3), axis=0)) > 200
