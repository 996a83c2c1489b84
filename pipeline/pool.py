"""Actors of a Ray cluster that come and go, and the tasks they do.

The pool has as many actors as the cluster has room for at the time: nodes that join get actors, and the tasks that were
in flight on an actor when it died go to another. Tasks must be harmless to repeat.
"""

import errno
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from nfm.pipeline.ray_session import ClusterLostError, is_local
from nfm.stages.errors import StageError
from nfm.storage_specs.storage.errors import StoreError

T = TypeVar("T")

MAX_TASKS_PER_ACTOR = 2  # an actor reads one task and writes another while it computes
MAX_RETRIES = 5  # of one task whose actors died; if they die once more, the task itself seems to kill them
MAX_FAILED_STARTS = 5  # in a row; one more is allowed for each other actor of the pool
TICK_SECONDS = 0.5
GROW_SECONDS = 2.0  # between two checks whether the cluster has room for more actors
PROGRESS_SECONDS = 2.0  # between two progress requests to an actor
CLUSTER_TIMEOUT_SECONDS = 20.0  # without an answer, after which the cluster counts as lost
FINAL_ERRORS = (StageError, StoreError, FloatingPointError, PermissionError)  # another actor would raise the same
DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # a full or read-only disk: another actor would fail too


@dataclass
class PooledActor:
    """One actor of the pool.

    The first entry of `in_flight` is the call of its method `ready`, whose task is None; tasks follow once that has
    returned.
    """

    handle: Any
    ready: bool = False
    in_flight: dict[Any, Any] = field(default_factory=dict)  # task by the reference of its result
    progress_request: Any = None  # reference of the answer that is awaited, if any
    progress: dict[Any, int] = field(default_factory=dict)  # the last answer: how far each task is


class Pool:
    """A pool of Ray actors that grows with the cluster and replaces actors that die. Use it inside a `with` block.

    `make_actor(resources, device)` gives a new actor, which must have a method `ready`. At most `max_actors` are made;
    None: as many as the nodes have room for. Where more are asked for than that, they wait for nodes that join the
    cluster, but not on this machine alone. All actors have one kind of device: "cuda", "cpu", or, for None, "cuda" if
    the cluster has a GPU when the pool is made.
    """

    def __init__(
        self,
        make_actor: Callable[[dict[str, float], str], Any],
        max_actors: int | None,
        cpus_per_actor: int,
        device: str | None = None,
    ) -> None:
        self.make_actor = make_actor
        self.max_actors = max_actors
        self.cpus_per_actor = cpus_per_actor
        self.device = device or ("cuda" if ray.cluster_resources().get("GPU") else "cpu")
        self.actors: list[PooledActor] = []
        self.num_retries = 0  # tasks that went to another actor
        self.num_actor_deaths = 0
        self.missing_node: str | None = None  # what an actor needs and no node has: "2 CPUs and a GPU"
        self.deaths_by_task: Counter[Any] = Counter()  # of actors, for each task that is not finished
        self._failed_starts = 0  # since an actor last became ready
        self._last_death_reason = ""
        self._last_growth = float("-inf")
        self._last_progress_request = float("-inf")
        self._last_cluster_answer = time.monotonic()
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._cluster_address = (host.strip("[]"), int(port))

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        cluster_lost = kind is not None and issubclass(kind, ClusterLostError)
        if not cluster_lost:
            for actor in self.actors:
                with suppress(RayError):  # of a cluster that is going away too
                    ray.kill(actor.handle)
        self.actors = []

    @property
    def num_ready(self) -> int:
        """Actors that have started and take tasks."""
        return sum(actor.ready for actor in self.actors)

    @property
    def tasks_in_flight(self) -> list[Any]:
        return [task for actor in self.actors if actor.ready for task in actor.in_flight.values()]

    @property
    def started_tasks(self) -> set[Any]:
        """Tasks in flight, and those that were in flight on an actor that died and wait for another."""
        return {*self.tasks_in_flight, *self.deaths_by_task}

    @property
    def progress_in_flight(self) -> int:
        """The sum of what the actors last answered of their tasks in flight. See `run`."""
        return sum(actor.progress.get(task, 0) for actor in self.actors for task in actor.in_flight.values())

    def run(
        self, method: str, tasks: Iterable[T], tick: Callable[[], bool], progress_method: str | None = None
    ) -> Iterator[tuple[T, Any]]:
        """Call the method named `method` of the actors with each task, and yield each task with its result, in the
        order in which they finish.

        `tick` is called at least once every TICK_SECONDS. When it returns False, no more tasks are started, and the
        iteration ends after those in flight have finished. `progress_method`, if given, names a method of the actors
        that returns a number for each task that the actor is working on, as a dict. Each actor is asked every
        PROGRESS_SECONDS, and the method must return without waiting.

        Raises a task's own error if another actor would raise the same, StageError if actors keep dying or no node can
        ever hold one, and ClusterLostError.
        """
        pending = deque(tasks)
        while True:
            if not tick():
                pending.clear()
            if not pending and not self.tasks_in_flight:
                return
            self._grow(len(pending))
            self._submit(method, pending)
            if progress_method is not None:
                self._update_progress(progress_method)
            actor_by_reference = {reference: actor for actor in self.actors for reference in actor.in_flight}
            if not actor_by_reference:
                time.sleep(TICK_SECONDS)
                continue
            finished, _ = ray.wait(list(actor_by_reference), timeout=TICK_SECONDS)
            for reference in finished:
                actor = actor_by_reference[reference]
                if reference not in actor.in_flight:
                    continue  # of an actor that was given up a moment ago
                try:
                    result = ray.get(reference)
                except RayError as error:
                    retried_tasks = self._remove_failed_actor(actor, error)
                    pending.extendleft(reversed(retried_tasks))
                    continue
                task = actor.in_flight.pop(reference)
                if actor.ready:
                    actor.progress.pop(task, None)
                    yield task, result
                    self.deaths_by_task.pop(task, None)  # after the yield: the caller may look it up
                else:
                    actor.ready = True
                    self._failed_starts = 0

    def check_room(self) -> None:
        """Raise StageError if no node can ever hold an actor, as `run` does. Starts none."""
        if self._check_cluster():
            self._find_capacity()

    def _submit(self, method: str, pending: deque[Any]) -> None:
        """Hand out pending tasks: one to each ready actor, then a second one to each.

        While actors are starting, the second round leaves one task to each of them.
        """
        num_starting = sum(not actor.ready for actor in self.actors)
        for num_in_flight in range(MAX_TASKS_PER_ACTOR):
            num_reserved = num_in_flight * num_starting
            for actor in self.actors:
                if actor.ready and len(actor.in_flight) == num_in_flight and len(pending) > num_reserved:
                    task = pending.popleft()
                    reference = getattr(actor.handle, method).remote(task)
                    actor.in_flight[reference] = task
                    actor.progress[task] = 0

    def _update_progress(self, method: str) -> None:
        """Read the progress answers that have arrived, and send new requests every PROGRESS_SECONDS. Never waits.

        An actor whose last request is not answered gets no new one. The death of an actor is not handled here: the
        calls of its tasks fail too, and `run` handles those.
        """
        requests = [actor.progress_request for actor in self.actors if actor.progress_request is not None]
        if requests:
            answered, _ = ray.wait(requests, num_returns=len(requests), timeout=0)
            for actor in self.actors:
                if actor.progress_request in answered:
                    try:
                        actor.progress.update(ray.get(actor.progress_request))
                    except RayTaskError:
                        raise  # the method itself is wrong
                    except RayError:
                        pass  # the actor died
                    actor.progress_request = None
        if time.monotonic() - self._last_progress_request < PROGRESS_SECONDS:
            return
        self._last_progress_request = time.monotonic()
        for actor in self.actors:
            if actor.ready and actor.in_flight and actor.progress_request is None:
                actor.progress_request = getattr(actor.handle, method).remote()

    def _grow(self, num_pending: int) -> None:
        """Every GROW_SECONDS, start actors where the cluster has room, at most one per pending task."""
        if time.monotonic() - self._last_growth < GROW_SECONDS:
            return
        self._last_growth = time.monotonic()
        if not self._check_cluster():
            return
        resources: dict[str, float] = {"num_cpus": self.cpus_per_actor}
        if self.device == "cuda":
            resources["num_gpus"] = 1
        num_free = sum(not actor.ready or not actor.in_flight for actor in self.actors)  # starting, or without a task
        try:
            capacity = self._find_capacity()
            for _ in range(min(capacity - len(self.actors), num_pending - num_free)):
                actor = PooledActor(self.make_actor(resources, self.device))
                actor.in_flight[actor.handle.ready.remote()] = None
                self.actors.append(actor)
        except RayError:
            if self._check_cluster():
                raise

    def _find_capacity(self) -> int:
        """How many actors to have. Raises StageError if none of them could ever start."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(self._room_on(node) for node in nodes)  # whoever uses it now
        self.missing_node = None if room else self._needs()
        if self.max_actors is not None and not is_local():
            return self.max_actors  # Ray makes those for which there is no room wait, and an autoscaler sees them
        if room == 0 and not self.actors:
            if is_local():
                cpus = sum(int(node.get("CPU", 0)) for node in nodes)
                gpus = sum(int(node.get("GPU", 0)) for node in nodes)
                advice = "lower --cpus-per-worker" if cpus < self.cpus_per_actor else "use --device cpu"
                raise StageError(
                    f"one worker needs {self._needs()}, but this machine has {cpus} CPUs and {gpus or 'no'} GPUs; "
                    f"{advice}, or name a cluster in RAY_ADDRESS"
                )
            raise StageError(
                f"no node of the Ray cluster has {self._needs()}, which one worker needs; "
                "lower --cpus-per-worker, or set --workers N if such nodes will join"
            )
        return room if self.max_actors is None else min(room, self.max_actors)

    def _room_on(self, node: dict[str, float]) -> int:
        """How many actors fit on a node with these resources."""
        room = int(node.get("CPU", 0) // self.cpus_per_actor)
        return min(room, int(node.get("GPU", 0))) if self.device == "cuda" else room

    def _needs(self) -> str:
        """What one actor needs, for messages."""
        cpus = "1 CPU" if self.cpus_per_actor == 1 else f"{self.cpus_per_actor} CPUs"
        return f"{cpus} and a GPU" if self.device == "cuda" else cpus

    def _remove_failed_actor(self, actor: PooledActor, error: RayError) -> list[Any]:
        """Remove an actor whose call failed, and return the tasks that it had in flight.

        Raises the error of the task if another actor would raise the same, and StageError after too many deaths.
        """
        cause = error.cause if isinstance(error, RayTaskError) else None
        disk_failed = isinstance(cause, OSError) and cause.errno in DISK_ERRNOS
        if cause is not None and (disk_failed or isinstance(cause, FINAL_ERRORS)):
            raise cause from None
        self._last_death_reason = f"{type(cause or error).__name__}: {cause or _first_line(error)}"
        tasks = list(actor.in_flight.values()) if actor.ready else []
        self.actors.remove(actor)
        self.num_actor_deaths += 1
        if self._check_cluster():
            if not isinstance(error, ActorDiedError):
                with suppress(RayError):
                    ray.kill(actor.handle)  # it failed, or is out of reach: another one does its work
            self._last_growth = float("-inf")  # replace it now
        if not actor.ready:
            self._failed_starts += 1
            if self._failed_starts > MAX_FAILED_STARTS + len(self.actors):
                raise StageError(
                    f"workers die as they start, the last of {self._failed_starts} with {self._last_death_reason}; "
                    "does every node have nfm installed and the samples and the teacher in reach?"
                )
        self.num_retries += len(tasks)
        for task in tasks:
            self.deaths_by_task[task] += 1
            if self.deaths_by_task[task] > MAX_RETRIES:
                times = f"{self.deaths_by_task[task]} times on {task}, at last with {self._last_death_reason}"
                if cause is not None:
                    raise StageError(f"workers failed {times}") from cause
                raise StageError(f"workers died {times}; if memory ran out, give each worker more")
        return tasks

    def _check_cluster(self) -> bool:
        """Try to connect to the cluster's head. Returns whether it accepted the connection.

        Raises ClusterLostError if it has accepted none for CLUSTER_TIMEOUT_SECONDS.
        """
        host, port = self._cluster_address
        try:
            socket.create_connection((host, port), timeout=TICK_SECONDS).close()
        except OSError as error:
            if time.monotonic() - self._last_cluster_answer > CLUSTER_TIMEOUT_SECONDS:
                raise ClusterLostError(
                    f"the Ray cluster at {host}:{port} has not answered for {CLUSTER_TIMEOUT_SECONDS:.0f} s ({error})"
                ) from None
            return False
        self._last_cluster_answer = time.monotonic()
        return True


def _first_line(error: BaseException) -> str:
    """The first line of an error's text that is not empty, cut to 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else ""
