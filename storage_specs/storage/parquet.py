"""Parquet files in memory."""

import io

import pyarrow.parquet as pq


def open_parquet(data: bytes) -> pq.ParquetFile:
    """The Parquet file in `data`; read it with `use_threads=False`. Raises pyarrow.ArrowException or OSError if it is
    none.

    No thread of Arrow is started: a process that ends soon after would be aborted, in every second case on one core
    ("terminate called without an active exception", pyarrow 26), and one that forks could hang.
    """
    return pq.ParquetFile(io.BytesIO(data), pre_buffer=False)
