"""The encode job: the blocks of a sample store, spread over the workers of a Ray cluster.

A worker is an actor that holds the teacher, reads and writes its own blocks, and returns only how many images it did:
no image crosses Ray's object store. The driver holds no state but what is in the output: kill it, and the same command
encodes only the blocks that have no commit record.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from pipeline.config import StorageConfig
from stages.encode import BlockEncoder, EncodeConfig, begin
from stages.progress import Progress
from stages.section import StageError
from storage_specs.schema import Dataset
from storage_specs.store import Store

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
os.environ.setdefault("RAY_worker_niceness", "0")  # of a cluster started here: encoding is what the machine is for
import ray
from ray.exceptions import RayError, RayTaskError

IN_FLIGHT = 2  # blocks given to a worker at a time, so that it never waits for the driver
RETRIES = 3  # of one block, each on a restarted worker, wherever Ray finds room for it
LOCAL_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's least; only commit rows pass through it


class Worker:
    """The actor: a BlockEncoder, made on the first block so that what is wrong with it reaches the driver as an
    error.
    """

    def __init__(self, threads: int, storage: StorageConfig, **arguments: Any) -> None:
        import torch

        storage.apply()
        torch.set_num_threads(threads)
        self.arguments = arguments
        self.encoder: BlockEncoder | None = None

    def encode(self, block: int) -> int:
        if self.encoder is None:
            self.encoder = BlockEncoder(**self.arguments)
        return self.encoder.encode(block).rows


def encode_couplings(
    config: EncodeConfig, samples: str, teacher: str, out: str, storage: StorageConfig | None = None
) -> Dataset:
    """Encode `samples` (a sample store) with `teacher` into `out`, continuing what is there; returns the finished
    store.
    """
    source = Store(samples, kind="samples")
    writer = begin(config, source, teacher, out)
    spec = writer.spec
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
        "storage": storage or StorageConfig(),
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
    with ray_session(), ExitStack() as cleanup:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        cpus = int(ray.cluster_resources().get("CPU", 1))
        most = gpus or max(1, cpus // config.cpus_per_worker)
        count = min(config.workers or most, most, len(todo))
        resources = {"num_gpus": 1} if gpus else {"num_cpus": config.cpus_per_worker}
        actor = ray.remote(Worker)
        workers: list[Any] = [
            actor.options(max_restarts=-1, max_task_retries=RETRIES, **resources).remote(
                threads=config.cpus_per_worker, **arguments
            )
            for _ in range(count)
        ]
        for worker in workers:
            cleanup.callback(ray.kill, worker)
        _dispatch(workers, todo, progress)


@contextmanager
def ray_session() -> Iterator[None]:
    """Ray while it is needed: the cluster that RAY_ADDRESS names, or one started here. Inside another session, that."""
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address=os.environ["RAY_ADDRESS"], **quiet)
        except (ValueError, ConnectionError) as error:
            raise StageError(
                f"got RAY_ADDRESS={os.environ['RAY_ADDRESS']}, where no Ray cluster answers: {error}"
            ) from error
    else:
        ray.init(include_dashboard=False, object_store_memory=LOCAL_OBJECT_STORE_BYTES, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def _dispatch(workers: list[Any], todo: list[int], progress: Progress) -> None:
    """Keep every worker busy until all blocks are committed."""
    queue = list(reversed(todo))
    running: dict[Any, tuple[Any, int]] = {}

    def give(worker: Any) -> None:
        if queue:
            block = queue.pop()
            running[worker.encode.remote(block)] = worker, block

    for _ in range(IN_FLIGHT):
        for worker in workers:
            give(worker)
    while running:
        ready, _ = ray.wait(list(running), num_returns=1)
        worker, block = running.pop(ready[0])
        try:
            progress.advance(ray.get(ready[0]))
        except RayTaskError as error:
            raise error.cause from None  # the encoder's own error, not a dead worker
        except RayError as error:
            raise StageError(
                f"workers died {RETRIES + 1} times on block {block} ({type(error).__name__}); does every node have nfm "
                "installed? Where memory ran out, lower encode.batch_size"
            ) from error
        give(worker)
