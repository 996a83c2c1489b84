"""JSON documents: strict models that are checked on reading, one canonical spelling, and a sha256 inside a document."""

import hashlib
import json
import math
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from nfm.storage_specs.storage.errors import StoreError

MAX_VALUE_LENGTH = 60  # characters of a value in a message
# Of a document. A million classes have two million values, the record of a unit of 65,536 draws 131,000 objects.
MAX_VALUES = 3_000_000
MAX_CONTAINERS = 300_000  # lists and objects
MAX_DEPTH = 64
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class StrictModel(BaseModel):
    """Base of all documents: immutable, without conversion between types, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


T = TypeVar("T", bound=StrictModel)


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys, one-space indent and ASCII only: equal values give equal bytes. NaN and infinity raise
    ValueError."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"got {constant}, which is no JSON")


def _parse_finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"got {text[:MAX_VALUE_LENGTH]}, which is too large a number")
    return value


def _strip_strings(data: bytes) -> bytes:
    """What is left of a document without its strings, but for one quotation mark of each."""
    characters = np.frombuffer(data.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    quotes_before = np.cumsum(characters == ord('"'), dtype=np.uint8)  # modulo 256; odd inside a string
    outside: NDArray[np.uint8] = characters[quotes_before % 2 == 0]
    return outside.tobytes()


def _check_structure(structure: bytes) -> None:
    """Raise ValueError if a document, of which the strings are left out, is nested too deep or has too many values:
    they take up to 50 times the memory of their text, and as much again while a model is made of them."""
    if structure.count(b",") > MAX_VALUES:
        raise ValueError(f"got more than {MAX_VALUES} values")
    brackets = structure.translate(None, delete=_NO_BRACKETS)
    if len(brackets) > 2 * MAX_CONTAINERS:
        raise ValueError(f"got more than {MAX_CONTAINERS} lists and objects")
    steps = np.where(np.isin(np.frombuffer(brackets, np.uint8), np.frombuffer(b"[{", np.uint8)), 1, -1)
    if np.cumsum(steps).max(initial=0) > MAX_DEPTH:
        raise ValueError(f"got lists and objects nested more than {MAX_DEPTH} deep")


def _count_keys(value: Any) -> int:
    """The number of members of all objects in a JSON value."""
    count, remaining = 0, [value]
    while remaining:
        container = remaining.pop()
        if isinstance(container, dict):
            count += len(container)
            container = container.values()
        remaining += [item for item in container if isinstance(item, (dict, list))]
    return count


def load_json(data: bytes, name: str) -> Any:
    """The value of a JSON document (RFC 8259, in UTF-8) that anybody may have written.

    Raises StoreError with the file's `name` if it is none, has a key twice in an object (of which readers take one or
    the other), a number that is not finite, or more or deeper nested values than any document of this project.
    """
    try:
        structure = _strip_strings(data)
        _check_structure(structure)
        value = json.loads(data.decode(), parse_constant=_refuse_constant, parse_float=_parse_finite)
        if isinstance(value, (dict, list)) and _count_keys(value) != structure.count(b":"):
            raise ValueError("got a key twice in one object")
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{name}: not a JSON document: {error}; the file is damaged") from error
    return value


def parse_json(model: type[T], data: bytes, name: str) -> T:
    """The document in `data`, checked against `model`. Raises StoreError with the file's `name` as `load_json` does, or
    with the first wrong field."""
    load_json(data, name)  # its value is not validated, as strict models take other types from Python than from JSON
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise StoreError(f"{name}: {_first_mistake(error)}; the file is damaged or of another version") from error


def _first_mistake(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "document"
    return f"{field}: {first['msg']}"


def make_document(model: type[T], values: dict[str, Any], name: str) -> T:
    """The document with these values. Raises StoreError with the `name` of what it is for and the first wrong value."""
    try:
        return model(**values)
    except ValidationError as error:
        raise StoreError(f"{name}: {_first_mistake(error)}") from error


def sealed_json(value: dict[str, Any]) -> bytes:
    """Canonical JSON of `value` with an extra key "sha256", the hash of `value` itself. It is for files whose hash no
    other file holds."""
    return canonical_json(value | {"sha256": hashlib.sha256(canonical_json(value)).hexdigest()})


def parse_sealed_json(model: type[T], data: bytes, name: str) -> T:
    """The document that `sealed_json` wrote, checked against its own sha256 and against `model`.

    Raises StoreError with the file's `name` if either does not match.
    """
    value = load_json(data, name)
    digest = value.pop("sha256", None) if isinstance(value, dict) else None
    content = canonical_json(value)
    del value  # it may be large
    if digest != hashlib.sha256(content).hexdigest():
        raise StoreError(f"{name}: its sha256 is not the one that it states; the file is damaged")
    return parse_json(model, content, name)


def list_differences(requested: dict[str, Any], existing: dict[str, Any], prefix: str = "") -> list[str]:
    """One phrase for each field in which two JSON documents differ, such as "data.rows: existing 70, requested 71"."""
    differences: list[str] = []
    for key in sorted(requested.keys() | existing.keys()):
        requested_value, existing_value = requested.get(key), existing.get(key)
        if isinstance(requested_value, dict) and isinstance(existing_value, dict):
            differences += list_differences(requested_value, existing_value, f"{prefix}{key}.")
        elif requested_value != existing_value:
            existing_json, requested_json = _shortened_json(existing_value), _shortened_json(requested_value)
            differences.append(f"{prefix}{key}: existing {existing_json}, requested {requested_json}")
    return differences


def _shortened_json(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= MAX_VALUE_LENGTH else text[: MAX_VALUE_LENGTH - 3] + "…"
