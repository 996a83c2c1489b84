"""JSON documents: strict models, checked on reading; canonical bytes; seals; and in what two of them differ."""

import hashlib
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from nfm.storage_specs.storage.errors import StoreError


class StrictModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def canonical_json(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def sealed_json(value: dict[str, Any]) -> bytes:
    """A document with the sha256 of itself, for files that no other file vouches for."""
    return canonical_json(value | {"sha256": hashlib.sha256(canonical_json(value)).hexdigest()})


T = TypeVar("T", bound=StrictModel)


def parse_json(model: type[T], data: bytes, name: str) -> T:
    """`data` as `model`, or a StoreError that names the file and the first field that is wrong."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise StoreError(f"{name}: {where}: {first['msg']}; the file is damaged or of another version") from error


def parse_sealed_json(model: type[T], data: bytes, name: str) -> T:
    """What `sealed_json` wrote, or a StoreError that names the file."""
    try:
        value = json.loads(data)
        digest = value.pop("sha256")
        whole = digest == hashlib.sha256(canonical_json(value)).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise StoreError(f"{name}: it is not what was written there; the file is damaged")
    return parse_json(model, canonical_json(value), name)


def list_differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two specs differ, as `path: theirs → ours`."""
    found: list[str] = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += list_differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} is {_short(b)} there and {_short(a)} here")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
