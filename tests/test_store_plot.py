"""The picture of `nfm store info --plot`: it shows the values of the store, whatever x is."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfm.pipeline.store_plot import COLUMNS, ROWS, plot_store
from nfm.storage_specs.reading.store import Store
from tests.tools.kinds import BOTH, Kind


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
