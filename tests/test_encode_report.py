"""What the encode job shows: rates from the first pair on, and no long silence."""

import fcntl
import os
import struct
import sys
import termios
from types import SimpleNamespace

import pytest

from nfm.pipeline import encode_report
from nfm.pipeline.encode_report import EncodeProgress, Summary, describe
from nfm.storage_specs.reading.store import Store
from tests.tools.small_run import Run
from tests.tools.waiting import wait_for


class Clock:
    """A clock that tests move on."""

    seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that encode_report sees."""
    clock = Clock()
    monkeypatch.setattr(encode_report, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def test_a_rate_before_the_first_unit_is_done(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """4 units of 100 pairs; the first worker comes after 7 s, and 3 s later it has done 30 pairs of its first unit."""
    progress = EncodeProgress(as_json=False)
    progress.set_status("waiting for the first worker")
    progress.add_units(4, pairs=400)
    progress.update(0, 0, pairs_in_flight=0)
    clock.seconds += 7
    progress.update(1, 0, pairs_in_flight=0)
    clock.seconds += 3
    progress.update(1, 0, pairs_in_flight=30)
    assert capsys.readouterr().err.splitlines() == [
        "encode: waiting for the first worker",
        "encode: 0/4 units, 1 worker, 0 retries",
        "encode: 0/4 units, 10 pairs/s now, 10 mean, 37 s left, 1 worker, 0 retries",
    ]


def test_the_rate_now_is_that_of_the_last_minute(clock: Clock) -> None:
    """10 pairs/s for 100 s and then 2 pairs/s for 100 s, in units of 100 pairs."""
    progress = EncodeProgress(as_json=False)
    progress.add_units(100, pairs=10_000)
    progress.update(1, 0, pairs_in_flight=0)
    pairs = 0
    for second in range(1, 201):
        clock.seconds += 1
        pairs += 10 if second <= 100 else 2
        if pairs // 100 > progress.units_done:
            progress.finish_unit(100, was_encoded=True)
        progress.update(1, 0, pairs_in_flight=pairs % 100)
    state = progress.state()
    assert (state["units_done"], state["pairs_done"]) == (12, 1200)
    assert state["pairs_per_second_now"] == 2
    assert state["pairs_per_second_mean"] == 6
    assert state["seconds_left"] == pytest.approx(8800 / 6, abs=0.1)


def test_a_unit_that_was_committed_already_raises_no_rate(clock: Clock) -> None:
    progress = EncodeProgress(as_json=False)
    progress.add_units(2, pairs=200)
    progress.update(1, 0, pairs_in_flight=0)
    clock.seconds += 10
    progress.finish_unit(100, was_encoded=False)
    progress.update(1, 1, pairs_in_flight=50)
    state = progress.state()
    assert (state["units_done"], state["pairs_done"], state["pairs_total"]) == (1, 50, 100)
    assert (state["pairs_per_second_mean"], state["seconds_left"]) == (5, 10)


def test_pairs_of_a_unit_that_is_lost_lower_no_rate_below_zero(clock: Clock) -> None:
    progress = EncodeProgress(as_json=False)
    progress.add_units(2, pairs=200)
    for pairs_in_flight in (0, 90, 0):
        clock.seconds += 70
        progress.update(1, 0, pairs_in_flight)
    assert progress.state()["pairs_per_second_now"] == 0
    assert progress.state()["seconds_left"] is None


def test_reading_back_counts_units(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = EncodeProgress(as_json=False)
    progress.add_units(2, pairs=2)
    progress.update(2, 0, pairs_in_flight=0)
    progress.start_check(2)
    progress.units_checked += 1
    progress.show()
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "encode: 0/2 units read back, 2 workers",
        "encode: 1/2 units read back, 2 workers",
    ]


def test_a_call_that_takes_long_is_not_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is shown at once of what should take no time; while it lasts, there are lines."""
    monkeypatch.setattr(encode_report, "REDRAW_SECONDS", 0.01)
    monkeypatch.setattr(encode_report, "FIRST_LINE_SECONDS", 0.05)
    with EncodeProgress(as_json=False) as progress:
        progress.set_status("reading the teacher", announce=False)
        for _ in range(3):
            wait_for(lambda: "encode: reading the teacher" in capsys.readouterr().err, "a line")


@pytest.mark.parametrize(("rows", "columns", "is_live"), [(0, 0, False), (24, 80, True)])
def test_a_terminal_without_a_size_gets_lines(
    rows: int, columns: int, is_live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    main_end, process_end = os.openpty()
    fcntl.ioctl(process_end, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with os.fdopen(process_end, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with EncodeProgress(as_json=False) as progress:
            progress.set_status("starting Ray on this machine")
            output = os.read(main_end, 1000).decode()
            while not is_live and not output.endswith("\n"):  # it arrives in pieces
                output += os.read(main_end, 1000).decode()
        assert progress.is_live == is_live
    os.close(main_end)
    assert (output == "encode: starting Ray on this machine\r\n") == (not is_live)


def test_the_summary_says_which_units_were_encoded_again(run: Run) -> None:
    dataset = Store(run.couplings["zarr"]).dataset
    summary = Summary(
        dataset,
        units_encoded=6,
        pairs_encoded=537,
        seconds=10.0,
        worker_seconds=5.0,
        worker_deaths=2,
        units_of_dead_workers=3,
        units_of_earlier_driver=1,
        units_damaged=3,
    )
    lines = describe(summary, "out", student_images=640)
    assert lines[1].startswith("537 pairs in 10 s, 53.7 pairs/s; ")
    assert lines[2] == (
        "units encoded again: 7 (3 from 2 dead workers, 1 from an earlier driver, 3 damaged after their commit)"
    )
    assert lines[3].endswith("FLOP of teacher work, 6 s of one worker's time")


def test_what_takes_no_time_is_not_announced(capsys: pytest.CaptureFixture[str]) -> None:
    with EncodeProgress(as_json=False) as progress:
        progress.set_status("reading the samples and the teacher", announce=False)
    assert capsys.readouterr().err == ""
