"""The errors of stores and of the storage that holds them."""


class StoreError(ValueError):
    """A store is missing, broken, or not what the caller asked for. The message says what was got and what to do."""


class UnsupportedError(StoreError):
    """A store is of a schema or kind that only a later nfm knows. This says nothing against it."""


class StorageError(StoreError):
    """Storage cannot be reached or refuses access. This says nothing about the files that it holds."""


class OutageError(StorageError):
    """Storage did not answer for RETRY_SECONDS. The same command continues once it answers again."""
