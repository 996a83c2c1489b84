"""The formats of peers.py: for each a function that writes it and one that yields its batches of raw arrays."""

import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

Raw = tuple[Any, Any, Any]  # x uint8, z float16 and label of a batch: arrays or tensors
PIECE = 256  # pairs: what the peers that shuffle within a window read at once, ...
WINDOW = 2048  # ... and the least that they hold, twice the 1,000 that WebDataset's and datasets' own examples shuffle


def library(name: str) -> Any:
    """Imports a module. The package `streaming` is registered without running its own file, which imports its vision
    part, and so torchvision, for which torch's CPU build has no match; `streaming.base` does without."""
    package = name.split(".")[0]
    if package == "streaming" and package not in sys.modules:
        sys.modules[package] = importlib.util.module_from_spec(importlib.util.find_spec(package))
    return importlib.import_module(name)


@dataclass(frozen=True)
class Case:
    """What to store: `images` of `shape`, each with `draws`. Pair p is draw p // images of image p % images."""

    root: Path
    shape: tuple[int, ...]
    images: int
    draws: int

    @classmethod
    def open(cls, root: Path) -> "Case":
        draws, images, *shape = np.load(root / "z.npy", mmap_mode="r").shape
        return cls(root, tuple(shape), images, draws)

    @property
    def pairs(self) -> int:
        return self.images * self.draws

    @property
    def pixels(self) -> int:
        return int(np.prod(self.shape))

    def load(self, name: str) -> np.ndarray:
        return np.load(self.root / f"{name}.npy")

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x (N, ...), z by pair (K·N, ...) and label (N), in memory."""
        return self.load("x"), self.load("z").reshape(-1, *self.shape), self.load("label")

    def blocks(self, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All pairs in random order, as formats that shuffle only what lies near ask for when written."""
        x, z, label = self.arrays()
        order = np.random.default_rng(0).permutation(self.pairs)
        for pair in (order[start : start + rows] for start in range(0, self.pairs, rows)):
            yield x[pair % self.images], z[pair], label[pair % self.images]

    def samples(self) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        for x, z, label in self.blocks(1000):
            yield from zip(x, z, label.tolist(), strict=True)

    def empty(self, rows: int) -> Raw:
        return np.empty((rows, *self.shape), np.uint8), np.empty((rows, *self.shape), np.float16), np.empty(rows, int)


def shuffled(rows: int, batch: int, epochs: int) -> Iterator[np.ndarray]:
    """The rows of each batch, in an order that is shuffled globally."""
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(rows)
        yield from (order[start : start + batch] for start in range(0, rows - batch + 1, batch))


def shuffled_pieces(pieces: int, epochs: int) -> Iterator[int]:
    for epoch in range(epochs):
        yield from np.random.default_rng(epoch).permutation(pieces).tolist()


def window_shuffle(pieces: Iterable[Raw], case: Case, batch: int) -> Iterator[Raw]:
    """Batches drawn at random from a window of pieces, gathered straight from these into one preallocated batch."""
    pieces = iter(pieces)
    rng = np.random.default_rng(0)
    out = case.empty(batch)
    window: list[Raw] = []
    while True:
        while sum(len(piece[2]) for piece in window) < WINDOW and (piece := next(pieces, None)):
            window.append(piece)
        starts = np.cumsum([0, *(len(piece[2]) for piece in window)])
        if starts[-1] < batch:
            return
        order = rng.permutation(starts[-1])
        full = len(order) - len(order) % batch
        for first in range(0, full, batch):
            yield _gather(window, starts, order[first : first + batch], out)
        window = [_gather(window, starts, order[full:], case.empty(len(order) - full))]


def _gather(pieces: list[Raw], starts: np.ndarray, rows: np.ndarray, out: Raw) -> Raw:
    rows = np.sort(rows)  # by piece: the order within a batch does not matter
    edges = np.searchsorted(rows, starts)
    for piece, start, low, high in zip(pieces, starts, edges, edges[1:], strict=False):
        for source, target in zip(piece, out, strict=True):
            np.take(source, rows[low:high] - start, axis=0, out=target[low:high], mode="clip")
    return out


def join(samples: Iterable[tuple[bytes, bytes, int]], case: Case) -> Raw:
    """Raw bytes of samples as a batch: one frombuffer for the batch is faster than one for each sample and a stack."""
    x, z, label = zip(*samples, strict=True)
    images = np.frombuffer(b"".join(x), np.uint8).reshape(-1, *case.shape)
    return images, np.frombuffer(b"".join(z), np.float16).reshape(-1, *case.shape), np.array(label, int)


# WebDataset: the pipeline of its README. A plain loop over it was faster than WebLoader or DataLoader around it. With
# mtime, an integer, tarfile writes no extra header for each member, which takes as long to read as the member's own.


def write_webdataset(case: Case, folder: Path) -> None:
    with library("webdataset").ShardWriter(f"{folder}/%06d.tar", maxcount=1000, mtime=0, verbose=0) as shards:
        for i, (x, z, label) in enumerate(case.samples()):
            shards.write({"__key__": f"{i:08d}", "x.npy": x, "z.npy": z, "cls": label})


def read_webdataset(case: Case, folder: Path, batch: int, epochs: int) -> Iterator[Raw]:
    urls = sorted(map(str, folder.glob("*.tar")))
    data = library("webdataset").WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode()
    samples = data.to_tuple("x.npy", "z.npy", "cls").batched(batch)
    for _ in range(epochs):
        yield from samples


def write_webdataset_raw(case: Case, folder: Path) -> None:
    with library("webdataset").ShardWriter(f"{folder}/%06d.tar", maxcount=1000, mtime=0, verbose=0) as shards:
        for i, (x, z, label) in enumerate(case.samples()):
            shards.write({"__key__": f"{i:08d}", "x.bin": x.tobytes(), "z.bin": z.tobytes(), "cls": label})


def read_webdataset_raw(case: Case, folder: Path, batch: int, epochs: int) -> Iterator[Raw]:
    urls = sorted(map(str, folder.glob("*.tar")))
    data = library("webdataset").WebDataset(urls, shardshuffle=len(urls)).shuffle(1000)
    samples = data.to_tuple("x.bin", "z.bin", "cls").batched(batch, collation_fn=lambda part: join(part, case))
    for _ in range(epochs):
        yield from samples


# MosaicML Streaming: `mds` as documented; `mds-raw` with bytes for arrays, joined by the batch.


def write_mds(case: Case, folder: Path) -> None:
    shape = ",".join(map(str, case.shape))
    columns = {"x": f"ndarray:uint8:{shape}", "z": f"ndarray:float16:{shape}", "label": "int"}
    with library("streaming.base").MDSWriter(out=str(folder), columns=columns) as out:
        for x, z, label in case.samples():
            out.write({"x": x, "z": z, "label": label})


def read_mds(case: Case, folder: Path, batch: int, epochs: int, **options: Any) -> Iterator[Raw]:
    # StreamingDataLoader was no faster than torch's, which the documentation's examples use.
    data = library("streaming.base").StreamingDataset(local=str(folder), shuffle=True, batch_size=batch)
    loader = torch.utils.data.DataLoader(data, batch_size=batch, num_workers=0, **options)
    for _ in range(epochs):
        yield from ((item["x"], item["z"], item["label"]) if isinstance(item, dict) else item for item in loader)


def write_mds_raw(case: Case, folder: Path) -> None:
    columns = {"x": "bytes", "z": "bytes", "label": "int"}
    with library("streaming.base").MDSWriter(out=str(folder), columns=columns) as out:
        for x, z, label in case.samples():
            out.write({"x": x.tobytes(), "z": z.tobytes(), "label": label})


def _join_dicts(case: Case) -> Callable[[list[dict[str, Any]]], Raw]:
    return lambda samples: join(((sample["x"], sample["z"], sample["label"]) for sample in samples), case)


def read_mds_raw(case: Case, folder: Path, batch: int, epochs: int) -> Iterator[Raw]:
    return read_mds(case, folder, batch, epochs, collate_fn=_join_dicts(case))


# LitData, in its default chunks of 64 MB. Flat tensors, decoded one by one, are the fastest of its array types (with
# batch_decode="auto" they run at a tenth of that). By default it shuffles blocks of 256 items and the items of a block,
# so a batch of 256 has much the same members in every epoch; item_shuffle_window="full" was slower in each variant.


def write_litdata(case: Case, folder: Path) -> None:
    tensor = torch.from_numpy
    _write_litdata(folder, ((tensor(x.ravel()), tensor(z.ravel()), label) for x, z, label in case.samples()))


def write_litdata_raw(case: Case, folder: Path) -> None:
    _write_litdata(folder, ((x.tobytes(), z.tobytes(), label) for x, z, label in case.samples()))


def _write_litdata(folder: Path, samples: Iterable[Raw]) -> None:
    # The writer of optimize(), without its worker processes and temporary folders.
    writer = library("litdata.streaming.writer").BinaryWriter(str(folder), chunk_bytes="64MB")
    for i, (x, z, label) in enumerate(samples):
        writer.add_item(i, {"x": x, "z": z, "label": label})
    writer.done()
    writer.merge()


def read_litdata(case: Case, folder: Path, batch: int, epochs: int) -> Iterator[Raw]:
    litdata = library("litdata")
    data = litdata.StreamingDataset(str(folder), shuffle=True, batch_decode=0)
    loader = litdata.StreamingDataLoader(data, batch_size=batch, num_workers=0)
    for _ in range(epochs):
        for item in loader:
            yield item["x"].view(-1, *case.shape), item["z"].view(-1, *case.shape), item["label"]


def read_litdata_raw(case: Case, folder: Path, batch: int, epochs: int) -> Iterator[Raw]:
    litdata = library("litdata")
    data = litdata.StreamingDataset(str(folder), shuffle=True)
    loader = litdata.StreamingDataLoader(data, batch_size=batch, num_workers=0, collate_fn=_join_dicts(case))
    for _ in range(epochs):
        yield from loader


# Hugging Face datasets. Its documentation advises to_iterable_dataset for shuffled training; of that, DataLoader and
# shuffle().iter() with the formats "torch" and "numpy", this is the fastest.


def write_datasets(case: Case, folder: Path) -> None:
    datasets = library("datasets")
    arrays = {"x": datasets.Array3D(case.shape, "uint8"), "z": datasets.Array3D(case.shape, "float16")}
    features, cache = datasets.Features(arrays | {"label": datasets.Value("int64")}), folder.with_suffix(".cache")
    rows = ({"x": x, "z": z, "label": label} for x, z, label in case.samples())
    data = datasets.Dataset.from_generator(lambda: rows, features=features, cache_dir=str(cache), fingerprint="pairs")
    data.save_to_disk(folder)
    shutil.rmtree(cache)


def read_datasets(case: Case, folder: Path, batch: int, epochs: int) -> Iterator[Raw]:
    data = library("datasets").load_from_disk(folder).with_format("torch")
    stream = data.to_iterable_dataset(num_shards=64).shuffle(seed=0, buffer_size=1000)
    for epoch in range(epochs):
        stream.set_epoch(epoch)
        yield from ((item["x"], item["z"], item["label"]) for item in stream.iter(batch))


# Arrow columns of fixed-size binary values, viewed through NumPy: `datasets-tuned`, `parquet` and `arrow-ipc`.


def fixed_size_binary(values: np.ndarray) -> Any:
    arrow, width = library("pyarrow"), values.nbytes // len(values)
    buffers = [None, arrow.py_buffer(np.ascontiguousarray(values))]
    return arrow.FixedSizeBinaryArray.from_buffers(arrow.binary(width), len(values), buffers)


def view(column: Any, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    values = np.frombuffer(column.buffers()[1], dtype).reshape(-1, *shape)
    return values[column.offset : column.offset + len(column)]


def record_batches(case: Case) -> Iterator[Any]:
    for x, z, label in case.blocks(PIECE):
        columns = {"x": fixed_size_binary(x), "z": fixed_size_binary(z), "label": label}
        yield library("pyarrow").RecordBatch.from_pydict(columns)


def views(table: Any, case: Case) -> Iterator[Raw]:
    for part in table.to_batches():  # one, or two where a slice crosses a boundary: no copy
        x, z = view(part["x"], np.uint8, case.shape), view(part["z"], np.float16, case.shape)
        yield x, z, view(part["label"], np.int64, ())


def write_datasets_tuned(case: Case, folder: Path) -> None:
    table = library("pyarrow").Table.from_batches(list(record_batches(case)))
    library("datasets").Dataset(table).save_to_disk(folder)


def read_datasets_tuned(case: Case, folder: Path, batch: int, epochs: int) -> Iterator[Raw]:
    # Slices in random order and a window: with "arrow", rows by index ran at half of this, the library's own shuffle
    # buffer at two thirds, table.take at a hundredth.
    data = library("datasets").load_from_disk(folder).with_format("arrow")
    pieces = shuffled_pieces(-(-len(data) // PIECE), epochs)
    slices = (data[piece * PIECE : (piece + 1) * PIECE] for piece in pieces)
    return window_shuffle((part for table in slices for part in views(table, case)), case, batch)


def write_parquet(case: Case, folder: Path) -> None:
    parquet, parts = library("pyarrow.parquet"), record_batches(case)
    part = next(parts)
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with parquet.ParquetWriter(folder / "pairs.parquet", part.schema, **options) as file:
        while part:
            file.write_batch(part)
            part = next(parts, None)


def read_parquet(case: Case, folder: Path, batch: int, epochs: int) -> Iterator[Raw]:
    # Row groups of 256 or 1,024, mapped or read, one page or many: all alike.
    file = library("pyarrow.parquet").ParquetFile(folder / "pairs.parquet", memory_map=True)
    tables = (file.read_row_group(group, use_threads=False) for group in shuffled_pieces(file.num_row_groups, epochs))
    return window_shuffle((part for table in tables for part in views(table, case)), case, batch)


def write_arrow_ipc(case: Case, folder: Path) -> None:
    # One record batch, and x and z of a pair side by side in one value: one gather a batch.
    arrow, rows = library("pyarrow"), np.empty((case.pairs, 3 * case.pixels), np.uint8)
    x, z, label = case.arrays()
    rows[:, : case.pixels] = np.tile(x.reshape(len(x), -1), (case.draws, 1))
    rows[:, case.pixels :] = z.reshape(len(z), -1).view(np.uint8)
    columns = {"pair": fixed_size_binary(rows), "label": np.tile(label, case.draws)}
    part = arrow.RecordBatch.from_pydict(columns)
    with arrow.OSFile(str(folder / "pairs.arrow"), "wb") as file, arrow.ipc.new_file(file, part.schema) as out:
        out.write_batch(part)


def read_arrow_ipc(case: Case, folder: Path, batch: int, epochs: int) -> Iterator[Raw]:
    arrow = library("pyarrow")
    part = arrow.ipc.open_file(arrow.memory_map(str(folder / "pairs.arrow"))).get_batch(0)
    pairs, labels = view(part["pair"], np.uint8, (3 * case.pixels,)), view(part["label"], np.int64, ())
    out = np.empty((batch, pairs.shape[1]), np.uint8)
    x, z = out[:, : case.pixels].reshape(-1, *case.shape), out[:, case.pixels :].view(np.float16)
    for rows in shuffled(len(pairs), batch, epochs):
        np.take(pairs, rows, axis=0, out=out, mode="clip")
        yield x, z.reshape(-1, *case.shape), labels[rows]


# Zarr, in uncompressed chunks of about 256 KiB, 32 of z to a shard: `zarr` reads random rows, `zarr-chunks` chunks.


def write_zarr(case: Case, folder: Path) -> None:
    group, rows = library("zarr").open_group(folder, mode="w"), max(1, (1 << 18) // (2 * case.pixels))
    chunks = {"x": (2 * rows, *case.shape), "z": (1, rows, *case.shape)}
    shards = {"x": (32 * rows, *case.shape), "z": (1, 32 * rows, *case.shape)}
    for name in ("x", "z"):
        group.create_array(name, data=case.load(name), chunks=chunks[name], shards=shards[name], compressors=None)
    group.create_array("label", data=case.load("label"), chunks=(case.images,), compressors=None)


def read_zarr(case: Case, folder: Path, batch: int, epochs: int) -> Iterator[Raw]:
    # One thread, or one request at a time, instead of zarr's defaults made no difference here.
    group = library("zarr").open_group(folder, mode="r")
    labels, codes = group["label"][:], case.empty(batch)[1]
    for pairs in shuffled(case.pairs, batch, epochs):
        draws, rows = np.divmod(pairs, case.images)
        for draw in range(case.draws):
            codes[draws == draw] = group["z"].oindex[draw, rows[draws == draw]]
        yield group["x"].oindex[rows], codes, labels[rows]


def read_zarr_chunks(case: Case, folder: Path, batch: int, epochs: int) -> Iterator[Raw]:
    # Runs of chunks of about PIECE rows: chunks one by one ran at two thirds of it, longer runs a little faster.
    group = library("zarr").open_group(folder, mode="r")
    x, z, labels = group["x"], group["z"], group["label"][:]
    run = x.chunks[0] * max(1, round(PIECE / x.chunks[0]))
    runs = -(-case.images // run)
    places = (divmod(piece, runs) for piece in shuffled_pieces(case.draws * runs, epochs))
    slices = ((draw, slice(start * run, (start + 1) * run)) for draw, start in places)
    return window_shuffle(((x[rows], z[draw, rows], labels[rows]) for draw, rows in slices), case, batch)


# Bounds: everything in memory, and reading bytes without a use for them.


def read_ram_torch(case: Case, folder: Path, batch: int, epochs: int) -> Iterator[Raw]:
    x, z, label = map(torch.from_numpy, case.arrays())
    for pairs in map(torch.from_numpy, shuffled(case.pairs, batch, epochs)):
        rows = pairs % case.images
        yield x[rows], z[pairs], label[rows]


def read_ram_numpy(case: Case, folder: Path, batch: int, epochs: int) -> Iterator[Raw]:
    x, z, label = case.arrays()
    for pairs in shuffled(case.pairs, batch, epochs):
        rows = pairs % case.images
        yield x[rows], z[pairs], label[rows]


def read_ram_preallocated(case: Case, folder: Path, batch: int, epochs: int) -> Iterator[Raw]:
    (x, z, label), out = case.arrays(), case.empty(batch)  # torch.index_select(out=) is as fast as np.take
    for pairs in shuffled(case.pairs, batch, epochs):
        rows = pairs % case.images
        for source, index, target in zip((x, z, label), (rows, pairs, rows), out, strict=True):
            np.take(source, index, axis=0, out=target, mode="clip")
        yield out


def read_bytes(case: Case, folder: Path, batch: int, epochs: int) -> Iterator[int]:
    """The bytes of as many pairs, in order, into one buffer; which of 64 KiB to 4 MiB it has made little difference."""
    size, pair, read = 2 * case.pairs * case.pixels, 3 * case.pixels, 0
    buffer, source = bytearray(1 << 20), os.open(case.root / "z.npy", os.O_RDONLY)
    for offset in range(0, epochs * case.pairs * pair, len(buffer)):
        read += os.preadv(source, [buffer], offset % size)
        yield read // pair
        read %= pair
    os.close(source)


@dataclass(frozen=True)
class Peer:
    folder: str
    write: Callable[[Case, Path], None] | None  # None: reads the arrays in DIR as they are
    read: Callable[[Case, Path, int, int], Iterator[Any]]  # (case, folder, batch, epochs); `read` yields its size alone
    modules: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


_WDS = ("webdataset",), ("webdataset",)
_MDS = ("streaming.base",), ("mosaicml-streaming",)
_LIT = ("litdata",), ("litdata",)
_HF = ("datasets", "pyarrow"), ("datasets", "pyarrow")
_ARROW = ("pyarrow.parquet",), ("pyarrow",)
_ZARR = ("zarr",), ("zarr",)

PEERS = {
    "webdataset": Peer("webdataset", write_webdataset, read_webdataset, *_WDS),
    "webdataset-raw": Peer("webdataset-raw", write_webdataset_raw, read_webdataset_raw, *_WDS),
    "mds": Peer("mds", write_mds, read_mds, *_MDS),
    "mds-raw": Peer("mds-raw", write_mds_raw, read_mds_raw, *_MDS),
    "litdata": Peer("litdata", write_litdata, read_litdata, *_LIT),
    "litdata-raw": Peer("litdata-raw", write_litdata_raw, read_litdata_raw, *_LIT),
    "datasets": Peer("datasets", write_datasets, read_datasets, *_HF),
    "datasets-tuned": Peer("datasets-tuned", write_datasets_tuned, read_datasets_tuned, *_HF),
    "zarr": Peer("zarr", write_zarr, read_zarr, *_ZARR),
    "zarr-chunks": Peer("zarr", write_zarr, read_zarr_chunks, *_ZARR),
    "arrow-ipc": Peer("arrow-ipc", write_arrow_ipc, read_arrow_ipc, *_ARROW),
    "parquet": Peer("parquet", write_parquet, read_parquet, *_ARROW),
    "ram-torch": Peer("", None, read_ram_torch),
    "ram-numpy": Peer("", None, read_ram_numpy),
    "ram-preallocated": Peer("", None, read_ram_preallocated),
    "read": Peer("", None, read_bytes),
}
