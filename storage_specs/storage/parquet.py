"""Parquet files in memory, of which nothing is believed: neither how large their values are, nor how many they have."""

from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nfm.storage_specs.storage.errors import StoreError

MAX_FOOTER_BYTES = 1 << 20
MAX_DICTIONARY_BYTES = 1 << 22  # of a column in a group of rows; pyarrow begins to write values plainly after 1 MiB
MAX_PAGES = 100_000  # of all columns; pyarrow ends a page after 20,000 rows or 1 MiB, and no sooner
_MAX_FIELDS = 100  # in the header of a page
_MAX_LIST = 10_000  # items of a list in the footer; each takes some 500 bytes before it is read
_ENCODINGS = (0, 2, 3, 8)  # PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY: what pyarrow writes by default
_DICTIONARY_PAGE = 2
_COMPRESSIONS = ("UNCOMPRESSED", "ZSTD", "SNAPPY", "GZIP", "BROTLI")
# Numbers of fields in the header of a page (parquet.thrift), and types of Thrift's compact protocol.
_TYPE, _UNCOMPRESSED, _COMPRESSED = 1, 2, 3
# By type of page (DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2): the field of its struct, and of the encoding in that.
_PAGE_DETAILS = {0: (5, 2), 2: (7, 2), 3: (8, 4)}
_TRUE, _FALSE, _I16, _I32, _I64, _BINARY, _STRUCT = 1, 2, 4, 5, 6, 8, 12


class Limits(NamedTuple):
    """What a table may take at most."""

    rows: int  # exactly: those that follow from the spec
    value_bytes: int  # of all its values in memory
    text_bytes: int  # of one text


def read_table(data: bytes | NDArray[np.uint8], schema: pa.Schema, limits: Limits, name: str) -> pa.Table:
    """The table in a Parquet file, with `schema` and within `limits`.

    Raises StoreError with the file's `name` if it is another table, uses other encodings than nfm writes, or would take
    more memory. No thread of Arrow is started: a process that ends soon after would be aborted, in every second case on
    one core ("terminate called without an active exception", pyarrow 26), and one that forks could hang.
    """
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    try:
        _check_footer(view, name)
        texts = [field.name for field in schema if pa.types.is_string(field.type)]
        parquet = pq.ParquetFile(
            pa.BufferReader(pa.py_buffer(view)),
            pre_buffer=False,
            thrift_string_size_limit=MAX_FOOTER_BYTES,
            thrift_container_size_limit=_MAX_LIST,
        )
        metadata = parquet.metadata
        if metadata.num_rows != limits.rows:
            raise StoreError(f"{name}: got {metadata.num_rows} rows, expected the {limits.rows} of the spec")
        if not parquet.schema_arrow.equals(schema):
            raise StoreError(f"{name}: got other columns than expected; the file is of another version")
        _check_pages(view, metadata, limits, name)
        table = parquet.read(use_threads=False)
        table.validate(full=True)
        if table.num_rows != limits.rows:  # whatever the metadata said
            raise StoreError(f"{name}: got {table.num_rows} rows, expected the {limits.rows} of the spec")
        longest = max((pc.max(pc.binary_length(table[text])).as_py() or 0 for text in texts), default=0)
        if longest > limits.text_bytes:
            raise StoreError(f"{name}: got a text of {longest} bytes, expected at most {limits.text_bytes}")
    except (pa.ArrowException, OSError, UnicodeDecodeError, IndexError) as error:
        raise StoreError(f"{name}: not a Parquet file that nfm wrote: {error or type(error).__name__}") from error
    if table.nbytes > limits.value_bytes:
        raise StoreError(f"{name}: got {table.nbytes} bytes of values, expected at most {limits.value_bytes}")
    return table


def _check_footer(data: memoryview, name: str) -> None:
    """Raise StoreError unless the footer is within the file and not too large."""
    size = int.from_bytes(data[-8:-4], "little") if len(data) >= 12 else 0
    if bytes(data[-4:]) != b"PAR1" or not 0 < size <= min(MAX_FOOTER_BYTES, len(data) - 12):
        raise StoreError(f"{name}: not a Parquet file that nfm wrote: got a footer of {size} bytes")


def _check_pages(data: memoryview, metadata: pq.FileMetaData, limits: Limits, name: str) -> None:
    """Raise StoreError unless the pages of all columns are within the file, apart from each other, and within `limits`,
    by their own headers: those say how much a reader allocates."""
    num_bytes = num_pages = 0
    remaining_texts = limits.rows * metadata.num_columns  # a dictionary has no more of them than its column has rows
    chunks = sorted(_iterate_chunks(metadata))
    if chunks and not 0 < chunks[0][0] <= max(stop for _, stop in chunks) <= len(data):
        raise StoreError(f"{name}: a column lies outside the file")
    if any(stop > next_start for (_, stop), (next_start, _) in pairwise(chunks)):
        raise StoreError(f"{name}: got columns that share bytes of the file; the file is not one that nfm wrote")
    for group_number in range(metadata.num_row_groups):
        group = metadata.row_group(group_number)
        for column_number in range(group.num_columns):
            column = group.column(column_number)
            num_values = 0
            for page in _iterate_pages(data, *_extent(column)):
                num_pages += 1
                if num_pages > MAX_PAGES:
                    raise StoreError(f"{name}: got more than {MAX_PAGES} pages; the file is not one that nfm wrote")
                if page.is_dictionary and column.physical_type == "BYTE_ARRAY":
                    texts = _iterate_texts(data, page, column.compression, limits.text_bytes, name)
                    remaining_texts -= sum(1 for _ in islice(texts, remaining_texts + 1))
                    if remaining_texts < 0:
                        raise StoreError(f"{name}: got more texts in dictionaries than rows")
                if page.encoding not in _ENCODINGS:
                    raise StoreError(f"{name}: column {column.path_in_schema} has an encoding that nfm does not write")
                num_bytes += max(page.uncompressed_bytes, page.compressed_bytes)
                num_values += page.values
                # A value takes at least two bytes in memory, as bits of its level or index alone do in the file.
                if num_bytes > limits.value_bytes or 2 * num_values > limits.value_bytes:
                    raise StoreError(f"{name}: got more than {limits.value_bytes} bytes of values")


def _iterate_chunks(metadata: pq.FileMetaData) -> Iterator[tuple[int, int]]:
    """Start and end in the file of each column in each group of rows."""
    for group_number in range(metadata.num_row_groups):
        group = metadata.row_group(group_number)
        for column_number in range(group.num_columns):
            yield _extent(group.column(column_number))


def _extent(column: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """Start and end in the file of a column in a group of rows. Raises IndexError if it ends before it starts."""
    start = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        start = min(start, column.dictionary_page_offset)
    if column.total_compressed_size < 0:
        raise IndexError(f"got {column.total_compressed_size} bytes of column {column.path_in_schema}")
    return start, start + column.total_compressed_size


def _iterate_texts(data: memoryview, page: "_Page", compression: str, max_bytes: int, name: str) -> Iterator[int]:
    """The length of each text in a dictionary. Raises StoreError if one is longer than `max_bytes`: any number of rows
    may have it, at no cost in the file."""
    if page.uncompressed_bytes > MAX_DICTIONARY_BYTES:
        raise StoreError(
            f"{name}: got a dictionary of {page.uncompressed_bytes} bytes, expected at most {MAX_DICTIONARY_BYTES}"
        )
    content = data[page.start : page.start + page.compressed_bytes]
    if compression not in _COMPRESSIONS:
        raise StoreError(f"{name}: got compression {compression}, expected one of {', '.join(_COMPRESSIONS)}")
    if compression != "UNCOMPRESSED":
        content = memoryview(pa.decompress(content, page.uncompressed_bytes, compression.lower()))
    position = 0
    while position < len(content):  # each text follows its length in four bytes
        length = int.from_bytes(content[position : position + 4], "little")
        if length > max_bytes:
            raise StoreError(f"{name}: got a text of {length} bytes, expected at most {max_bytes}")
        yield length
        position += 4 + length


class _Page(NamedTuple):
    """The header of a page, and where its content starts."""

    is_dictionary: bool
    start: int
    uncompressed_bytes: int
    compressed_bytes: int
    values: int  # 0 of a dictionary
    encoding: int


def _iterate_pages(data: memoryview, start: int, stop: int) -> Iterator[_Page]:
    """The headers of the pages of a column, which lie one after another. Raises IndexError if one is no header."""
    position = start
    while position < stop:
        reader = _CompactReader(data[:stop], position)
        header = reader.read_struct()
        kind = header.get(_TYPE, -1)
        struct_field, encoding_field = _PAGE_DETAILS.get(kind, (0, 0))
        details = header.get(struct_field)
        uncompressed_bytes, compressed_bytes = header.get(_UNCOMPRESSED, -1), header.get(_COMPRESSED, -1)
        if not isinstance(details, dict) or min(uncompressed_bytes, compressed_bytes, details.get(1, -1)) < 0:
            raise IndexError(f"no header of a page at byte {position}")
        yield _Page(
            is_dictionary=kind == _DICTIONARY_PAGE,
            start=reader.position,
            uncompressed_bytes=uncompressed_bytes,
            compressed_bytes=compressed_bytes,
            values=0 if kind == _DICTIONARY_PAGE else details[1],
            encoding=details.get(encoding_field, -1),
        )
        position = reader.position + compressed_bytes


class _CompactReader:
    """Reads structs of Thrift's compact protocol. Raises IndexError where the bytes end, or are no such struct with
    numbers alone."""

    def __init__(self, data: memoryview, position: int) -> None:
        self.data, self.position = data, position
        self.num_fields = 0

    def read_struct(self, depth: int = 0) -> dict[int, Any]:
        """The fields by their numbers: integers, and structs as dicts; others are left out."""
        if depth > 8:
            raise IndexError("structs are nested too deep")
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != 0:
            step, kind = head >> 4, head & 15
            self.num_fields += 1
            if self.num_fields > _MAX_FIELDS:
                raise IndexError(f"got more than {_MAX_FIELDS} fields in the header of a page")
            number = number + step if step else self._integer()
            if kind in (_I16, _I32, _I64):
                fields[number] = self._integer()
            elif kind == _STRUCT:
                fields[number] = self.read_struct(depth + 1)
            elif kind == _BINARY:
                self._skip(self._varint())
            elif kind not in (_TRUE, _FALSE):
                raise IndexError(f"got a field of type {kind}, which no header of a page has")
        return fields

    def _byte(self) -> int:
        self._skip(1)
        return self.data[self.position - 1]

    def _skip(self, num_bytes: int) -> None:
        self.position += num_bytes
        if self.position > len(self.data):
            raise IndexError("the header of a page is cut off")

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise IndexError("got a number of more than ten bytes")

    def _integer(self) -> int:
        """A zigzag number."""
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
