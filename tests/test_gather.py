"""Rows from many files: the fast reader (region.py) gives what the plain one (memmap_rows.py) gives, for every layout
and dtype; and the plain one is chosen where the fast one does not work.
"""

import ctypes
import importlib.util
import mmap
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nfm.storage_specs.format.codecs import ZDtype
from nfm.storage_specs.format.layouts import LAYOUTS
from nfm.storage_specs.format.manifest import FileKey
from nfm.storage_specs.format.schema import LayoutName, Spec
from nfm.storage_specs.reading import column, region
from nfm.storage_specs.reading.batches import Batch
from nfm.storage_specs.reading.column import create_mapped_rows
from nfm.storage_specs.reading.mapped_rows import MappedRows, RowPlacement
from nfm.storage_specs.reading.memmap_rows import MemmapRows
from nfm.storage_specs.reading.region import AddressSpaceError, Region, RegionRows, supports_region
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream, Source
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.local import LocalFile
from tests.tools.random_couplings import BLOCK_ROWS, random_coupling_spec, write_random_couplings
from tests.tools.stores import LAYOUT_NAMES

DTYPES: dict[ZDtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
ROWS, DRAWS = 3 * BLOCK_ROWS + 5, 2  # four blocks, of which the last is short
PLACEMENT = RowPlacement(
    num_slots=3, file_bytes=5000, file_rows=4, offset=64, stride=1024, dim=100, dtype=torch.float16
)


class Stores:
    """Stores of random couplings, each written on first use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, layout: LayoutName, shape: tuple[int, int, int], z_dtype: ZDtype) -> Store:
        """The store with these properties, ROWS rows and DRAWS draws; not to be changed."""
        url = f"{self._folder}/{layout}-{z_dtype}-{'x'.join(map(str, shape))}"
        if not Path(url).exists():
            write_random_couplings(url, layout, shape, ROWS, DRAWS, z_dtype)
        return Store(url)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    return Stores(tmp_path_factory.mktemp("stores"))


@pytest.fixture
def only_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A platform without what the fast reader needs."""
    monkeypatch.setattr(column, "supports_region", lambda placement: False)


@contextmanager
def no_region(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same for a part of a test."""
    with monkeypatch.context() as patch:
        patch.setattr(column, "supports_region", lambda placement: False)
        yield


def placement_of(spec: Spec, name: str, draws: int) -> RowPlacement:
    """Where the rows of x or z are, as `Column` has it."""
    layout = LAYOUTS[spec.layout]
    offset, stride = layout.row_placement(spec, name)
    dtype = torch.uint8
    if name == "z":
        dtype = DTYPES[spec.nfm.z_dtype]
    return RowPlacement(
        num_slots=spec.num_blocks * draws,
        file_bytes=layout.file_size(spec, name, BLOCK_ROWS),
        file_rows=BLOCK_ROWS,
        offset=offset,
        stride=stride,
        dim=spec.dim,
        dtype=dtype,
    )


def bits(values: torch.Tensor | NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of each row, (B, n · itemsize): NaN and bfloat16 compare as any other."""
    if isinstance(values, torch.Tensor):
        return values.view(torch.uint8).numpy()
    return np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)


def gather_rows(reader: MappedRows, placement: RowPlacement, slots: Any, numbers: Any) -> NDArray[np.uint8]:
    """The bytes of the rows with these numbers in the files of these slots."""
    positions = torch.from_numpy(reader.locate(np.asarray(slots), np.asarray(numbers)))
    out = torch.empty(len(positions), placement.dim, dtype=placement.dtype)
    assert reader.gather(positions, out) is out
    return bits(out).copy()


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("name", ["x", *DTYPES])
@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 5, 7), (1, 1, 1)])
def test_both_readers_give_the_rows_of_the_files(
    stores: Stores, layout: LayoutName, name: str, shape: tuple[int, int, int]
) -> None:
    """x, and z of every dtype: several blocks and draws, a short last block, files unmapped and mapped again."""
    z_dtype: ZDtype = next((dtype for dtype in DTYPES if dtype == name), "float16")
    kind = "x" if name == "x" else "z"
    store = stores.get(layout, shape, z_dtype)
    draws = range(1) if kind == "x" else range(DRAWS)
    files = {
        draw * store.spec.num_blocks + block: FileKey(kind, block, -1 if kind == "x" else draw)
        for draw in draws
        for block in range(store.spec.num_blocks)
    }
    placement = placement_of(store.spec, kind, len(draws))
    assert supports_region(placement)
    readers: list[MappedRows] = [RegionRows(placement), MemmapRows(placement)]

    def map_file(slot: int) -> None:
        record = store.files[files[slot]]
        for reader in readers:
            path = Path(store.url) / record.path
            data, state = reader.map_file(slot, LocalFile(store.url, record.path), record.bytes)
            assert state.bytes == record.bytes
            assert data.tobytes() == path.read_bytes()
            assert not data.flags.writeable

    expected = {slot: bits(store.column(kind, key.block, key.draw)) for slot, key in files.items()}
    every_row = [(slot, number) for slot, values in expected.items() for number in range(len(values))]
    assert len(every_row) == len(draws) * ROWS

    def check_rows(requested: list[tuple[int, int]]) -> None:
        slots, numbers = np.array(requested).T
        for reader in readers:
            gathered = gather_rows(reader, placement, slots, numbers)
            assert np.array_equal(gathered, np.stack([expected[slot][number] for slot, number in requested]))

    for slot in files:
        map_file(slot)
    rng = np.random.default_rng(0)
    shuffled = [every_row[i] for i in rng.permutation(len(every_row))]
    check_rows(shuffled)
    check_rows([shuffled[0]] * 3)
    last = max(files)
    for reader in readers:
        reader.unmap_file(0)
        reader.unmap_file(last)
    check_rows([row for row in shuffled if row[0] not in (0, last)])
    map_file(last)
    map_file(0)
    check_rows(shuffled)


def equal(first: Batch, second: Batch) -> bool:
    """Whether two batches are the same to the bit."""
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and np.array_equal(bits(a), bits(b)) for a, b in pairs)


def readers_of(stream: CouplingStream) -> set[type]:
    """Which kinds of reader a stream has chosen."""
    return {type(part._rows) for reader in stream._readers for part in reader._columns.values()}


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("z_dtype", DTYPES)
@pytest.mark.parametrize("stored", [False, True])
def test_streams_with_either_reader_are_the_same_to_the_bit(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, layout: LayoutName, z_dtype: ZDtype, stored: bool
) -> None:
    """Over three epochs, in one window, and in windows whose files are unmapped when they are over."""
    url = stores.get(layout, (3, 5, 7), z_dtype).url
    for window_blocks in (None, 1, 2):
        arguments: dict[str, Any] = {"batch_size": 23, "seed": 1, "window_blocks": window_blocks, "stored": stored}
        fast = CouplingStream(url, **arguments)
        with no_region(monkeypatch):
            plain = CouplingStream(url, **arguments)
        assert readers_of(fast) == {RegionRows} and readers_of(plain) == {MemmapRows}
        for reader in (*fast._readers, *plain._readers):
            reader.set_cache_windows(1.0)  # as of a remote store, whose cache holds one window
        with closing(fast), closing(plain):
            for _ in range(3 * ROWS // 23 + 1):
                batch = next(fast)
                assert batch.z.dtype == (DTYPES[z_dtype] if stored else torch.float32)
                assert equal(batch, next(plain))
        for reader in (*fast._readers, *plain._readers):
            assert all(len(part._mapped) <= (window_blocks or 4) for part in reader._columns.values())


def test_a_mixture_with_either_reader_is_the_same_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [Source(f"{tmp_path}/{layout}", weight) for layout, weight in zip(LAYOUT_NAMES, (1.0, 3.0), strict=True)]
    for number, (source, layout) in enumerate(zip(sources, LAYOUT_NAMES, strict=True)):
        write_random_couplings(source.url, layout, (1, 4, 4), 70, DRAWS, seed=number)
    fast = CouplingStream(sources, 32, seed=0)
    with no_region(monkeypatch):
        plain = CouplingStream(sources, 32, seed=0)
    with closing(fast), closing(plain):
        assert all(equal(next(fast), next(plain)) for _ in range(12))


def test_files_are_checked_by_the_plain_reader_too(tmp_path: Path, only_plain: None) -> None:
    write_random_couplings(str(tmp_path), "zarr", (1, 4, 4), ROWS, DRAWS)
    path = tmp_path / "columns.zarr/z/c/1/2/0/0/0"
    sound = path.read_bytes()
    path.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
    with (
        closing(CouplingStream(str(tmp_path), DRAWS * ROWS, seed=0)) as stream,
        pytest.raises(StoreError, match="sha256"),
    ):
        next(stream)


@pytest.mark.parametrize("kind", [RegionRows, MemmapRows])
def test_a_file_that_is_none_is_refused_by_either_reader(tmp_path: Path, kind: type[MappedRows]) -> None:
    reader = create_reader(kind)
    with pytest.raises(FileNotFoundError):
        reader.map_file(0, LocalFile(str(tmp_path), "missing"), 5000)
    (tmp_path / "short").write_bytes(bytes(4999))
    with pytest.raises(StoreError, match=r"short: got 4999 bytes, expected 5000; the file is truncated or overlong"):
        reader.map_file(0, LocalFile(str(tmp_path), "short"), 5000)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        reader.map_file(0, LocalFile(str(tmp_path), "pipe"), 5000)


def create_reader(kind: type[MappedRows]) -> MappedRows:
    """A reader of PLACEMENT."""
    return RegionRows(PLACEMENT) if kind is RegionRows else MemmapRows(PLACEMENT)


def test_a_file_deleted_while_it_is_opened_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may evict it from the cache; `Store.use_local_file` then fetches it again."""
    path = tmp_path / "evicted"
    path.write_bytes(bytes(5000))
    from_file = torch.from_file

    def delete_first(*arguments: Any, **options: Any) -> torch.Tensor:
        path.unlink()
        return from_file(*arguments, **options)

    monkeypatch.setattr(torch, "from_file", delete_first)
    with pytest.raises(FileNotFoundError):
        MemmapRows(PLACEMENT).map_file(0, LocalFile(str(tmp_path), path.name), 5000)


def test_a_file_that_cannot_be_mapped_is_an_error_of_the_system(tmp_path: Path) -> None:
    path = tmp_path / "large"
    os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 30)  # sparse
    reader = MemmapRows(replace(PLACEMENT, file_bytes=1 << 30))
    with address_space_limit(extra_bytes=1 << 20), pytest.raises(OSError, match="Cannot allocate memory"):
        reader.map_file(0, LocalFile(str(tmp_path), path.name), 1 << 30)


def test_the_plain_reader_takes_no_file_descriptors(tmp_path: Path) -> None:
    """A large store has more files than `ulimit -n` allows a process to have open."""
    (tmp_path / "file").write_bytes(bytes(5000))
    reader = MemmapRows(replace(PLACEMENT, num_slots=50))
    before = len(os.listdir("/proc/self/fd"))
    for slot in range(50):
        reader.map_file(slot, LocalFile(str(tmp_path), "file"), 5000)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_row_that_is_not_mapped_is_no_row_of_the_plain_reader(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(2 * 1024))  # two rows
    reader = MemmapRows(PLACEMENT)
    reader.map_file(0, LocalFile(str(tmp_path), "file"), 2 * 1024)
    assert gather_rows(reader, PLACEMENT, [0], [1]).shape == (1, 200)
    with pytest.raises(IndexError):
        gather_rows(reader, PLACEMENT, [0], [2])
    with pytest.raises(KeyError):
        gather_rows(reader, PLACEMENT, [1], [0])


def test_the_plain_reader_takes_little_endian_values_at_any_offset(tmp_path: Path) -> None:
    """Which the fast one cannot read: the values are not aligned."""
    placement = RowPlacement(num_slots=1, file_bytes=90, file_rows=3, offset=3, stride=29, dim=6, dtype=torch.float32)
    assert not supports_region(placement)
    values = np.random.default_rng(0).standard_normal((3, 6)).astype("<f4")
    data = b"".join(b"???" + row.tobytes() + b"??" for row in values) + b"end"
    (tmp_path / "file").write_bytes(data)
    reader = create_mapped_rows(placement)
    reader.map_file(0, LocalFile(str(tmp_path), "file"), len(data))
    out = torch.empty(2, 6)
    reader.gather(torch.from_numpy(reader.locate(np.array([0, 0]), np.array([2, 0]))), out)
    assert np.array_equal(out.numpy(), values[[2, 0]])


# Which reader is chosen


def test_the_fast_reader_is_chosen_where_it_works() -> None:
    assert isinstance(create_mapped_rows(PLACEMENT), RegionRows)


def test_the_plain_reader_is_chosen_elsewhere(only_plain: None) -> None:
    assert isinstance(create_mapped_rows(PLACEMENT), MemmapRows)


@pytest.mark.parametrize(
    "other", [{"platform": "win32"}, {"platform": "freebsd14"}, {"maxsize": 2**31 - 1}, {"byteorder": "big"}], ids=str
)
def test_a_platform_without_what_the_region_needs_has_none(
    monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    machine = {"platform": "linux", "maxsize": sys.maxsize, "byteorder": "little"}
    monkeypatch.setattr(region, "sys", SimpleNamespace(**machine))
    assert supports_region(PLACEMENT)
    monkeypatch.setattr(region, "sys", SimpleNamespace(**machine | other))
    assert not supports_region(PLACEMENT)


def test_rows_that_are_not_aligned_have_no_region() -> None:
    assert supports_region(replace(PLACEMENT, offset=66, stride=1026))
    assert not supports_region(replace(PLACEMENT, offset=65))
    assert not supports_region(replace(PLACEMENT, stride=1025))


@pytest.mark.parametrize("page_bytes", [4096, 16384, 65536])
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("z_dtype", DTYPES)
def test_every_layout_and_dtype_has_a_region_on_pages_of_any_size(
    monkeypatch: pytest.MonkeyPatch, layout: LayoutName, z_dtype: ZDtype, page_bytes: int
) -> None:
    z_scale_sha256 = "0" * 64 if z_dtype == "int8" else None
    spec = random_coupling_spec(layout, (3, 5, 7), ROWS, DRAWS, z_dtype, z_scale_sha256)
    monkeypatch.setattr(region, "mmap", SimpleNamespace(PAGESIZE=page_bytes))
    assert supports_region(placement_of(spec, "x", 1)) and supports_region(placement_of(spec, "z", DRAWS))


def import_region_again() -> ModuleType:
    """A second copy of region.py, imported as the platform is now."""
    assert region.__spec__ is not None and region.__spec__.origin is not None
    spec = importlib.util.spec_from_file_location("region_again", region.__spec__.origin)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class NoLibrary:
    """`ctypes.CDLL` on Windows, which has no library without a name."""

    def __init__(self, name: None, use_errno: bool) -> None:
        raise TypeError("bad argument type for built-in operation")


class LibraryWithoutMmap:
    """`ctypes.CDLL` of a C library that has none of the functions."""

    def __init__(self, name: None, use_errno: bool) -> None:
        pass


@pytest.mark.parametrize("library", [NoLibrary, LibraryWithoutMmap])
def test_region_can_be_imported_without_the_c_library(monkeypatch: pytest.MonkeyPatch, library: type) -> None:
    assert import_region_again().supports_region(PLACEMENT)
    monkeypatch.setattr(ctypes, "CDLL", library)
    assert not import_region_again().supports_region(PLACEMENT)


# Address space that is too small


@contextmanager
def address_space_limit(extra_bytes: int) -> Iterator[None]:
    """`ulimit -v` at what this process has now, and `extra_bytes` more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + extra_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


HUGE = {
    "more than an address can count": (1 << 16, (1 << 48) + (1 << 12)),
    "more than a processor addresses": (1 << 20, 1 << 40),
}


@pytest.mark.parametrize("size", HUGE)
def test_files_beyond_the_address_space_are_read_by_the_plain_reader(tmp_path: Path, size: str) -> None:
    """Which reserves nothing, and reads the files that there are."""
    num_slots, file_bytes = HUGE[size]
    with pytest.raises(AddressSpaceError, match=f"{num_slots} files of {file_bytes} bytes"):
        Region(num_slots, file_bytes)
    placement = replace(PLACEMENT, num_slots=num_slots, file_bytes=file_bytes, file_rows=file_bytes // 1024)
    reader = create_mapped_rows(placement)
    assert isinstance(reader, MemmapRows)
    values = np.arange(4 * 512, dtype="<u2").reshape(4, 512)  # rows of 1024 bytes, with values from byte 64 on
    (tmp_path / "file").write_bytes(values.tobytes())
    last = num_slots - 1
    for slot in (0, last):
        reader.map_file(slot, LocalFile(str(tmp_path), "file"), values.nbytes)
    gathered = gather_rows(reader, placement, [last, 0, last], [3, 1, 0])
    assert np.array_equal(gathered, bits(values[[3, 1, 0], 32:132]))


def test_a_limit_of_the_address_space_is_kept_to() -> None:
    """`ulimit -v` with room for the files in use, but not for all files of the store at once."""
    placement = replace(PLACEMENT, num_slots=1 << 20, file_bytes=1 << 14)  # 16 GiB
    assert isinstance(create_mapped_rows(placement), RegionRows)
    with address_space_limit(extra_bytes=1 << 30):
        assert isinstance(create_mapped_rows(placement), MemmapRows)


def test_a_stream_needs_no_address_space_for_files_that_it_does_not_read(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = stores.get("webdataset", (3, 5, 7), "float16").url
    with closing(CouplingStream(url, 16, seed=0)) as stream:
        expected = [next(stream) for _ in range(12)]

    def refuse(self: Region, num_slots: int, file_bytes: int) -> None:
        raise AddressSpaceError("too small")

    monkeypatch.setattr(Region, "__init__", refuse)
    with closing(CouplingStream(url, 16, seed=0)) as stream:
        assert readers_of(stream) == {MemmapRows}
        assert all(equal(next(stream), batch) for batch in expected)
