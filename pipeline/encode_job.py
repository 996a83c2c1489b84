"""The encode job: the blocks of a sample store, spread over the workers of a Ray cluster.

A worker is an actor that holds the teacher, reads and writes its own blocks, and returns only how many images it did:
no image crosses Ray's object store. The driver holds no state but what is in the output: kill it, and the same command
encodes only the blocks that have no commit record.
"""

import logging
import math
import os
from typing import Any

from stages.encode import BlockEncoder, EncodeConfig, coupling_spec, load_teacher
from stages.progress import Progress
from storage_specs.schema import Dataset
from storage_specs.store import Store
from storage_specs.writer import StoreWriter

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
os.environ.setdefault("RAY_worker_niceness", "0")  # of a cluster started here: encoding is what the machine is for
import ray
from ray.exceptions import RayActorError, RayTaskError

IN_FLIGHT = 2  # blocks given to a worker at a time, so that it never waits for the driver
RETRIES = 3  # of one block, after its worker died
LOCAL_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's least; only commit rows pass through it


class Worker:
    """The actor: a BlockEncoder, told how many threads it may use."""

    def __init__(self, threads: int, **arguments: Any) -> None:
        import torch

        torch.set_num_threads(threads)
        self.encoder = BlockEncoder(**arguments)

    def encode(self, block: int) -> int:
        return self.encoder.encode(block).rows


def encode_couplings(config: EncodeConfig, samples: str, teacher: str, out: str) -> Dataset:
    """Encode `samples` (a sample store) with `teacher` into `out`, continuing what is there; returns the finished
    store.
    """
    source = Store(samples, kind="samples")
    network, document = load_teacher(teacher)
    spec = coupling_spec(config, source, network, document, teacher)
    writer = StoreWriter(out, spec)
    writer.begin()
    if writer.complete():
        return Store(out).dataset
    done = writer.committed()
    todo = [block for block in range(spec.blocks) if block not in done]
    arguments = {
        "samples": _absolute(samples),
        "teacher": _absolute(teacher),
        "out": _absolute(out),
        "spec": spec.model_dump(mode="json"),
        "batch_size": config.batch_size,
    }
    if todo:
        progress = Progress(f"encode {spec.layout}", spec.rows, "img", done=sum(spec.rows_of(b) for b in done))
        with progress:
            _run(config, todo, arguments, progress)
    return writer.finalize()


def _absolute(url: str) -> str:
    """Workers have their own working directories."""
    return url if "://" in url else os.path.abspath(url)


def _run(config: EncodeConfig, todo: list[int], arguments: dict[str, Any], progress: Progress) -> None:
    started_here = not ray.is_initialized()
    if started_here:
        _start_ray()
    workers: list[Any] = []
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        cpus = int(ray.cluster_resources().get("CPU", 1))
        most = gpus or max(1, cpus // config.cpus_per_worker)
        count = min(config.workers or most, most, len(todo))
        resources = {"num_gpus": 1} if gpus else {"num_cpus": config.cpus_per_worker}
        actor = ray.remote(Worker)
        workers = [
            actor.options(max_restarts=-1, **resources).remote(threads=config.cpus_per_worker, **arguments)
            for _ in range(count)
        ]
        _dispatch(workers, todo, progress)
    finally:
        for worker in workers:
            ray.kill(worker)
        if started_here:
            ray.shutdown()


def _start_ray() -> None:
    """Join the cluster that RAY_ADDRESS names, or start one here."""
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address=os.environ["RAY_ADDRESS"], **quiet)
    else:
        ray.init(include_dashboard=False, object_store_memory=LOCAL_OBJECT_STORE_BYTES, **quiet)


def _dispatch(workers: list[Any], todo: list[int], progress: Progress) -> None:
    """Keep every worker busy until all blocks are committed; a block whose worker died is given out again."""
    queue = list(reversed(todo))
    tries = dict.fromkeys(todo, 0)
    running: dict[Any, tuple[Any, int]] = {}

    def give(worker: Any) -> None:
        if queue:
            block = queue.pop()
            running[worker.encode.remote(block)] = worker, block

    for _ in range(min(IN_FLIGHT, math.ceil(len(todo) / len(workers)))):
        for worker in workers:
            give(worker)
    while running:
        ready, _ = ray.wait(list(running), num_returns=1)
        worker, block = running.pop(ready[0])
        try:
            progress.advance(ray.get(ready[0]))
        except RayTaskError as error:
            raise error.as_instanceof_cause() from None  # the encoder's own error, not a dead worker
        except RayActorError:
            tries[block] += 1
            if tries[block] > RETRIES:
                raise
            queue.append(block)
        give(worker)
