"""JSON documents: strict models that are checked on reading, one canonical spelling, and a sha256 inside a document."""

import hashlib
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from nfm.storage_specs.storage.errors import StoreError

MAX_VALUE_LENGTH = 60  # characters of a value in a message


class StrictModel(BaseModel):
    """Base of all documents: immutable, without conversion between types, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


T = TypeVar("T", bound=StrictModel)


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys, one-space indent and ASCII only: equal values give equal bytes. NaN and infinity raise
    ValueError."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


class _ConstantError(ValueError):
    """A number that JSON does not have."""


def _refuse_constant(constant: str) -> None:
    raise _ConstantError(constant)


def parse_json(model: type[T], data: bytes, name: str) -> T:
    """The document in `data`, checked against `model`.

    Raises StoreError with the file's `name` and the first wrong field. NaN and infinity, which are no JSON, are refused
    also where the model takes any value.
    """
    try:
        if b"NaN" in data or b"Infinity" in data:  # else there is no need to look
            json.loads(data, parse_constant=_refuse_constant)
        return model.model_validate_json(data)
    except _ConstantError as error:
        raise StoreError(f"{name}: got {error}, which is no JSON; the file is damaged") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "document"
        raise StoreError(f"{name}: {field}: {first['msg']}; the file is damaged or of another version") from error


def sealed_json(value: dict[str, Any]) -> bytes:
    """Canonical JSON of `value` with an extra key "sha256", the hash of `value` itself. It is for files whose hash no
    other file holds."""
    return canonical_json(value | {"sha256": hashlib.sha256(canonical_json(value)).hexdigest()})


def parse_sealed_json(model: type[T], data: bytes, name: str) -> T:
    """The document that `sealed_json` wrote, checked against its own sha256 and against `model`.

    Raises StoreError with the file's `name` if either does not match.
    """
    try:
        value = json.loads(data)
        digest = value.pop("sha256")
        intact = digest == hashlib.sha256(canonical_json(value)).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise StoreError(f"{name}: its sha256 is not the one that it states; the file is damaged")
    return parse_json(model, canonical_json(value), name)


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
