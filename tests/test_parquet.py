"""Parquet files that take long, or that no writer wrote."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nfm.storage_specs.storage import parquet
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.parquet import Limits, read_table

TABLE = pa.table({name: pa.array(range(1000), pa.int64()) for name in "ab"})
LIMITS = Limits(rows=1000, value_bytes=1 << 20, text_bytes=10)


def written(**options: int) -> bytes:
    buffer = io.BytesIO()
    options |= {"use_dictionary": False, "write_statistics": False, "store_schema": False}
    pq.write_table(TABLE, buffer, compression="none", **options)
    return buffer.getvalue()


def test_columns_do_not_share_their_bytes() -> None:
    """The pages of one would be walked as often as columns name them."""
    data = written()
    columns = [pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0).column(number) for number in (0, 1)]
    first, second = (column.data_page_offset for column in columns)
    assert (first, columns[0].total_compressed_size) == (4, columns[1].total_compressed_size)

    # The offset is a zigzag number of two bytes, of which the first holds the low seven bits.
    stated = bytes([2 * second & 127 | 128, 2 * second >> 7])
    assert 128 <= 2 * second < 1 << 14 and data.count(stated) >= 1
    at = data.rindex(stated)
    forged = data[:at] + bytes([2 * first | 128, 0]) + data[at + 2 :]
    assert read_table(data, TABLE.schema, LIMITS, "table").equals(TABLE)
    with pytest.raises(StoreError, match="table: got columns that share bytes of the file"):
        read_table(forged, TABLE.schema, LIMITS, "table")


def test_pages_are_counted_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(data_page_size=1, write_batch_size=100)
    monkeypatch.setattr(parquet, "MAX_PAGES", 20)
    assert read_table(data, TABLE.schema, LIMITS, "table").equals(TABLE)
    monkeypatch.setattr(parquet, "MAX_PAGES", 19)
    with pytest.raises(StoreError, match="table: got more than 19 pages"):
        read_table(data, TABLE.schema, LIMITS, "table")


def test_dictionaries_have_no_more_texts_than_rows() -> None:
    """A few bytes of a compressed dictionary become a million empty texts."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array([""] * 900_000))
    table = pa.table({"text": texts})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", store_schema=False, dictionary_pagesize_limit=1 << 23)
    schema = pa.schema({"text": pa.string()})
    with pytest.raises(StoreError, match="table: got more texts in dictionaries than rows"):
        read_table(buffer.getvalue(), schema, LIMITS._replace(value_bytes=1 << 23), "table")


def test_the_header_of_a_page_has_few_fields() -> None:
    """Each takes a byte of the file, and a hundred times as long to read as others."""
    reader = parquet._CompactReader(memoryview(b"\x11" * 1000 + b"\0"), 0)
    with pytest.raises(IndexError, match="more than 100 fields"):
        reader.read_struct()
