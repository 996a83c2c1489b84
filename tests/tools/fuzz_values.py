"""Changes of the content of one file, by its format: JSON, tar, npy, Parquet, shards of Zarr, safetensors."""

import io
import json
import struct
import tokenize
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_MARK = "@@a marked place@@"
DEPTHS = (40, 150, 300, 5_000, 100_000)
# Text that must not reach a terminal, a page or a path as it is.
TEXTS = [
    *(
        "",
        " ",
        "x",
        "a\nerror: all good",
        "\x1b[31mred\x1b[0m",
        "\x1b]0;title\x07",
        "\x9b31m",
        "\u202egnp.exe",
        "\u2066",
    ),
    *("../outside", "/etc/passwd", "x\0y", "<script>alert(1)</script>", "[a](javascript:b)", "| | |\n|-|-|", "`x`"),
    *("\ud800", "𝟙𝟚", "١٢", "é" * 3000, "x" * 70_000, "-1", "nan", "1e5", "${HOME}", "{{7*7}}", "%s%n", "~", "a" * 64),
    *("\r", "\u2028", "\u200b", "ÿ", "𝕏", "null", "true", "s3://KEY:SECRET@host/x", "file:///etc/passwd", "a@v1", "*"),
]
NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 3, 7, 255, 1 << 16, 1 << 20, 1 << 31, (1 << 31) - 1, -(1 << 31), 1 << 40, 1 << 48, 1 << 53, 1 << 62),
    *((1 << 63) - 1, 1 << 63, 1 << 64, 10**12, 10**30, -(10**30), 0.0, -0.0, 0.5, 1.0, 1e-320, 1e-9, 1e9, 1e38, 1e300),
    *(float("nan"), float("inf"), -float("inf")),
]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], [None], {"": None}, [1, 2, 3], {"a": {"b": 1}}]
RAWS = ["1e999", "-1e999", "01", "1.", "+1", "0x10", "1_000", "'x'", "NaN", "9" * 5000, '"\\ud800"', '"\xff"']


JSON_OPERATIONS = (
    *("near", "near", "near", "number", "number", "other", "text", "text", "delete", "duplicate", "unknown", "raw"),
    *("nested", "swap", "spelling", "encoding", "key"),
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value: the object or list that holds it, and its key or index there."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])
    return found


def _nested(rng: Random) -> str:
    depth = rng.choice(DEPTHS)
    opened, closed = rng.choice([("[", "]"), ('{"a":', "}")])
    return opened * depth + ("1" if opened != "[" else "") + closed * depth


def _near(rng: Random, value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, value * 2, -value, value + (1 << 32), float(value), str(value)])
    if isinstance(value, float):
        return rng.choice([value * 1.0000001, -value, value * 1e30, value + 1, np.nextafter(value, 9).item()])
    if isinstance(value, str):
        return rng.choice([value.upper(), value[:-1], value + " ", value + "\n", value[::-1], value + "é", [value]])
    if isinstance(value, list):
        return rng.choice([value[:-1], value * 2, value[::-1], [*value, value[0] if value else 0]])
    if isinstance(value, dict):
        return dict(list(value.items())[1:])
    return 0


def mutate_json(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Change one place of a JSON document. Raises ValueError if it is none."""
    value = json.loads(data)
    places = _places(value)
    if not places:
        return b"[]", "empty"
    holder, key = rng.choice(places)
    old = holder[key]
    operation = rng.choice(JSON_OPERATIONS)
    raw: dict[str, str] = {}
    what = f"{operation} {key!r}"
    if operation == "near":
        holder[key] = _near(rng, old)
    elif operation in ("number", "other", "text"):
        holder[key] = rng.choice({"number": NUMBERS, "other": OTHERS, "text": TEXTS}[operation])
    elif operation == "delete":
        del holder[key]
    elif operation in ("duplicate", "unknown", "key") and isinstance(holder, dict):
        other = rng.choice([old, _near(rng, old), None])
        new_key = rng.choice(["x", "__class__", "schema_version", *TEXTS[:30]])
        if operation == "key":
            items = [(new_key if name == key else name, member) for name, member in holder.items()]
        else:
            added = (_MARK, other) if operation == "duplicate" else (new_key, other)
            items = [added, *holder.items()] if rng.random() < 0.5 else [*holder.items(), added]
            raw = {json.dumps(_MARK): json.dumps(key)}
        holder.clear()
        holder.update(items)
    elif operation == "swap":
        other_holder, other_key = rng.choice(places)
        holder[key], other_holder[other_key] = other_holder[other_key], json.loads(json.dumps(old))
    elif operation in ("raw", "nested", "duplicate", "unknown", "key"):
        holder[key] = _MARK
        raw = {json.dumps(_MARK): _nested(rng) if operation == "nested" else rng.choice(RAWS)}
    if operation not in ("spelling", "encoding"):
        what = f"{what}: {old!r:.30} → {holder.get(key) if isinstance(holder, dict) else holder!r:.60}"
    try:
        text = json.dumps(value, indent=1 if rng.random() < 0.5 else None)
    except (ValueError, RecursionError):  # a swap made a circle
        return data[:-3], "cut"
    for mark, replacement in raw.items():
        text = text.replace(mark, replacement, 1)
        what = f"{what} {replacement[:30]!r}"
    if operation == "encoding":
        encoding = rng.choice(["utf-16", "utf-8-sig", "utf-32", "utf-7"])
        return text.encode(encoding), f"encoding {encoding}"
    return text.encode("latin-1", "xmlcharrefreplace"), what


def mutate_bytes(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Cut, lengthen or flip bits of a file of any kind."""
    place = rng.randrange(len(data) + 1)
    operation = rng.choice(["flip", "flip", "flip", "cut", "longer", "zeros", "empty", "insert", "repeat", "noise"])
    if not data or operation == "empty":
        return b"", "empty"
    if operation == "flip":
        place = min(place, len(data) - 1)
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :], f"bit of byte {place}"
    changed = {
        "cut": lambda: data[:place],
        "longer": lambda: data + rng.randbytes(rng.choice([1, 8, 512, 1024, 10_240])),
        "zeros": lambda: data[:place] + bytes(len(data) - place),
        "insert": lambda: data[:place] + rng.randbytes(rng.choice([1, 4, 512])) + data[place:],
        "repeat": lambda: data * 2,
        "noise": lambda: rng.randbytes(len(data)),
    }[operation]()
    return changed, f"{operation} at {place}"


TAR_FIELDS = {"name": (0, 100), "mode": (100, 8), "size": (124, 12), "time": (136, 12), "check": (148, 8)}
TAR_FIELDS |= {"type": (156, 1), "link": (157, 100), "magic": (257, 8), "prefix": (345, 155)}
TAR_VALUES = [
    b"",
    b"0",
    b"1",
    b"2",
    b"5",
    b"L",
    b"x",
    b"77777777777",
    b"\x80" + b"\xff" * 11,
    b"../../outside/x",
    b"/etc/passwd",
]


def _mend_tar_checksum(data: bytearray, start: int) -> None:
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])


def mutate_tar(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Change a header, a label, a header of npy, values, padding, or the order of members in a tar of equal blocks."""
    changed, blocks = bytearray(data), len(data) // 512
    headers = [512 * i for i in range(blocks) if data[512 * i + 257 : 512 * i + 262] == b"ustar"]
    if not headers:
        return mutate_bytes(rng, data)
    start = rng.choice(headers)
    size = int(data[start + 124 : start + 135] or b"0", 8)
    body = start + 512
    operation = rng.choice(["field", "field", "label", "npy", "value", "value", "padding", "swap", "end", "member"])
    if operation == "field":
        name, (offset, length) = rng.choice(list(TAR_FIELDS.items()))
        changed[start + offset : start + offset + length] = rng.choice(TAR_VALUES)[:length].ljust(length, b"\0")
        if name != "check" and rng.random() < 0.7:
            _mend_tar_checksum(changed, start)
        operation = f"field {name}"
    elif operation == "label":
        labels = [header for header in headers if data[header : header + 100].rstrip(b"\0").endswith(b".cls")]
        if labels:
            value = rng.choice(
                [b"000000", b"000001", b"000099", b"-00001", b"1e0000", b"     1", b"00000\0", b"+00001"]
            )
            header = rng.choice(labels)
            changed[header + 512 : header + 518] = value
    elif operation == "npy" and data[body : body + 6] == b"\x93NUMPY":
        edits = [
            (b"<f2", b"|O8"),
            (b"False", b"True "),
            (b"NUMPY\x01", b"NUMPY\x02"),
            (b"'|u1'", b"'|i1'"),
            (b"(", b"["),
        ]
        old, new = rng.choice(edits)
        changed[body : body + size] = bytes(changed[body : body + size]).replace(old, new, 1)
    elif operation == "value" and size > 128:
        place = body + rng.randrange(128, size)
        changed[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", bytes(4), b"\x00\x7c\x00\x7c", rng.randbytes(4)])
    elif operation == "padding":
        changed[body + size : body + size + 1] = b"x"
    elif operation == "swap":
        other = rng.choice(headers)
        changed[start : start + 512], changed[other : other + 512] = (
            data[other : other + 512],
            data[start : start + 512],
        )
    elif operation == "end":
        changed[-512:] = rng.choice([b"", data[:512], bytes(1024)])
    else:
        changed[start:start] = data[start : body + size + -size % 512]
    return bytes(changed[: len(data)].ljust(len(data), b"\0") if rng.random() < 0.5 else changed), f"tar {operation}"


def mutate_npy(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Change the header or the values of an npy file."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, tokenize.TokenError):  # as NumPy reads headers
        return mutate_bytes(rng, data)
    operation = rng.choice(["value", "value", "small", "dtype", "shape", "fortran", "header", "scale"])
    if operation in ("value", "small", "scale") and array.size and array.dtype.kind == "f":
        array = array.copy()
        place = rng.randrange(array.size)
        value = array.flat[place]
        wrong = [np.nan, np.inf, -np.inf, 0, -1, 1e-45, 1e38, value * 2]
        new = {"value": rng.choice(wrong), "small": value * (1 + 1e-5), "scale": value}[operation]
        with np.errstate(all="ignore"):
            array.flat[place] = np.array(new).astype(array.dtype)
            array = array * array.dtype.type(1.001) if operation == "scale" else array
    elif operation == "dtype":
        with np.errstate(all="ignore"):
            array = array.astype(rng.choice(["<f8", ">f4", "<f2", "<i4", "<c8", "|b1", "<U4"]))
    elif operation == "shape":
        array = array.reshape(rng.choice([array.shape[::-1], (-1,), (1, *array.shape)]))
    elif operation == "fortran":
        array = np.asfortranarray(array)
    elif operation == "header":
        edits = [(b"NUMPY\x01", b"NUMPY\x03"), (b"'shape': (", b"'shape': (9"), (b"descr", b"descx"), (b" \n", b"\n ")]
        return data.replace(*rng.choice(edits), 1), "npy header"
    np.save(buffer := io.BytesIO(), array, allow_pickle=False)
    return buffer.getvalue(), f"npy {operation}"


def _parquet_value(rng: Random, value: Any) -> Any:
    if isinstance(value, list):  # label counts
        return rng.choice([[], [*value, (0, 1)], [(a, b + 1) for a, b in value], [(a + 1, b) for a, b in value], None])
    return rng.choice([_near(rng, value), None, rng.choice(NUMBERS), rng.choice(TEXTS)])


def mutate_parquet(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Change rows, columns, types or the encoding of a Parquet file. Where a value does not fit its column, bytes."""
    try:
        table = pq.read_table(io.BytesIO(data), use_threads=False)
    except (pa.ArrowException, OSError):
        return mutate_bytes(rng, data)
    operation = rng.choice(["value"] * 5 + ["rows", "rows", "column", "type", "rename", "encoding", "bytes"])
    options: dict[str, Any] = {"compression": "zstd"}
    what = f"parquet {operation}"
    try:
        rows, name = table.to_pylist(), rng.choice(table.column_names)
        place = table.column_names.index(name)
        if operation == "value" and rows:
            row = rng.choice(rows)
            row[name] = _parquet_value(rng, row[name])
            what = f"{what} {name} = {row[name]!r:.30}"
            table = pa.Table.from_pylist(rows, table.schema)
        elif operation == "rows":
            changes: list[Callable[[], list[Any]]] = [
                *(lambda: rows[:-1], lambda: [*rows, rows[-1]], lambda: rows[::-1], list),
                *(lambda: rows * 50, lambda: rng.sample(rows, len(rows))),
            ]
            table = pa.Table.from_pylist(rng.choice(changes)(), table.schema)
        elif operation == "column":
            extra = pa.array([None] * len(rows), pa.string())
            table = table.drop_columns([name]) if rng.random() < 0.5 else table.append_column("extra", extra)
        elif operation == "type":
            table = table.set_column(place, name, table[name].cast(rng.choice([pa.string(), pa.int64(), pa.binary()])))
        elif operation == "rename":
            names = list(table.column_names)
            names[place] = rng.choice(TEXTS[:20])
            table = table.rename_columns(names)
        elif operation == "encoding":
            options = rng.choice(
                [
                    {"compression": "none", "use_dictionary": False},
                    {"compression": "gzip", "row_group_size": 1},
                    {"compression": "snappy", "data_page_size": 1, "version": "1.0"},
                    {"compression": "brotli", "write_statistics": False},
                ]
            )
        else:
            return mutate_bytes(rng, data)
        pq.write_table(table, buffer := io.BytesIO(), **options)
    except (pa.ArrowException, TypeError, OverflowError, ValueError):
        return mutate_bytes(rng, data)
    return buffer.getvalue(), what


def mutate_shard(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Change a value, or the index of the chunks, or its checksum, in a shard of Zarr."""
    if len(data) < 24:
        return mutate_bytes(rng, data)
    changed, operation = bytearray(data), rng.choice(["value", "value", "index", "checksum", "bytes"])
    if operation == "value":
        place = rng.randrange(max(1, len(data) - 24))
        new = rng.choice([b"\xff" * 8, bytes(8), struct.pack("<q", -1), struct.pack("<q", 1), rng.randbytes(2)])
        changed[place : place + len(new)] = new
    elif operation == "index":
        place = len(data) - 20 + 8 * rng.randrange(2)
        changed[place : place + 8] = struct.pack("<Q", rng.choice([0, 1, len(data), 1 << 40, 1 << 63, (1 << 64) - 1]))
    elif operation == "checksum":
        changed[-4:] = rng.randbytes(4)
    else:
        return mutate_bytes(rng, data)
    return bytes(changed[: len(data)]), f"shard {operation}"


DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "X", ""]


def mutate_safetensors(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Change the header, the document in it, or the values of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    try:
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        names = [name for name in header if name != "__metadata__"]
        name = rng.choice(names)
        tensor = header[name]
    except (ValueError, IndexError, KeyError, TypeError):
        return mutate_bytes(rng, data)
    operation = rng.choice(
        ["document"] * 4 + ["values"] * 2 + ["dtype", "shape", "offsets", "name", "header", "length"]
    )
    operation = "bytes" if rng.random() < 0.1 else operation
    what = f"safetensors {operation} of {name}"
    if operation == "document":
        document, how = mutate_json(rng, header["__metadata__"]["nfm"].encode())
        header["__metadata__"]["nfm"] = document.decode("latin-1")
        what = f"safetensors document {how}"
    elif operation == "values":
        start, end = tensor["data_offsets"]
        place = start + 4 * rng.randrange(max(1, (end - start) // 4))
        word = rng.choice([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\x01\x00\x00\x00"])
        changed = bytearray(body)
        changed[place : place + 4] = word
        body = bytes(changed)
    elif operation == "dtype":
        tensor["dtype"] = rng.choice(DTYPES)
    elif operation == "shape":
        tensor["shape"] = rng.choice([[*tensor["shape"], 1], tensor["shape"][::-1], [], [0], [1 << 40, 1 << 40], [-1]])
    elif operation == "offsets":
        tensor["data_offsets"] = rng.choice([[0, 4], [0, len(body)], [4, 0], [-4, 0], [0, 1 << 62], [len(body)] * 2])
    elif operation == "name":
        header[rng.choice([*TEXTS[:12], "model", "model.x", f"{name}x"])] = header.pop(name)
    elif operation == "header":
        encoded, how = mutate_json(rng, json.dumps(header).encode())
        return len(encoded).to_bytes(8, "little") + encoded + body, f"safetensors header {how}"
    elif operation == "length":
        length = rng.choice([0, 1, size - 1, size + 1, len(data), 1 << 27, 1 << 40, (1 << 64) - 1])
        return length.to_bytes(8, "little") + data[8:], f"safetensors header of {length} bytes"
    else:
        return mutate_bytes(rng, data)
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + body, what
