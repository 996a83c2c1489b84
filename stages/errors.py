"""How a stage ends when it does not end well."""


class ResumableError(Exception):
    """A run that was ended from outside, with nothing wrong: the same command continues it."""

    at_once = False  # whether to leave without the goodbyes of libraries, which would wait for what is gone


class StageError(ValueError):
    """A stage cannot run on what the user gave it. The message says what was got, what was expected and what to do."""
