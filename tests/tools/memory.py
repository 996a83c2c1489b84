"""Running a function in a process of its own whose memory may grow by no more than a given number of bytes.

What counts is the peak that Linux itself records (VmHWM), so none is missed. The process is killed when it takes more.
Processes are forked from one that has imported this project, has no threads and has done nothing else.
"""

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

GIB = 1 << 30
WATCH_SECONDS = 0.005  # between two looks at the memory of the process
_PRELOADED = [
    "nfm.pipeline.cli",
    "nfm.stages.sample",
    "nfm.storage_specs.reading.stream",
    "nfm.storage_specs.reading.verify",
    "nfm.storage_specs.writing.transfer",
    "fsspec.implementations.http",
]


@dataclass(frozen=True)
class Outcome:
    """How a function ended."""

    error: str  # name of the exception's class, such as "StoreError"; "" if it returned, "killed" if it took too much
    is_value_error: bool  # whether the exception is of the family of errors that a user sees as one line
    message: str
    seconds: float
    grown_bytes: int  # the peak of its memory, less that at the start


def run_watched(function: Callable[..., object], *arguments: Any, max_bytes: int = GIB, timeout: float) -> Outcome:
    """Call a function of a module with these arguments in a process that may take `max_bytes` and `timeout` seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        assert receiver.poll(60), "the process did not start"
        initial_bytes = receiver.recv()
        start = time.monotonic()
        while not receiver.poll(WATCH_SECONDS):
            grown_bytes = peak_bytes(process.pid) - initial_bytes
            seconds = time.monotonic() - start
            if grown_bytes > max_bytes or seconds > timeout:
                process.kill()
                process.join()
                return Outcome("killed", False, "", seconds, grown_bytes)
        error, is_value_error, message, final_peak_bytes = receiver.recv()
        seconds, grown_bytes = time.monotonic() - start, final_peak_bytes - initial_bytes
        if grown_bytes > max_bytes:  # it ended before anybody looked
            return Outcome("killed", False, "", seconds, grown_bytes)
        return Outcome(error, is_value_error, message, seconds, grown_bytes)
    finally:
        process.join(10)
        receiver.close()


def _call(sender: Connection, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """In the process: call the function and send how it ended."""
    sender.send(forget_peak())
    error: BaseException | None = None
    try:
        function(*arguments)
    except BaseException as raised:
        error = raised
    name, message = (type(error).__name__, str(error)) if error else ("", "")
    sender.send((name, isinstance(error, ValueError), message, peak_bytes()))


def peak_bytes(pid: int | None = None) -> int:
    """What a process had in memory at most since it was started, or since `forget_peak`; 0 if the process is gone."""
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else 0


def forget_peak() -> int:
    """Make what this process has in memory now its peak, and return it in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()
