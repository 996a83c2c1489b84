"""The right to write one output: a second driver is refused while the first one lives.

A lease is a small file that its holder rewrites every RENEW_SECONDS. A driver that finds such a file waits: if the
file changes, its holder lives, and the driver is refused; if it does not change for LEASE_SECONDS, its holder is dead,
and the driver takes over. No clocks of two machines are compared. A holder on the same machine whose process is gone is
known to be dead at once.

Object stores offer no lock that all of them share. A driver therefore looks again, a moment after it took the lease,
whether another one took it at the same time. Where storage is so slow that both see only themselves, both run until the
next renewal. Drivers of one job write the same bytes, which makes that harmless.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nfm.storage_specs.storage.documents import StrictModel, canonical_json, parse_json
from nfm.storage_specs.storage.errors import StorageError, StoreError
from nfm.storage_specs.storage.files import Root

RENEW_SECONDS = 5.0
LEASE_SECONDS = 30.0
CONFIRM_SECONDS = 0.2  # after which a driver looks whether the lease that it took still stands there
MIN_WRITE_INTERVAL_SECONDS = 0.2  # between two writes of the lease file, however often the units in flight change
MAX_LEASE_BYTES = 1 << 24


class Holder(StrictModel):
    """The content of a lease file: which process holds the lease, and what it is working on."""

    token: str  # random, of one `Lease` object
    machine_id: str  # the result of `_machine_id`
    pid: int
    process_start_time: str  # in clock ticks, so that a later process with the same pid is not taken for the holder
    renewals: int  # counts the writes, so that every renewal changes the file
    in_flight: list[str]  # names of units that were started and had no commit record when this was written
    released: bool  # the holder gave the lease back and left the units in flight unfinished

    @property
    def process_name(self) -> str:
        """For messages: "process 1234 on host-a", or "process 1234" where the machine has no id."""
        host_name = self.machine_id.partition(" ")[0]
        return f"process {self.pid} on {host_name}" if host_name else f"process {self.pid}"

    def is_known_dead(self) -> bool:
        """Whether the holder released the lease, or was a process of this machine that no longer runs. Nothing is known
        of processes on other machines."""
        if self.released:
            return True
        if self.machine_id == "" or self.machine_id != _machine_id():
            return False
        return _process_start_time(self.pid) != self.process_start_time


class Lease:
    """The lease of the output at `url`, held inside a `with` block. `path` is the lease file, relative to `url`, and
    `options` are those of the fsspec file system.

    Entering waits until a previous holder is known to be dead, and raises StoreError if it lives. A thread then renews
    the lease file; if another driver took over or the file cannot be written, `raise_if_lost` raises StoreError.
    Leaving deletes the file, except after an error with units in flight: then the file stays, so that the next driver
    knows these units.

    `previous_in_flight` holds the names of the units that a dead holder left unfinished.
    """

    def __init__(self, url: str, path: str, options: dict[str, Any] | None = None) -> None:
        self.root = Root(url, options)  # not shared: when the lease ends, only its own requests stop retrying
        self.path = path
        self.token = uuid.uuid4().hex
        self.renewals = 0
        self.in_flight: list[str] = []
        self.previous_in_flight: list[str] = []
        self._error: StoreError | None = None  # why the lease was lost
        self._taken_over = False  # by another driver
        self._stop = threading.Event()
        self._in_flight_changed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="nfm-lease", daemon=True)

    def __enter__(self) -> Self:
        existing = self._read()
        if existing is not None:
            self._wait_until_dead(existing)
            self.previous_in_flight = existing.in_flight
            self.in_flight = existing.in_flight
        self._write()
        time.sleep(CONFIRM_SECONDS)  # another driver that found no lease at the same time has written by now
        confirmed = self._read()
        if confirmed is not None and confirmed.token != self.token:
            raise self._refusal(confirmed)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._in_flight_changed.set()
        if error is not None:
            self.root.stop_retrying.set()  # the block may have ended because storage does not answer
        self._thread.join()
        if self._taken_over:
            return
        if error is None:
            with suppress(FileNotFoundError):
                self.root.delete(self.path)
            return
        with suppress(OSError, StoreError):  # the caller is to see `error`, not what follows from it
            self._release()

    def _release(self) -> None:
        """Leave a file that says that the lease is released and which units are in flight, or delete the file."""
        if self.in_flight:
            try:
                self._write(released=True)
                return
            except OSError:
                pass  # such as a full disk, on which a file can still be deleted
        self.root.delete(self.path)

    def set_in_flight(self, units: Iterable[str]) -> None:
        """Set the names of the units that are being worked on. The next driver finds them if this one dies."""
        self.in_flight = sorted(units)
        self._in_flight_changed.set()

    def raise_if_lost(self) -> None:
        """Raise StoreError if another driver took over, or if the lease file could not be renewed."""
        if self._error is not None:
            raise self._error

    def _wait_until_dead(self, holder: Holder) -> None:
        """Return when the holder is dead or its file is gone. Raises StoreError if the file changes meanwhile."""
        start = time.monotonic()
        while not holder.is_known_dead() and time.monotonic() - start < LEASE_SECONDS:
            time.sleep(RENEW_SECONDS / 5)
            current = self._read()
            if current is None:
                return
            if current != holder:
                raise self._refusal(current)

    def _refusal(self, holder: Holder) -> StoreError:
        return StoreError(
            f"{self.root.url}: {holder.process_name} is writing into it; wait until it ends, or stop it: "
            "the same command then continues"
        )

    def _read(self) -> Holder | None:
        """The content of the lease file; None if there is no such file, or none that this version can read."""
        if not self.root.exists(self.path):
            return None
        try:
            return parse_json(Holder, self.root.read(self.path, MAX_LEASE_BYTES), f"{self.root.url}/{self.path}")
        except StorageError:
            raise
        except StoreError:  # the file was deleted after `exists`, or is no lease
            return None

    def _write(self, released: bool = False) -> None:
        """Write the lease file: take the lease, renew it, or say that it is released."""
        holder = Holder(
            token=self.token,
            machine_id=_machine_id(),
            pid=os.getpid(),
            process_start_time=_process_start_time(os.getpid()),
            renewals=self.renewals,
            in_flight=self.in_flight,
            released=released,
        )
        self.root.write(self.path, canonical_json(holder.model_dump(mode="json")))
        self.renewals += 1

    def _renew(self) -> None:
        """The thread: write the file every RENEW_SECONDS, and soon after the units in flight changed."""
        while not self._stop.is_set():
            self._in_flight_changed.wait(RENEW_SECONDS)
            self._in_flight_changed.clear()
            if self._stop.is_set():
                return
            try:
                current = self._read()
                if current is not None and current.token != self.token:
                    self._taken_over = True
                    self._error = StoreError(
                        f"{self.root.url}: {current.process_name} took over writing into it; this process stops"
                    )
                    return
                self._write()
            except StoreError as error:
                self._error = error
                return
            except OSError:
                pass  # the disk may be full for a while; if another driver takes over meanwhile, the next read tells
            self._stop.wait(MIN_WRITE_INTERVAL_SECONDS)


def _machine_id() -> str:
    """Identity of this machine since it started: host name, boot id and the name space of its process numbers (host
    names repeat between machines, process numbers between containers). Empty where the system does not tell."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    pid_namespace = Path("/proc/self/ns/pid")
    if not boot_id.exists():
        return ""
    return f"{socket.gethostname()} {boot_id.read_text().strip()} {pid_namespace.readlink()}"


def _process_start_time(pid: int) -> str:
    """When a process started, in clock ticks since boot; empty if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ended between opening and reading
        return ""
    after_name = stat.rpartition(b")")[2].split()  # a process name holds any bytes, also spaces and brackets
    return after_name[19].decode()  # field 22 of proc(5), `starttime`
