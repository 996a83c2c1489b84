"""Kinds of stores that are refused, and the one line that says so."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfm.storage_specs.format.dataset import expected_documents
from nfm.storage_specs.format.schema import Spec
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.kind_checks import WrittenKinds
from tests.tools.kinds import KINDS
from tests.tools.stores import damage, edit

SEMIDISCRETE = {
    "kind": "semidiscrete",
    "draws": 2,
    "law": "philox-as241-v1",
    "seed": 0,
    "potentials": {"sha256": "0" * 64, "cost": "dot", "chi2": 0.1},
    "source": "0" * 64,
}
REFLOW = {
    "kind": "reflow",
    "draws": 1,
    "z_dtype": "float16",
    "z_scale_sha256": None,
    "law": "philox-as241-v1",
    "seed": 0,
    "generator": {"architecture": {}, "sha256": "0" * 64, "training": {}},
    "sampler": "heun31",
    "guidance": 1.5,
    "precision": "fp32",
}


@pytest.mark.parametrize("coupling", [SEMIDISCRETE, REFLOW], ids=["semidiscrete", "reflow"])
def test_couplings_that_only_the_schema_has_are_refused_with_one_line(
    write: WrittenKinds, tmp_path: Path, coupling: dict[str, Any]
) -> None:
    message = rf"got a coupling of kind '{coupling['kind']}'; this nfm reads and writes 'nfm' alone"
    url = f"{tmp_path}/store"
    shutil.copytree(write("pairs-float16-stored", "zarr"), url)
    damage(Path(url), "dataset.json", edit(spec__coupling=coupling))
    spec = Spec.model_validate(json.loads((tmp_path / "store/dataset.json").read_bytes())["spec"])
    assert spec.coupling is not None and spec.coupling.kind == coupling["kind"]
    has_z = coupling is REFLOW
    assert spec.draw_columns == (("z",) if has_z else ("counter",))
    assert [spec.dtype(column) for column in spec.draw_columns] == [np.dtype("<f2" if has_z else "<i8")]
    assert ("sigma_f" in expected_documents(spec), "z_sums" in expected_documents(spec)) == (has_z, has_z)
    with pytest.raises(StoreError, match=rf"^.*store/dataset\.json: {message}$"):
        Store(url)
    with pytest.raises(StoreError, match=rf"^.*store/dataset\.json: {message}$"):
        CouplingStream(url, 4, seed=0)
    with pytest.raises(StoreError, match=rf"^.*new: {message}$"):
        StoreWriter(f"{tmp_path}/new", spec)
    assert not (tmp_path / "new").exists()


LATENT = {
    "dtype": "float16",
    "scale": 1.0,
    "shift": 0.0,
    "decoder": {"name": "", "architecture": {}, "sha256": "0" * 64},
}
INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "odd draws with two views": ({"views": ["plain", "mirrored"]}, "3 draws do not show each of 2 views equally often"),
    "no views": ({"views": []}, r"views \[\]; there may be"),
    "mirrored alone": ({"views": ["mirrored"]}, r"views \['mirrored'\]; there may be"),
    "views in another order": ({"views": ["mirrored", "plain"]}, "there may be"),
    "a view twice": ({"views": ["plain", "plain"]}, "there may be"),
    "another view": ({"views": ["plain", "rotated"]}, "Input should be 'plain' or 'mirrored'"),
    "too few names": ({"class_names": ["a", "b"]}, "2 class names for 3 classes"),
    "names without classes": ({"num_classes": 0}, "3 class names for 0 classes"),
    "classes without names": ({"class_names": []}, "0 class names for 3 classes"),
    "a negative number of classes": ({"num_classes": -1, "class_names": []}, "greater than or equal to 0"),
    "more rows than keys": ({"rows": 10**12 + 1}, "less than or equal to 1000000000000"),
    "no rows": ({"rows": 0}, "greater than or equal to 1"),
    "latents of scale 0": ({"x": LATENT | {"scale": 0.0}}, "than or equal to"),
    "latents of a negative scale": ({"x": LATENT | {"scale": -1.0}}, "than or equal to"),
    "latents of scale NaN": ({"x": LATENT | {"scale": math.nan}}, "than or equal to"),
    "latents of infinite scale": ({"x": LATENT | {"scale": math.inf}}, "than or equal to"),
    "latents of shift NaN": ({"x": LATENT | {"shift": math.nan}}, "than or equal to"),
    "latents without a decoder": ({"x": {"dtype": "float16", "scale": 1.0, "shift": 0.0}}, "Field required"),
    "pixels with a scale": ({"x": {"dtype": "uint8", "scale": 1.0}}, "Extra inputs"),
    "another dtype of x": ({"x": {"dtype": "int16"}}, "Input tag 'int16'"),
    "another kind of coupling": ({"coupling": {"kind": "optimal"}}, "Input tag 'optimal'"),
    "a scale of bfloat16": ({"coupling": {"z_scale_sha256": "0" * 64}}, "z has a scale exactly when it is int8"),
}


@pytest.mark.parametrize("name", INVALID)
def test_a_spec_that_makes_no_sense_is_refused(write: WrittenKinds, tmp_path: Path, name: str) -> None:
    """As an object (ValueError), and in a store, with one line that names the file."""
    changes, message = INVALID[name]
    spec = KINDS["pairs-latents"].spec("webdataset").model_dump(mode="json")
    coupling = spec["coupling"] | changes.get("coupling", {})
    with pytest.raises(ValueError, match=message):
        Spec.model_validate(spec | changes | {"coupling": coupling})
    shutil.copytree(write("pairs-latents", "webdataset"), tmp_path, dirs_exist_ok=True)
    changed = {f"spec__{field}": value for field, value in (changes | {"coupling": coupling}).items()}
    damage(tmp_path, "dataset.json", edit(**changed))
    with pytest.raises(StoreError, match=rf"^{re.escape(str(tmp_path))}/dataset\.json: .*damaged.*$"):
        Store(str(tmp_path))
