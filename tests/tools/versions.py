"""Stores with several versions, and writers that stop in the middle."""

from pathlib import Path

import numpy as np
import pytest

from nfm.storage_specs.format.attribution import Attribution
from nfm.storage_specs.format.schema import LayoutName, Spec
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.files import Root
from nfm.storage_specs.writing.publish import annotate_store
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.random_couplings import random_coupling_spec
from tests.tools.stores import block_of

SHAPE = (1, 4, 4)


def spec_with(draws: int, layout: LayoutName = "webdataset") -> Spec:
    return random_coupling_spec(layout, SHAPE, rows=70, draws=draws)


def encode(url: str, draws: int, layout: LayoutName = "webdataset") -> None:
    """Write a store with so many draws, or add them; z is a function of block and draw."""
    spec = spec_with(draws, layout)
    writer = StoreWriter(url, spec)
    writer.initialize()
    for unit in writer.list_missing_units():
        columns = block_of(spec, unit.block)
        unit_writer = writer.unit_writer(unit, columns["label"])
        unit_writer.write_base({"x": columns["x"]})
        for draw in unit.draws:
            rng = np.random.default_rng([unit.block, draw])
            z = rng.standard_normal((spec.rows_of(unit.block), *SHAPE), dtype=np.float32)
            unit_writer.write_draw(draw, z, None)
        unit_writer.commit()
    writer.finalize()


def grown(folder: Path) -> str:
    """A store with three versions: two draws, four draws, and a licence."""
    url = f"{folder}/store"
    encode(url, 2)
    encode(url, 4)
    annotate_store(Store(url), Attribution(licence="CC-BY-4.0"))
    return url


def interrupt_before(monkeypatch: pytest.MonkeyPatch, path_of_file: str) -> None:
    """Stop the program before this file is written."""
    original = Root.write

    def write(root: Root, path: str, data: bytes) -> None:
        if path == path_of_file:
            raise KeyboardInterrupt
        original(root, path, data)

    monkeypatch.setattr(Root, "write", write)
