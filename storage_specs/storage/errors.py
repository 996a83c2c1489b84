"""The error that every fault of a store ends in."""


class StoreError(ValueError):
    """A store is missing, broken, or not what the caller asked for. The message says what was got and what to do."""


class StorageError(StoreError):
    """Storage cannot be reached, or refuses. It says nothing about what is stored there."""


class OutageError(StorageError):
    """Storage was away for longer than anything waits: the same command continues once it answers."""
