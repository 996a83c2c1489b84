"""Stores read without any of our code, as another team would: by `tarfile` and NumPy, by webdataset, by zarr."""

import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
import zarr
from numpy.typing import NDArray

Columns = dict[str, NDArray[Any]]  # by name: x, x_mirrored, label, index (N, …); z and noise (K, N, …)


def _tar_files(folder: Path) -> dict[str, list[list[Path]]]:
    """By column, the tars of each draw, in the order of blocks; columns without draws have one list."""
    files: dict[str, list[list[Path]]] = {}
    for column in ("x", "x_mirrored", "z", "noise"):
        draws = sorted((folder / column).glob("k*")) or [folder / column]
        tars = [sorted(draw.glob("*.tar")) for draw in draws]
        if tars[0]:
            files[column] = tars
    return files


def _merge(columns: Columns, index: list[int], labels: list[int]) -> None:
    """Note the keys and the labels of a column, and of a draw, which must be the same in all."""
    for name, values in (("index", index), ("label", labels)):
        if values:
            assert columns.setdefault(name, np.array(values)).tolist() == values


def read_by_tarfile(folder: Path) -> Columns:
    """The columns of a WebDataset store."""
    columns: Columns = {}
    for column, draws in _tar_files(folder).items():
        rows: list[list[NDArray[Any]]] = []
        for tars in draws:
            rows.append([])
            labels, index = [], []
            for path in tars:
                with tarfile.open(path) as tar:
                    for info in tar:
                        content = tar.extractfile(info)
                        assert content is not None
                        key, suffix = info.name.split(".", 1)
                        if suffix == "cls":
                            labels.append(int(content.read()))
                            continue
                        assert suffix == f"{column}.npy"
                        rows[-1].append(np.load(io.BytesIO(content.read()), allow_pickle=False))
                        index.append(int(key))
            _merge(columns, index, labels)
        values = np.array(rows)
        columns[column] = values if column in ("z", "noise") else values[0]
    return columns


def read_by_webdataset(folder: Path) -> Columns:
    """The columns of a WebDataset store."""
    columns: Columns = {}
    for column, draws in _tar_files(folder).items():
        samples = [
            list(wds.WebDataset([str(path) for path in tars], shardshuffle=False, empty_check=False).decode())
            for tars in draws
        ]
        values = np.array([[sample[f"{column}.npy"] for sample in of_draw] for of_draw in samples])
        columns[column] = values if column in ("z", "noise") else values[0]
        for of_draw in samples:
            index = [int(sample["__key__"]) for sample in of_draw]
            _merge(columns, index, [sample["cls"] for sample in of_draw if "cls" in sample])
    return columns


def read_by_zarr(group: Path, warnings_are_errors: bool = True) -> Columns:
    """The columns of a Zarr group, whose members are listed in every way that zarr has."""
    with warnings.catch_warnings():
        warnings.simplefilter("error" if warnings_are_errors else "ignore")
        opened = zarr.open_group(str(group), mode="r")
        names = sorted(opened.array_keys())
        assert sorted(name for name, _ in opened.members(max_depth=None)) == names
        assert all(name in str(opened.tree()) for name in names)
    columns: Columns = {}
    for name in names:
        array = opened[name]
        assert isinstance(array, zarr.Array)
        columns[name] = np.asarray(array[...])
    return columns


def read_by_records(folder: Path) -> Columns:
    """The columns of a WebDataset store by the offsets in dataset.json alone, without parsing a tar."""
    document = json.loads((folder / "dataset.json").read_bytes())
    columns: Columns = {}
    for column, draws in _tar_files(folder).items():
        record = document["records"][column]
        place = record["members"][0]["value_offset"]
        dtype, shape = np.dtype(record["dtype"]), tuple(record["shape"])
        values = []
        for tars in draws:
            rows = [
                np.frombuffer(data, dtype, int(np.prod(shape)), start + place).reshape(shape)
                for data in (path.read_bytes() for path in tars)
                for start in range(0, len(data) - 1024, record["record_bytes"])
            ]
            values.append(np.stack(rows))
        columns[column] = np.stack(values) if column in ("z", "noise") else values[0]
    return columns
