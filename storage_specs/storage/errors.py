"""The errors of stores and of the storage that holds them."""

from nfm.storage_specs.storage.text import shown

MAX_LINE = 4000  # characters of a line of an error


class ShownError(ValueError):
    """An error whose message a person reads: one line, or one for each of its `lines`, all of them `shown`."""

    def __init__(self, *lines: str) -> None:
        super().__init__(*(_shorten(shown(line)) for line in lines))

    def __str__(self) -> str:
        return "\n  ".join(self.args)


def _shorten(line: str) -> str:
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}…"


class StoreError(ShownError):
    """A store is missing, broken, or not what the caller asked for. The message says what was got and what to do."""


class UnsupportedError(StoreError):
    """A store is of a schema or kind that only a later nfm knows. This says nothing against it."""


class StorageError(StoreError):
    """Storage cannot be reached or refuses access. This says nothing about the files that it holds."""


class OutageError(StorageError):
    """Storage did not answer for RETRY_SECONDS. The same command continues once it answers again."""
