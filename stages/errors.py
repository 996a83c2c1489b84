"""The errors of stages."""

from nfm.storage_specs.storage.errors import ShownError


class ResumableError(Exception):
    """A run was ended from outside, as by a signal or a lost machine. The same command continues it."""

    # Whether the process exits without the cleanup of libraries, which would wait for a lost machine.
    skips_cleanup = False


class StageError(ShownError):
    """A stage cannot run on what the user gave it. The message says what was got, what was expected and what to do."""
