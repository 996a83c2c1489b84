"""Stores of every schema that was ever published, frozen as files (tools/make_fixtures.py), give the values that went
into them: in all readers, and after every way of moving them."""

import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from nfm.pipeline.cli import nfm
from nfm.storage_specs.format.attribution import Attribution
from nfm.storage_specs.format.schema import SCHEMA_VERSION, LayoutName
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.verify import describe_weak_promises, find_faults
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import sha256
from nfm.storage_specs.storage.npy import npy_bytes
from nfm.storage_specs.writing.publish import annotate_store, tag_version
from nfm.storage_specs.writing.repair import repair_store
from nfm.storage_specs.writing.transfer import convert_store, copy_store
from nfm.storage_specs.writing.tuples import export_tuples
from nfm.storage_specs.writing.writer import StoreWriter
from tests.tools.kind_checks import (
    assert_columns_are,
    assert_holds,
    assert_readers_of_webdataset_give,
    compare_streams,
    expected_columns,
)
from tests.tools.kinds import Values
from tests.tools.make_fixtures import (
    ATTRIBUTION,
    COST,
    FIRST_DRAWS,
    FIXTURES,
    TAG,
    VERSIONS,
    first_draws,
    from_arrays,
    make_fixtures,
    write_fixture,
)
from tests.tools.stock_readers import read_by_zarr
from tests.tools.stores import LAYOUT_NAMES, damage, edit, flip, ignore_progress, tree

FROZEN = Path(__file__).parent / "fixtures"
NAMES = {
    "1.0": ["samples", "float16-stored", "float32-derived", "bfloat16-derived", "int8-stored"],
    "1.1": list(FIXTURES),
}
TODAY = "today"  # written now: what would be frozen
IS_FROZEN = (FROZEN / f"format-{SCHEMA_VERSION}").exists()


class Frozen(NamedTuple):
    """A store in the fixtures."""

    schema: str
    layout: LayoutName
    name: str


def list_frozen(*schemas: str) -> list[Any]:
    """Parameters of tests. What is written today is for long tests, once the schema is frozen."""
    parameters: list[Any] = []
    for schema in schemas:
        names = NAMES[SCHEMA_VERSION if schema == TODAY else schema]
        marks = [pytest.mark.long] if schema == TODAY and IS_FROZEN else []
        parameters += [
            pytest.param(Frozen(schema, layout, name), id=f"{schema}-{layout}-{name}", marks=marks)
            for layout in LAYOUT_NAMES
            for name in names
        ]
    return parameters


def list_long(*schemas: str) -> list[Any]:
    """Parameters of tests that are long."""
    return [
        pytest.param(*parameter.values, id=parameter.id, marks=pytest.mark.long) for parameter in list_frozen(*schemas)
    ]


SCHEMAS = ["1.0", *(["1.1"] if IS_FROZEN else []), TODAY]
every_store = pytest.mark.parametrize("frozen", list_frozen(*SCHEMAS))
every_store_of_1_0 = pytest.mark.parametrize("frozen", list_frozen("1.0"))


class Unpacked:
    """Unpacks each store once. Nobody changes what was unpacked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _packed(self, schema: str) -> Path:
        """The folder with the tars of a schema."""
        if schema != TODAY:
            return FROZEN / f"format-{schema}"
        if not (self.folder / TODAY / "values.npz").exists():
            make_fixtures(self.folder / TODAY)
        return self.folder / TODAY

    def url(self, frozen: Frozen) -> str:
        """The URL of a store."""
        url = self.folder / "-".join(frozen)
        if not url.exists():
            with tarfile.open(self._packed(frozen.schema) / f"{frozen.layout}-{frozen.name}.tar.gz") as tar:
                tar.extractall(url, filter="data")
        return str(url)

    def values(self, frozen: Frozen) -> Values:
        """What a store holds."""
        with np.load(self._packed(frozen.schema) / "values.npz", allow_pickle=False) as file:
            arrays: dict[str, NDArray[Any]] = dict(file)
        if frozen.schema != "1.0":
            return from_arrays(frozen.name, arrays)
        values = Values(arrays["x"], None, arrays["label"], None, arrays["z"], arrays["noise"], None)
        if frozen.name == "samples":
            return replace(values, z=None, noise=None)
        if frozen.name == "int8-stored":
            return replace(values, z_scale=np.load(f"{self.url(frozen)}/z_scale.npy", allow_pickle=False))
        return values


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Unpacked:
    """The fixtures, unpacked."""
    return Unpacked(tmp_path_factory.mktemp("frozen"))


@pytest.mark.parametrize("schema", [schema for schema in SCHEMAS if schema != TODAY])
def test_no_fixture_is_missing(schema: str) -> None:
    files = {path.name for path in (FROZEN / f"format-{schema}").iterdir()}
    assert files == {"values.npz", *(f"{layout}-{name}.tar.gz" for layout in LAYOUT_NAMES for name in NAMES[schema])}


@every_store
def test_our_reader_gives_the_values(unpacked: Unpacked, frozen: Frozen) -> None:
    store = Store(unpacked.url(frozen))
    assert store.spec.layout == frozen.layout
    assert (store.spec.kind == "samples") == frozen.name.startswith("samples")
    assert store.dataset.schema_version == (SCHEMA_VERSION if frozen.schema == TODAY else frozen.schema)
    assert_holds(store, unpacked.values(frozen))


@every_store
def test_streams_give_the_values(unpacked: Unpacked, frozen: Frozen) -> None:
    compare_streams(unpacked.url(frozen), unpacked.values(frozen), batch_size=8, num_batches=3, window=2, seed=1)


@every_store
def test_stock_readers_give_the_values(unpacked: Unpacked, frozen: Frozen) -> None:
    folder, spec = Path(unpacked.url(frozen)), Store(unpacked.url(frozen)).spec
    expected = expected_columns(spec, unpacked.values(frozen))
    if frozen.layout == "zarr" and frozen.schema == "1.0":
        with pytest.raises(UserWarning, match="not recognized as a component of a Zarr hierarchy"):
            read_by_zarr(folder)
        assert_columns_are(read_by_zarr(folder, warnings_are_errors=False), expected)
    elif frozen.layout == "zarr":
        assert_columns_are(read_by_zarr(folder / "columns.zarr"), expected)
    else:
        assert_readers_of_webdataset_give(folder, expected)


@every_store
def test_the_commands_that_look_at_a_store(unpacked: Unpacked, frozen: Frozen) -> None:
    url = unpacked.url(frozen)
    store = Store(url)
    info = CliRunner().invoke(nfm, ["store", "info", url])
    assert info.exit_code == 0, info.output
    for text in (str(store.spec.rows), store.dataset.id[:12], frozen.layout, store.spec.kind):
        assert text in info.output
    verify = CliRunner().invoke(nfm, ["store", "verify", url])
    assert verify.exit_code == 0, verify.output
    assert f"{url}: {len(store.files)} files are sound" in verify.output
    assert ("note: " in verify.output) == (frozen.schema == "1.0")


@every_store
def test_it_is_sound(unpacked: Unpacked, frozen: Frozen) -> None:
    store = Store(unpacked.url(frozen))
    assert list(find_faults(store)) == []
    promises = list(describe_weak_promises(store))
    if frozen.schema == "1.0":
        assert len(promises) == 1
        unproved = (
            "its id does not cover σ_f, label counts and rounding errors",
            "README.md and croissant.json have no",
        )
        for text in (store.url, *unproved, "nfm store convert"):
            assert text in promises[0]
    else:
        assert promises == []


@pytest.mark.parametrize("frozen", list_frozen("1.0") + list_long(*SCHEMAS[1:]))
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_it_is_converted_to_both_layouts(
    unpacked: Unpacked, tmp_path: Path, frozen: Frozen, layout: LayoutName
) -> None:
    store, out, back = Store(unpacked.url(frozen)), f"{tmp_path}/out", f"{tmp_path}/back"
    if layout == frozen.layout and frozen.schema != "1.0":
        with pytest.raises(StoreError, match=rf"already has layout {layout}; to duplicate it, use `nfm store copy`"):
            convert_store(store, out, layout, ignore_progress, None)
        return
    convert_store(store, out, layout, ignore_progress, None)
    converted = Store(out)
    assert converted.dataset.schema_version == SCHEMA_VERSION and converted.spec.layout == layout
    assert converted.cost == store.cost and converted.dataset.attribution == store.dataset.attribution
    assert converted.dataset.totals.z_rms_error == store.dataset.totals.z_rms_error
    assert_holds(converted, unpacked.values(frozen))
    assert list(find_faults(converted)) == []
    if layout != frozen.layout:
        convert_store(converted, back, frozen.layout, ignore_progress, None)
        files = tree(store.url)
        for key, record in Store(back).files.items():
            assert tree(back)[record.path] == files[store.files[key].path]


@every_store
def test_it_is_copied(unpacked: Unpacked, tmp_path: Path, frozen: Frozen) -> None:
    """As it is. Commit records of 1.0 stay behind, as nobody continues such a store."""
    store, out = Store(unpacked.url(frozen)), str(tmp_path)
    copy_store(store, out, ignore_progress, None)
    left_out = ("commits/", "sum_z2/") if frozen.schema == "1.0" else ()
    assert tree(out) == {path: data for path, data in tree(store.url).items() if not path.startswith(left_out)}
    assert_holds(Store(out), unpacked.values(frozen))


@every_store
def test_its_tuples_are_exported(unpacked: Unpacked, tmp_path: Path, frozen: Frozen) -> None:
    """Their values are compared in test_kinds.py; here as many tars as there are, which the same call leaves alone."""
    store, out = Store(unpacked.url(frozen)), f"{tmp_path}/out"
    if store.spec.coupling is None:
        with pytest.raises(StoreError, match="got a store of samples"):
            export_tuples(store, out, ignore_progress, None)
        return
    export_tuples(store, out, ignore_progress, None)
    files = tree(out)
    assert sum(path.endswith(".tar") for path in files) == store.spec.num_blocks * store.spec.num_draws
    export_tuples(store, out, ignore_progress, None)
    assert tree(out) == files


# Schema 1.0


@every_store_of_1_0
def test_nothing_is_written_into_a_store_of_1_0(unpacked: Unpacked, tmp_path: Path, frozen: Frozen) -> None:
    url = f"{tmp_path}/store"
    shutil.copytree(unpacked.url(frozen), url)
    store, before = Store(url), tree(url)
    with pytest.raises(StoreError, match=rf"^{url}: holds a store of schema 1\.0, .*nfm store convert {url} NEW.*$"):
        StoreWriter(url, store.spec).initialize(store.z_scale)
    other = Store(unpacked.url(frozen._replace(layout="zarr" if frozen.layout == "webdataset" else "webdataset")))
    with pytest.raises(StoreError, match=rf"^{url}: holds a store of schema 1\.0, .*nfm store convert {url} NEW.*$"):
        convert_store(other, url, frozen.layout, ignore_progress, None)
    with pytest.raises(StoreError, match=rf"^{url}: holds store {store.dataset.id[:12]}.*; expected nothing.*$"):
        copy_store(other, url, ignore_progress, None)
    for call in (lambda: annotate_store(store, Attribution(notes="x")), lambda: tag_version(store, "x")):
        with pytest.raises(StoreError, match=rf"^{url}: got a store of schema 1\.0, .*; nfm store convert it first$"):
            call()
    assert repair_store(url, ignore_progress) == ([], [], True)
    assert tree(url) == before


@every_store_of_1_0
def test_a_damaged_store_of_1_0_is_not_repaired(unpacked: Unpacked, tmp_path: Path, frozen: Frozen) -> None:
    url = f"{tmp_path}/store"
    shutil.copytree(unpacked.url(frozen), url)
    record = next(record for key, record in Store(url).files.items() if key.column == "x")
    damage(Path(url), record.path, flip(record.bytes // 3))
    before = tree(url)
    assert [fault.message for fault in find_faults(Store(url))] == [
        f"{url}/{record.path}: its sha256 is not the one in the manifest; repair or copy it again"
    ]
    with pytest.raises(StoreError, match=rf"^{url}/{record.path}: .* A store of schema 1\.0 is not repaired: "):
        repair_store(url, ignore_progress)
    with pytest.raises(StoreError, match=rf"{record.path}.*damaged blocks: 0; all others are written"):
        convert_store(Store(url), f"{tmp_path}/out", "zarr", ignore_progress, None)
    assert tree(url) == before and not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize("frozen", [p for p in list_frozen("1.0") if p.values[0].name != "samples"])
def test_a_forged_sigma_f_of_1_0_is_found(unpacked: Unpacked, tmp_path: Path, frozen: Frozen) -> None:
    """Its id does not cover σ_f, so the store opens; `verify` computes σ_f from z, and a conversion gives the right
    one."""
    url, out = f"{tmp_path}/store", f"{tmp_path}/out"
    shutil.copytree(unpacked.url(frozen), url)
    true = Store(url)
    forged = npy_bytes(true.sigma_f * np.float32(1.01))
    (tmp_path / "store" / "sigma_f.npy").write_bytes(forged)
    damage(Path(url), "dataset.json", edit(sigma_f_sha256=sha256(forged)))
    store = Store(url)
    assert store.dataset.id == true.dataset.id
    assert [fault.message for fault in find_faults(store)] == [
        f"{url}/sigma_f.npy: it is not the root mean square of z; the store is not what it says"
    ]
    convert_store(store, out, frozen.layout, ignore_progress, None)
    np.testing.assert_allclose(Store(out).sigma_f, true.sigma_f, rtol=1e-6)


@every_store_of_1_0
def test_a_store_of_1_0_has_no_versions(unpacked: Unpacked, frozen: Frozen) -> None:
    store = Store(unpacked.url(frozen))
    assert store.version_url == store.url and store.z_sums is None and store.image_names is None
    with pytest.raises(StoreError, match=rf"^{store.url}@v1: a store of schema 1.0 has no versions; give {store.url}"):
        Store(f"{store.url}@v1")
    with pytest.raises(StoreError, match=rf"^{store.url}@first: got a tag that .* does not have; it has no tags"):
        Store(f"{store.url}@first")


# Schema 1.1


def list_later() -> list[Any]:
    """Parameters for the schemas that have versions."""
    return list_frozen(*(schema for schema in SCHEMAS if schema != "1.0"))


@pytest.mark.parametrize("frozen", [p for p in list_later() if p.values[0].name == VERSIONS])
def test_versions_and_tags(unpacked: Unpacked, frozen: Frozen) -> None:
    url, values = unpacked.url(frozen), unpacked.values(frozen)
    newest = Store(url)
    assert newest.dataset.version == 3 and newest.dataset.attribution == ATTRIBUTION and newest.cost == COST
    assert_holds(Store(f"{url}@v3"), values)
    second = Store(f"{url}@v2")
    assert_holds(second, values)
    assert second.dataset.attribution == Attribution() and second.dataset.id == newest.dataset.id
    assert newest.dataset.parent == second.dataset.id
    for reference in ("v1", TAG):
        first = Store(f"{url}@{reference}")
        assert first.spec.num_draws == FIRST_DRAWS
        assert (first.dataset.version, first.dataset.parent) == (1, None)
        assert second.dataset.parent == first.dataset.id
        assert_holds(first, first_draws(values))
        assert list(find_faults(first)) == []
        compare_streams(f"{url}@{reference}", first_draws(values), batch_size=8, num_batches=3, window=None, seed=0)


@pytest.mark.parametrize("frozen", list_later())
def test_what_is_written_today_has_the_frozen_bytes(unpacked: Unpacked, tmp_path: Path, frozen: Frozen) -> None:
    """The files of columns and of what is computed from z. The others may differ: Parquet files tell the version of
    pyarrow, cards may be worded better."""
    store = Store(unpacked.url(frozen))
    write_fixture(str(tmp_path), frozen.name, store.spec, unpacked.values(frozen))
    written = Store(str(tmp_path))
    assert written.files == store.files
    for name in ("sigma_f", "z_sums", "z_class_sums"):
        assert getattr(written.dataset.documents, name) == getattr(store.dataset.documents, name)
    assert list(find_faults(written)) == []
