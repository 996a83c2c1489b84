"""The error that every fault of a store ends in."""


class StoreError(ValueError):
    """A store is missing, broken, or not what the caller asked for. The message says what was got and what to do."""
