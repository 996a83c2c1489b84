"""One driver an output: refused while another lives, taken over when it died, on this machine or elsewhere."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfm.storage_specs.format.names import LEASE_FILE
from nfm.storage_specs.storage import lease
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import Root
from nfm.storage_specs.storage.lease import Holder, Lease
from tests.tools.lease_holder import UNIT, lease_holder
from tests.tools.waiting import PATIENCE, wait_for


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of whoever waits for the death of another driver."""
    clock = Clock()
    monkeypatch.setattr(lease, "time", clock)
    return clock


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Another process that holds the lease of `tmp_path`."""
    with lease_holder(tmp_path) as process:
        yield process


def rewrite(folder: Path, **changes: object) -> None:
    document = json.loads((folder / LEASE_FILE).read_text())
    Root(str(folder)).write(LEASE_FILE, json.dumps(document | changes).encode())


def test_a_second_driver_is_refused_while_the_first_lives(
    holder: "subprocess.Popen[bytes]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.5)
    monkeypatch.setattr(lease, "LEASE_SECONDS", PATIENCE)  # a holder that is slow is not dead
    with pytest.raises(StoreError, match=f"process {holder.pid} on .* is writing into it; wait until it ends"):
        Lease(str(tmp_path), LEASE_FILE).__enter__()
    assert holder.poll() is None


def test_a_dead_driver_of_this_machine_is_followed_at_once(
    holder: "subprocess.Popen[bytes]", tmp_path: Path, clock: Clock
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with Lease(str(tmp_path), LEASE_FILE) as lease_of_test:
        assert lease_of_test.previous_in_flight == [UNIT]
    assert clock.seconds == lease.CONFIRM_SECONDS
    assert not (tmp_path / LEASE_FILE).exists()


def test_a_driver_elsewhere_is_dead_when_it_renews_no_more(
    holder: "subprocess.Popen[bytes]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    holder.send_signal(signal.SIGSTOP)
    os.waitpid(holder.pid, os.WUNTRACED)  # until it is stopped
    rewrite(tmp_path, machine_id="elsewhere")
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    with Lease(str(tmp_path), LEASE_FILE) as lease_of_test:
        assert clock.seconds >= lease.LEASE_SECONDS
        lease_of_test.raise_if_lost()

        def renewal_error() -> StoreError | None:
            rewrite(tmp_path, token="another")  # once more, where it was renewed at the same moment
            try:
                lease_of_test.raise_if_lost()
            except StoreError as error:
                return error
            return None

        assert "took over writing into it" in str(wait_for(renewal_error, "the end of a lease that another took over"))
    assert (tmp_path / LEASE_FILE).exists(), "the lease of another driver is not deleted"


@pytest.mark.parametrize(
    ("machine_id", "name"), [("host-a 1234-5678 pid:[4026531836]", "process 12 on host-a"), ("", "process 12")]
)
def test_a_holder_is_named_by_its_process_and_its_host_if_that_is_known(machine_id: str, name: str) -> None:
    holder = Holder(
        token="a", machine_id=machine_id, pid=12, process_start_time="1", renewals=0, in_flight=[], released=False
    )
    assert holder.process_name == name


def test_units_in_flight_outlive_a_driver_that_was_interrupted(tmp_path: Path) -> None:
    first = Lease(str(tmp_path), LEASE_FILE)
    first.__enter__()
    first.set_in_flight(["b", "a"])
    first.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    rewrite(tmp_path, machine_id="elsewhere")
    with Lease(str(tmp_path), LEASE_FILE) as second:  # without a wait: the first has released it
        assert second.previous_in_flight == ["a", "b"]
    assert os.listdir(tmp_path / "commits") == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux tells when a process started")
def test_a_process_may_have_any_name(tmp_path: Path) -> None:
    """The holder's number may meanwhile be that of another program."""
    program = tmp_path / os.fsdecode(b"\xff) (\n")
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "100"]) as process:
        try:
            wait_for(lambda: b"\xff" in Path(f"/proc/{process.pid}/stat").read_bytes(), "the start of the program")
            assert lease._process_start_time(process.pid).isdigit()
        finally:
            process.kill()
