"""Progress: a bar where one can be drawn, plain lines elsewhere, and no silence while one call takes long."""

import fcntl
import io
import os
import pty
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from types import SimpleNamespace

import pytest

import nfm.stages.progress as module
from nfm.stages.progress import Progress, count_calls, format_duration, is_live_terminal
from tests.tools.waiting import wait_for


@contextmanager
def terminal(rows: int, columns: int) -> Iterator[list[bytes]]:
    """stderr as a terminal of this size; gives a list that holds what was written to it once the block has ended."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    written: list[bytes] = []
    with os.fdopen(reader, "rb", buffering=0) as output:
        with os.fdopen(writer, "w") as stream, redirect_stderr(stream):
            yield written
        with suppress(OSError):  # which is how a terminal that nobody writes to any more ends
            while part := output.read(1 << 16):
                written.append(part)


def wait_for_text(stream: io.StringIO, text: str) -> None:
    wait_for(lambda: text in stream.getvalue(), f"{text!r} on stderr")


@pytest.fixture
def frozen_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """All work takes 0 s."""
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 0.0))


def test_a_terminal_is_live_only_with_a_size() -> None:
    with redirect_stderr(io.StringIO()):
        assert not is_live_terminal()
    for rows, columns, expected in ((24, 80, True), (0, 0, False), (24, 0, False), (0, 80, False)):
        with terminal(rows, columns):
            assert is_live_terminal() is expected


def test_a_terminal_with_a_size_shows_a_bar() -> None:
    with (
        terminal(24, 80) as written,
        Progress("work", 2, "image") as progress,
        progress.step("part", 3, "batch") as part,
    ):
        part.advance(1)
        progress.advance(2, "note")
    text = b"".join(written).decode()
    assert "work:   0%|" in text
    assert "part:   0%|" in text
    assert "100%" in text
    assert "\r" in text.replace("\r\n", "")


def test_a_terminal_of_size_0_shows_plain_lines(frozen_clock: None) -> None:
    with terminal(0, 0) as written, Progress("work", 2, "image") as progress:
        progress.advance(2, "loss 0.5")
    text = b"".join(written).decode()
    assert text == "work: 0/2 image, starting\r\nwork: 2/2 image, done in 0 s, loss 0.5\r\n"


def test_lines_go_on_while_one_call_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_LINE_SECONDS", 0.01)
    monkeypatch.setattr(module, "LINE_SECONDS", 0.01)
    with redirect_stderr(io.StringIO()) as stderr, Progress("train", 640, "image", done=64) as progress:
        progress.set_note("compiles the network")
        wait_for_text(stderr, " so far, compiles the network\n")
        progress.advance(64, "")
        with progress.step("validate", 8, "batch") as step:
            step.advance(2)
            wait_for_text(stderr, "train: 128/640 image; validate: 2/8 batch, ")
        wait_for_text(stderr, "train: 128/640 image, ")
    assert stderr.getvalue().startswith("train: 64/640 image, starting\n")


def test_work_without_a_count_is_shown_only_when_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    with redirect_stderr(io.StringIO()) as stderr:
        with Progress("read model.safetensors"):
            pass
        assert stderr.getvalue() == ""
        monkeypatch.setattr(module, "FIRST_LINE_SECONDS", 0.01)
        with Progress("read model.safetensors"):
            wait_for_text(stderr, " s so far\n")
    assert stderr.getvalue().startswith("read model.safetensors, ")


def test_other_ranks_show_nothing() -> None:
    with redirect_stderr(io.StringIO()) as stderr:
        with Progress("train", 4, "image", enabled=False) as progress, progress.step("validate", 2, "batch") as step:
            step.advance(2)
            progress.advance(4)
            progress.set_note("note")
        assert progress.done == 4
    assert stderr.getvalue() == ""


def test_an_error_ends_the_lines(frozen_clock: None) -> None:
    wrong = pytest.raises(ValueError, match="wrong")
    with redirect_stderr(io.StringIO()) as stderr, wrong, Progress("train", 4, "image"):
        raise ValueError("wrong")
    assert stderr.getvalue() == "train: 0/4 image, starting\n"


def test_bytes_are_shown_in_units_that_can_be_read(frozen_clock: None) -> None:
    with redirect_stderr(io.StringIO()) as stderr, Progress("verify", 123_000_000, "B") as progress:
        progress.advance(123_000_000)
    assert stderr.getvalue().splitlines()[1] == "verify: 123MB/123MB, done in 0 s"


def test_counted_calls() -> None:
    progress = Progress("sample", 3, "evaluation", enabled=False)
    double = count_calls(lambda x: 2 * x, progress)
    assert [double(x) for x in (1, 2, 3)] == [2, 4, 6]
    assert progress.done == 3


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3 s"), (180, "3 min"), (7200, "2.0 h"), (200 * 3600, "8 days"), (0, "0 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
