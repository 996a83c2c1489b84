"""Parts of messages."""

from collections.abc import Iterable, Sequence

MAX_NUMBERS = 20  # that a message names
MAX_FIELDS = 4


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 block", "2 blocks"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def list_numbers(numbers: Iterable[int]) -> str:
    """Numbers in order: "1, 4"; of many the first ones, and how many more there are."""
    return _list_first([str(number) for number in sorted(numbers)], MAX_NUMBERS, ", ")


def list_fields(fields: Sequence[str]) -> str:
    """Phrases about fields of a document: "rows: existing 3, requested 4; …"; of many the first ones, and how many more
    there are."""
    return _list_first(fields, MAX_FIELDS, "; ")


def _list_first(texts: Sequence[str], most: int, separator: str) -> str:
    more = len(texts) - most
    end = f" and {more} more" if more > 0 else ""
    return separator.join(texts[:most]) + end
