"""What nfm prints on stdout, and tracebacks of its own mistakes: every line as it may be shown (see `shown`)."""

import io
import logging
import sys
import threading
import traceback
from types import TracebackType

import click

from nfm.stages.progress import print_line
from nfm.storage_specs.storage.text import shown


def echo(*lines: str) -> None:
    """Print lines on stdout. A line break inside one of them is shown as a space."""
    for line in lines:
        click.echo(shown(line))


def guard_output() -> None:
    """Make what Python itself prints in this process as safe to look at as what nfm prints: tracebacks and log messages
    of libraries. Characters that the encoding of stdout does not have are escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.excepthook = _print_traceback
    threading.excepthook = lambda failure: _print_traceback(failure.exc_type, failure.exc_value, failure.exc_traceback)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_ShownFormatter())


def _print_traceback(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    for line in "".join(traceback.format_exception(kind, error, trace)).splitlines():
        print_line(line)


class _ShownFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(shown(line) for line in super().format(record).splitlines())
