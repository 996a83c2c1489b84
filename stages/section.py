"""What every stage's part of the config has in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One part of the config: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ResumableError(Exception):
    """A run that was ended from outside, with nothing wrong: the same command continues it."""

    at_once = False  # whether to leave without the goodbyes of libraries, which would wait for what is gone


class StageError(ValueError):
    """A stage cannot run on what the user gave it. The message says what was got, what was expected and what to do."""
