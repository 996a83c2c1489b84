"""One driver an output: refused while another lives, taken over when it died, on this machine or elsewhere."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfm.storage_specs.format.names import LEASE_FILE
from nfm.storage_specs.storage import lease
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.files import Root
from nfm.storage_specs.storage.lease import Lease

HOLD = """
import sys, time
from nfm.storage_specs.storage import lease
from nfm.storage_specs.storage.lease import Lease
from nfm.storage_specs.format.names import LEASE_FILE
lease.RENEW_SECONDS = 0.5
with Lease(sys.argv[1], LEASE_FILE) as lease:
    lease.note(["000001.k000-008"])
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lease of `tmp_path`."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        while not json.loads((tmp_path / LEASE_FILE).read_text())["in_hand"]:
            time.sleep(0.01)
        yield process
        process.kill()


def rewrite(folder: Path, **changes: object) -> None:
    document = json.loads((folder / LEASE_FILE).read_text())
    Root(str(folder)).write(LEASE_FILE, json.dumps(document | changes).encode())


def test_a_second_driver_is_refused_while_the_first_lives(
    holder: "subprocess.Popen[str]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(StoreError, match=f"process {holder.pid} on .* is encoding into it; wait until it ends"):
        Lease(str(tmp_path), LEASE_FILE).__enter__()
    assert time.monotonic() - start < 2 * lease.RENEW_SECONDS + 2
    assert holder.poll() is None


def test_a_dead_driver_of_this_machine_is_followed_at_once(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    start = time.monotonic()
    with Lease(str(tmp_path), LEASE_FILE) as mine:
        assert mine.left == ["000001.k000-008"]
    assert time.monotonic() - start < 2
    assert not (tmp_path / LEASE_FILE).exists()


def test_a_driver_elsewhere_is_dead_when_it_renews_no_more(
    holder: "subprocess.Popen[str]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder.send_signal(signal.SIGSTOP)
    rewrite(tmp_path, host="elsewhere")
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    start = time.monotonic()
    with Lease(str(tmp_path), LEASE_FILE) as mine:
        assert time.monotonic() - start >= 0.5
        mine.check()
        rewrite(tmp_path, token="another")
        time.sleep(2)
        with pytest.raises(StoreError, match="took over encoding into it"):
            mine.check()
    assert (tmp_path / LEASE_FILE).exists(), "the lease of another is not ours to delete"


def test_what_was_in_hand_outlives_a_driver_that_was_told_to_end(tmp_path: Path) -> None:
    first = Lease(str(tmp_path), LEASE_FILE)
    first.__enter__()
    first.note(["b", "a"])
    first.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    rewrite(tmp_path, host="elsewhere")
    with Lease(str(tmp_path), LEASE_FILE) as second:  # which needs no wait: the first said that it ended
        assert second.left == ["a", "b"]
    assert os.listdir(tmp_path / "commits") == []
