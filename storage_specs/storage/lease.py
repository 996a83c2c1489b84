"""The right to drive one output: a second driver is refused while the first one lives.

A lease is a small file that its holder renews. Whoever finds one waits until it changes (then its holder lives) or has
not changed for LEASE_SECONDS (then it is dead); no clocks are compared. A holder on this machine whose process is gone
is known to be dead at once. Object stores have no lock that all of them share, so two drivers that start in the same
instant may both go on until the next renewal; their bytes are the same, which makes that harmless.
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
from typing import Self

from nfm.storage_specs.storage.documents import StrictModel, canonical_json, parse_json
from nfm.storage_specs.storage.errors import StorageError, StoreError
from nfm.storage_specs.storage.files import Root

RENEW_SECONDS = 5.0
LEASE_SECONDS = 30.0
MAX_BYTES = 1 << 24


class Holder(StrictModel):
    """Who drives, and what it has in hand."""

    token: str
    host: str
    pid: int
    born: str  # start of the process in clock ticks, so that a later process with its number is not taken for it
    beat: int
    in_flight: list[str]  # units begun and not committed when this was written
    ended: bool  # gave the lease back, with units in hand

    @property
    def name(self) -> str:
        return f"process {self.pid} on {self.host.partition(' ')[0]}"

    def dead(self) -> bool:
        """Known to be gone. On another machine nothing is known, unless it said so itself."""
        return self.ended or (self.host == _machine() != "" and _born(self.pid) != self.born)


class Lease:
    """Held inside a `with` block. `left` is what a holder that died before had in hand.

    Raises StoreError on entry while another driver lives, and from `check` once another one took over.
    """

    def __init__(self, url: str, path: str) -> None:
        self.root = Root(url)  # its own, so that it alone gives up at the end
        self.path = path
        self.token, self.beat, self.in_flight = uuid.uuid4().hex, 0, list[str]()
        self.previous_in_flight: list[str] = []
        self._lost: StoreError | None = None  # why this one must stop
        self._taken = False  # by another driver
        self._stop, self._changed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._renew, name="nfm-lease", daemon=True)

    def __enter__(self) -> Self:
        there = self._read()
        if there is not None:
            self._wait_for_death(there)
            self.previous_in_flight = self.in_flight = there.in_flight
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._changed.set()
        if error is not None:
            self.root.stop_retrying.set()  # what ended the block may be that storage is away
        self._thread.join()
        if self._taken:
            return
        with suppress(FileNotFoundError, *((OSError, StoreError) if error is not None else ())):
            try:
                if error is not None and self.in_flight:
                    self._write(ended=True)
                    return
            except OSError:
                pass  # a full disk, which does not keep a file from being deleted
            self.root.delete(self.path)

    def set_in_flight(self, in_flight: Iterable[str]) -> None:
        """Tell the next driver what to count as begun, should this one die."""
        self.in_flight = sorted(in_flight)
        self._changed.set()

    def raise_if_lost(self) -> None:
        if self._lost is not None:
            raise self._lost

    def _wait_for_death(self, there: Holder) -> None:
        since = time.monotonic()
        while not there.dead() and time.monotonic() - since < LEASE_SECONDS:
            time.sleep(RENEW_SECONDS / 5)
            now = self._read()
            if now is None:
                return
            if now != there:
                raise StoreError(
                    f"{self.root.url}: {now.name} is encoding into it; wait until it ends, or stop it: the same "
                    "command then continues"
                )

    def _read(self) -> Holder | None:
        if not self.root.exists(self.path):
            return None
        try:
            return parse_json(Holder, self.root.read(self.path, MAX_BYTES), f"{self.root.url}/{self.path}")
        except StorageError:
            raise
        except StoreError:  # deleted between the two looks, or no lease of ours
            return None

    def _write(self, ended: bool = False) -> None:
        holder = Holder(
            token=self.token,
            host=_machine(),
            pid=os.getpid(),
            born=_born(os.getpid()),
            beat=self.beat,
            in_flight=self.in_flight,
            ended=ended,
        )
        self.root.write(self.path, canonical_json(holder.model_dump(mode="json")))
        self.beat += 1

    def _renew(self) -> None:
        """Every RENEW_SECONDS, and soon after a change."""
        while not self._stop.is_set():
            self._changed.wait(RENEW_SECONDS)
            self._changed.clear()
            if self._stop.is_set():
                return
            try:
                there = self._read()
                if there is not None and there.token != self.token:
                    self._taken = True
                    self._lost = StoreError(f"{self.root.url}: {there.name} took over encoding into it; this one stops")
                    return
                self._write()
            except StoreError as error:
                self._lost = error
                return
            except OSError:
                pass  # a disk that is full for now: at worst another driver takes over, which the next look tells
            self._stop.wait(0.2)  # changes come in bursts


def _machine() -> str:
    """This machine since its start, and the name space of its process numbers: host names repeat."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot.read_text().strip()} {space.readlink()}" if boot.exists() else ""


def _born(pid: int) -> str:
    """When a process started, in clock ticks since boot; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        return ""
