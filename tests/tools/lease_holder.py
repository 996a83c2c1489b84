"""Another process that drives an output and holds its lease until it is killed."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nfm.storage_specs.format.names import LEASE_FILE
from tests.tools.waiting import wait_for

UNIT = "000001.k000-008"  # the unit that it says is in flight
PROGRAM = f"""
import sys, time
from nfm.storage_specs.storage import lease
from nfm.storage_specs.storage.lease import Lease
lease.RENEW_SECONDS = 0.5
with Lease(sys.argv[1], {LEASE_FILE!r}) as lease:
    lease.set_in_flight([{UNIT!r}])
    while True:
        time.sleep(1)
"""


@contextmanager
def lease_holder(folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """The process that holds the lease of `folder`, once its file names the unit in flight."""

    def unit_is_noted() -> bool:
        assert process.poll() is None, "the holder ended by itself"
        path = folder / LEASE_FILE
        return path.exists() and UNIT in path.read_text()

    with subprocess.Popen([sys.executable, "-c", PROGRAM, folder]) as process:
        try:
            wait_for(unit_is_noted, "the lease of another process")
            yield process
        finally:
            process.kill()
