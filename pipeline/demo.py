"""The demo: every stage in turn on one preset. Each stage continues or skips by itself, so the demo holds no state."""

import time
from contextlib import ExitStack
from pathlib import Path

from nfm.pipeline.config import Config
from nfm.pipeline.encode_job import encode_couplings
from nfm.pipeline.evaluation import evaluate_and_report
from nfm.pipeline.output import echo
from nfm.pipeline.ray_session import ray_session
from nfm.stages.prepare import prepare
from nfm.stages.progress import Progress, print_line
from nfm.stages.train_student import find_trained_versions, train_student
from nfm.stages.train_teacher import train_teacher
from nfm.storage_specs.format.names import DATASET_FILE
from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import Source
from nfm.storage_specs.storage.files import Root

NUM_STAGES = 6


def run_demo(config: Config, out: str, data: Path | None, skip_bad_images: bool) -> None:
    """Write `<out>/report.html` and `<out>/metrics.json`, and on the way every store and checkpoint."""
    started_at = time.monotonic()
    config = config.model_copy(update={"data": config.data.with_folder(data)})

    def print_stage(number: int, text: str) -> None:
        elapsed = time.monotonic() - started_at
        print_line(f"[{number}/{NUM_STAGES} {elapsed:5.0f} s] {text}")

    print_stage(1, "prepare: images → sample stores")
    prepare(config.data, f"{out}/samples", data, skip_bad_images, config.attribution)
    print_stage(2, "train-teacher: TarFlow by maximum likelihood")
    document = train_teacher(config.teacher, f"{out}/samples", f"{out}/teacher")
    print_line(f"    {document['bpd']:.3f} bits per dimension held out")
    teacher = f"{out}/teacher/model.safetensors"
    print_stage(3, "encode: teacher × noise draws → coupling stores, on Ray, in both layouts")
    stores: dict[LayoutName, str] = {"webdataset": f"{out}/couplings-webdataset", "zarr": f"{out}/couplings-zarr"}
    _encode_stores(config, f"{out}/samples/train", teacher, stores)
    # The students of an earlier run stay on the version that they were trained on, and are measured on it.
    couplings = find_trained_versions([Source(stores[config.encode.layout])], f"{out}/student-nfm")[0].url
    students = {}
    print_stage(4, "train-student: flow matching on the teacher's pairs and on random pairs")
    for coupling in ("nfm", "independent"):
        student = config.student.model_copy(update={"coupling": coupling})
        train_student(student, couplings, f"{out}/student-{coupling}")
        students[coupling] = f"{out}/student-{coupling}/model.safetensors"
    print_stage(5, "evaluate: Fréchet distance, curvature, z-space")
    summary = evaluate_and_report(config, f"{out}/samples", couplings, teacher, students, out)
    print_stage(6, "done")
    echo(*summary)


def _encode_stores(config: Config, samples: str, teacher: str, stores: dict[LayoutName, str]) -> None:
    """Encode one store in each layout, in one Ray session; without one if all of them are complete."""
    with ExitStack() as stack:
        if not all(Root(url).exists(DATASET_FILE) for url in stores.values()):
            with Progress("encode: starting Ray"):
                stack.enter_context(
                    ray_session(lambda status: print_line(f"encode: {status}"), config.encode.insecure_cluster)
                )
        for layout, url in stores.items():
            encode = config.encode.model_copy(update={"layout": layout, "draws": _count_draws(config, url)})
            encode_couplings(encode, samples, teacher, url, config.storage, attribution=config.attribution)


def _count_draws(config: Config, url: str) -> int:
    """The draws of a complete store that has got more since it was made; else those of the config."""
    draws = config.encode.draws
    if not Root(url).exists(DATASET_FILE):
        return draws
    more = Store(url, kind="couplings").spec.num_draws
    if more > draws:
        print_line(f"{url} has {more} draws an image, more than encode.draws = {draws}; the demo keeps them")
    return max(more, draws)
