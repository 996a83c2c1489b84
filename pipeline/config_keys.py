"""What each key of the config means and which values it takes, read from the declarations of the sections."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nfm.stages.section import Section

BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}  # by JSON Schema's names


@dataclass(frozen=True)
class Key:
    """One key of a section."""

    name: str
    meaning: str  # its description
    values: str  # the values that it takes: "number > 0", "1 or 3", "array, each string"
    required: bool  # whether every preset must have it
    default: Any  # None where it is unset by default, or required
    grammar: str | None  # several lines, for a key whose strings have one


@dataclass(frozen=True)
class Subsection:
    """A section inside another one."""

    path: str  # "student.train"
    meaning: str
    section: type[Section]


def list_keys(section: type[Section]) -> list[Key]:
    """The keys of a section in their order, without its subsections."""
    schema = section.model_json_schema()
    keys = []
    for name, field in section.model_fields.items():
        if subsection_type(section, name) is None:
            described = schema["properties"][name]
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            keys.append(
                Key(
                    name=name,
                    meaning=described["description"],
                    values=describe_values(described),
                    required=field.is_required(),
                    default=default,
                    grammar=described.get("grammar"),
                )
            )
    return keys


def subsection_type(section: type[Section], name: str) -> type[Section] | None:
    """The type of the subsection `name`; None for a key that holds a value, and for an unknown name."""
    field = section.model_fields.get(name)
    if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, Section):
        return field.annotation
    return None


def walk_subsections(section: type[Section], prefix: str = "") -> Iterator[Subsection]:
    """Every section inside a section, each followed by those inside it."""
    for name, field in section.model_fields.items():
        inner = subsection_type(section, name)
        if inner is not None:
            yield Subsection(f"{prefix}{name}", str(field.description), inner)
            yield from walk_subsections(inner, f"{prefix}{name}.")


def describe_values(schema: dict[str, Any]) -> str:
    """The values that a JSON Schema allows, in words: "integer ≥ 1 and ≤ 65536"."""
    if "anyOf" in schema:  # a key that may be unset: the other choice is null
        (schema,) = (choice for choice in schema["anyOf"] if choice != {"type": "null"})
    if "enum" in schema:
        return " or ".join(json.dumps(choice) for choice in schema["enum"])
    if "prefixItems" in schema:
        items = schema["prefixItems"]
        return f"array of {len(items)}, each {describe_values(items[0])}"
    if schema["type"] == "array":
        return f"array, each {describe_values(schema['items'])}"
    if schema["type"] == "object":
        return "table"
    bounds = " and ".join(f"{sign} {schema[bound]}" for bound, sign in BOUNDS.items() if bound in schema)
    return f"{schema['type']} {bounds}".rstrip()
