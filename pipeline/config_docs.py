"""The config as text: a commented TOML file with the values of a run, and the page docs/config.md.

Both are generated from the field descriptions of the sections. `python -m nfm.pipeline.config_docs > docs/config.md`
writes the page.
"""

import textwrap
from collections.abc import Mapping

import tomlkit
from tomlkit.items import Item, Table

from nfm.pipeline.config import Config
from nfm.pipeline.config_keys import Key, list_keys, subsection_type, walk_subsections
from nfm.stages.section import Section
from nfm.storage_specs.storage.text import escape

COMMENT_WIDTH = 100  # characters in a line of a comment

TOML_HEADER = """\
The settings of a run: every key with its meaning, the values that it takes, and its default.
A required key must be set. A key behind a # is unset: remove the # and write a value to set it.
Save this as a file, change what you need, and give it to any command: --preset file.toml."""

PAGE_HEADER = """\
# The config

<!-- Generated: python -m nfm.pipeline.config_docs > docs/config.md -->

A run is described by one config with a section for each stage. `--preset` names a shipped preset or a TOML file, and
`--set section.key=value` overrides one key of it; both may be given to every stage.

```
nfm config --preset cifar10 > mine.toml
nfm train-teacher --preset mine.toml --set teacher.train.lr=1e-4 --samples … --out …
```

`nfm config` prints all keys with their values in the preset, and the text of this page as comments. `--dry-run`
after any stage prints the same, with options such as `--draws` applied, and runs nothing; options that
are otherwise required, such as `--samples` and `--out`, may be left out. Both print `***` in place of values of
`storage.options` that may be secrets, and nfm refuses to read that back. The section `storage` is recorded in no
checkpoint, store or report.

A required key must be in the preset. A key whose default is "unset" has no value unless one is given.
Numbers are finite.
"""


def config_toml(config: Config) -> str:
    """A TOML file that `load_config` reads as the same config, with the meaning of every key as comments.

    Only options of storage that may be secrets are not in it; `load_config` refuses what stands in their place.
    """
    config = config.model_copy(update={"storage": config.storage.without_secrets()})
    document = tomlkit.document()
    for line in TOML_HEADER.splitlines():
        document.add(tomlkit.comment(line))
    document.add(tomlkit.nl())
    _add_section(document, config)
    lines = tomlkit.dumps(document).rstrip().split("\n")
    return "\n".join(map(escape, lines)) + "\n"  # TOML reads \u202e in a string as the character that it stands for


def _add_section(table: tomlkit.TOMLDocument | Table, section: Section) -> None:
    """Adds the keys of a section to a table, then its subsections, in the order that TOML asks for."""
    for key in list_keys(type(section)):
        for line in _comment_lines(key):
            table.add(tomlkit.comment(line))
        value = getattr(section, key.name)
        if value is None:
            table.add(tomlkit.comment(f"{key.name} ="))
        else:
            table.add(key.name, _toml_item(value))
        table.add(tomlkit.nl())
    for name, field in type(section).model_fields.items():
        if subsection_type(type(section), name) is not None:
            subtable = tomlkit.table()
            subtable.add(tomlkit.comment(str(field.description)))
            subtable.add(tomlkit.nl())
            _add_section(subtable, getattr(section, name))
            table.add(name, subtable)


def _comment_lines(key: Key) -> list[str]:
    default = "required" if key.required else f"default: {_format_default(key)}"
    lines = [*textwrap.wrap(key.meaning, COMMENT_WIDTH), f"{key.values}; {default}"]
    if key.grammar is not None:
        lines += textwrap.indent(key.grammar, "  ").splitlines()
    return lines


def _format_default(key: Key) -> str:
    return "unset" if key.default is None else _toml_item(key.default).as_string()


def _toml_item(value: object) -> Item:
    """A value as TOML on one line: tomlkit alone would write tables, and arrays of them, over several."""
    if isinstance(value, Mapping):
        table = tomlkit.inline_table()
        for name, inner in value.items():
            table.add(name, _toml_item(inner))
        return table
    if isinstance(value, list | tuple):
        array = tomlkit.array()
        for inner in value:
            array.append(_toml_item(inner))
        return array
    return tomlkit.item(value)


def config_page() -> str:
    """The text of docs/config.md: a table for each section, and the grammars of the names."""
    parts = [PAGE_HEADER]
    for subsection in walk_subsections(Config):
        keys = list_keys(subsection.section)
        rows = ["| key | meaning | values | default |", "| --- | --- | --- | --- |"]
        for key in keys:
            default = "required" if key.required else _format_default(key)
            rows.append(f"| `{key.name}` | {key.meaning} | {key.values} | {default} |")
        parts.append(f"## [{subsection.path}]\n\n{subsection.meaning}\n\n" + "\n".join(rows) + "\n")
        with_grammar = [key for key in keys if key.grammar is not None]
        parts += [f"`{subsection.path}.{key.name}`:\n\n```\n{key.grammar}\n```\n" for key in with_grammar]
    return "\n".join(parts)


if __name__ == "__main__":
    print(config_page(), end="")
