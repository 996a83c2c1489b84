"""Actors of a Ray cluster that come and go, and the tasks they do.

The pool has as many actors as the cluster has room for at the time: nodes that join get some, and what an actor had in
hand when it died goes to another. Tasks must be harmless to repeat.
"""

import errno
import logging
import os
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nfm.stages.errors import ResumableError, StageError
from nfm.storage_specs.storage.errors import StoreError

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
os.environ.setdefault("RAY_worker_niceness", "0")  # of a cluster started here: encoding is what the machine is for
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of one task, because another one ended the job
import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

T = TypeVar("T")

IN_HAND = 2  # tasks an actor has at a time: it reads one and writes another while it computes
RETRIES = 5  # of one task whose actors died, before the task is held to be what kills them
TICK_SECONDS = 0.5
LOOK_SECONDS = 2.0  # between looks at what the cluster has
LOST_SECONDS = 20.0  # of a cluster that does not answer, before it is given up
LOCAL_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's least; only a few numbers a unit pass through it
FINAL = (StageError, StoreError, FloatingPointError)  # another actor would say the same
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class ClusterLostError(ResumableError):
    """The Ray cluster went away; the same command continues on another."""

    at_once = True


@contextmanager
def ray_session() -> Iterator[None]:
    """Ray while it is needed: the cluster that RAY_ADDRESS names, or one started here. Inside another session, that."""
    if ray.is_initialized():
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address=os.environ["RAY_ADDRESS"], **quiet)
        except (ValueError, ConnectionError, RuntimeError) as error:
            first = str(error).strip().partition("\n")[0]
            raise StageError(
                f"got RAY_ADDRESS={os.environ['RAY_ADDRESS']}, where no Ray cluster answers: {first}"
            ) from error
    else:
        ray.init(address="local", include_dashboard=False, object_store_memory=LOCAL_OBJECT_STORE_BYTES, **quiet)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # which Ray took for itself
    lost = False
    try:
        yield
    except ClusterLostError:
        lost = True
        raise
    finally:
        if not lost:  # else it would wait for what is gone
            ray.shutdown()


@dataclass
class Seat:
    """One actor: whether it has said that it is ready, and what it has in hand."""

    actor: Any
    ready: bool = False
    hand: dict[Any, Any] = field(default_factory=dict)  # task by the reference of its result


class Pool:
    """`make(resources, device)` gives a new actor, which must have a method `ready`. Use inside a `with` block.

    All actors have one kind of device: "cuda", "cpu", or, for None, what the cluster has when the pool is made.
    """

    def __init__(
        self, make: Callable[..., Any], workers: int | None, cpus_per_worker: int, device: str | None = None
    ) -> None:
        self.make, self.wanted, self.cpus = make, workers, cpus_per_worker
        self.device = device or ("cuda" if ray.cluster_resources().get("GPU") else "cpu")
        self.seats: list[Seat] = []
        self.retries = 0  # tasks that went to another actor
        self.deaths = 0  # of actors, all of them
        self._failed_starts, self._last_reason = 0, ""
        self.lost: Counter[Any] = Counter()  # how often each unfinished task lost its actor
        self._looked, self._answered = float("-inf"), time.monotonic()
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._cluster = (host.strip("[]"), int(port))

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, ClusterLostError):
            for seat in self.seats:
                with suppress(RayError):  # of a cluster that is going away too
                    ray.kill(seat.actor)
        self.seats = []

    @property
    def workers(self) -> int:
        return sum(seat.ready for seat in self.seats)

    @property
    def in_hand(self) -> list[Any]:
        return [task for seat in self.seats if seat.ready for task in seat.hand.values()]

    @property
    def begun(self) -> set[Any]:
        """Tasks in hand, and those that were in the hand of an actor that died."""
        return {*self.in_hand, *self.lost}

    def run(self, method: str, tasks: Iterable[T], tick: Callable[[], bool]) -> Iterator[tuple[T, Any]]:
        """Each task with the result of `method(task)`, as they come. `tick` is called at least once every
        TICK_SECONDS; once it gives False, no more tasks are begun, and the iteration ends when what is in hand is done.

        Raises what a task raised if another actor would do the same, StageError where actors keep dying, and
        ClusterLostError.
        """
        queue = deque(tasks)
        while True:
            if not tick():
                queue.clear()
            if not queue and not self.in_hand:
                return
            self._grow(len(queue))
            starting = sum(not seat.ready for seat in self.seats)
            for held in range(IN_HAND):  # one each, then a second each, if those that are starting have some left too
                for seat in self.seats:
                    if len(queue) > held * starting and seat.ready and len(seat.hand) == held:
                        task = queue.popleft()
                        seat.hand[getattr(seat.actor, method).remote(task)] = task
            waiting = {reference: seat for seat in self.seats for reference in seat.hand}
            if not waiting:
                time.sleep(TICK_SECONDS)
                continue
            for reference in ray.wait(list(waiting), timeout=TICK_SECONDS)[0]:
                seat = waiting[reference]
                if reference not in seat.hand:
                    continue  # of an actor that was given up a moment ago
                try:
                    result = ray.get(reference)
                except RayError as error:
                    queue.extendleft(reversed(self._lose(seat, error)))
                    continue
                task = seat.hand.pop(reference)
                if seat.ready:
                    yield task, result
                    self.lost.pop(task, None)
                else:
                    seat.ready, self._failed_starts = True, 0

    def _grow(self, tasks: int) -> None:
        """Actors for the room there is, at most one a task."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        if not self._answers():
            return
        resources = {"num_cpus": self.cpus} | ({"num_gpus": 1} if self.device == "cuda" else {})
        idle = sum(not seat.ready or not seat.hand for seat in self.seats)
        try:
            for _ in range(min((self.wanted or self._room()) - len(self.seats), tasks - idle)):
                seat = Seat(self.make(resources, self.device))
                seat.hand[seat.actor.ready.remote()] = None
                self.seats.append(seat)
        except RayError:
            if self._answers():
                raise

    def _room(self) -> int:
        """Actors that the nodes have room for, whoever uses it now. Raises StageError where no node ever has."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = [node.get("GPU", 0) if self.device == "cuda" else float("inf") for node in nodes]
        cpus = [node.get("CPU", 0) // self.cpus for node in nodes]
        room = int(sum(map(min, gpus, cpus)))
        if not room and not self.seats:
            wanted = f"{self.cpus} CPUs" + (" and a GPU" if self.device == "cuda" else "")
            raise StageError(
                f"got a Ray cluster of {len(nodes)} nodes, none of which has {wanted} for a worker; expected one, or "
                "--workers N where more nodes will join"
            )
        return room

    def _lose(self, seat: Seat, error: RayError) -> list[Any]:
        """Give an actor up; the tasks it had in hand. Raises where trying again is no use."""
        cause = error.cause if isinstance(error, RayTaskError) else None
        if isinstance(cause, FINAL) or (isinstance(cause, OSError) and cause.errno in FULL):
            raise cause from None
        self._last_reason = f"{type(cause or error).__name__}: {cause or _first_line(error)}"
        tasks = list(seat.hand.values()) if seat.ready else []
        self.seats.remove(seat)
        self.deaths += 1
        if self._answers():
            if not isinstance(error, ActorDiedError):
                with suppress(RayError):
                    ray.kill(seat.actor)  # it failed, or is out of reach: another one does its work
            self._looked = float("-inf")  # replace it now
        if not seat.ready:
            self._failed_starts += 1
            if self._failed_starts > RETRIES + len(self.seats):
                raise StageError(
                    f"workers die as they start, the last of {self._failed_starts} with {self._last_reason}; does "
                    "every node have nfm installed and the samples and the teacher in reach?"
                )
        self.retries += len(tasks)
        for task in tasks:
            self.lost[task] += 1
            if self.lost[task] > RETRIES:
                raise StageError(
                    f"workers died {self.lost[task]} times on {task}, at last with {self._last_reason}; where "
                    "memory ran out, give each worker more"
                )
        return tasks

    def _answers(self) -> bool:
        """Whether the cluster's head accepts connections. Raises ClusterLostError after LOST_SECONDS without."""
        try:
            socket.create_connection(self._cluster, timeout=TICK_SECONDS).close()
        except OSError as error:
            if time.monotonic() - self._answered > LOST_SECONDS:
                raise ClusterLostError(
                    f"the Ray cluster at {self._cluster[0]}:{self._cluster[1]} has not answered for "
                    f"{LOST_SECONDS:.0f} s ({error})"
                ) from None
            return False
        self._answered = time.monotonic()
        return True


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else ""
