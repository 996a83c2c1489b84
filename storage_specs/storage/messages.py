"""Numbers in messages."""

from collections.abc import Iterable

MAX_LISTED = 20  # numbers that a message names


def count(number: int, noun: str) -> str:
    """A number with its noun, for messages: "1 block", "2 blocks"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def list_numbers(numbers: Iterable[int]) -> str:
    """Numbers in order, for messages; of many only the first ones."""
    ordered = sorted(numbers)
    listed = ", ".join(str(number) for number in ordered[:MAX_LISTED])
    more = len(ordered) - MAX_LISTED
    return f"{listed} and {more} more" if more > 0 else listed
