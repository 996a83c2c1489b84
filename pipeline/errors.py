"""Errors of the pipeline."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from nfm.stages.errors import ResumableError
from nfm.storage_specs.storage.errors import ShownError

P = ParamSpec("P")
T = TypeVar("T")


class ConfigError(ShownError):
    """A preset or an override does not describe a run. The message names every key that is missing or wrong, each on a
    line of its own."""


class InterruptedRunError(ResumableError):
    """Ctrl-C ended a run that the same command continues."""


def continues_when_repeated(command: Callable[P, T]) -> Callable[P, T]:
    """Marks a command that continues where it stopped when it is run again: Ctrl-C raises InterruptedRunError."""

    @functools.wraps(command)
    def wrapped(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return command(*arguments, **options)
        except KeyboardInterrupt as error:
            raise InterruptedRunError("interrupted") from error

    return wrapped
