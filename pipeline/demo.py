"""The demo: every stage in turn on one preset. Each stage continues or skips by itself, so the demo holds no state."""

import time
from contextlib import nullcontext
from pathlib import Path

import click

from nfm.pipeline.config import Config
from nfm.pipeline.encode_job import encode_couplings
from nfm.pipeline.evaluation import evaluate_and_report
from nfm.pipeline.pool import ray_session
from nfm.stages.prepare import prepare
from nfm.stages.train_student import train_student
from nfm.stages.train_teacher import train_teacher
from nfm.storage_specs.format.schema import LayoutName
from nfm.storage_specs.storage.files import Root


def run_demo(config: Config, out: str, data: Path | None, skip_bad_images: bool) -> None:
    """Write `<out>/report.html` and `<out>/metrics.json`, and on the way every store and checkpoint."""
    start = time.monotonic()
    config = config.model_copy(update={"data": config.data.given(data)})

    def step(number: int, text: str) -> None:
        click.echo(f"[{number}/6 {time.monotonic() - start:5.0f} s] {text}", err=True)

    step(1, "prepare: images → sample stores")
    prepare(config.data, f"{out}/samples", data, skip_bad_images)
    step(2, "train-teacher: TarFlow by maximum likelihood")
    document = train_teacher(config.teacher, f"{out}/samples", f"{out}/teacher")
    click.echo(f"    {document['bpd']:.3f} bits per dimension held out", err=True)
    teacher = f"{out}/teacher/model.safetensors"
    step(3, "encode: teacher × noise draws → coupling stores, on Ray, in both layouts")
    stores: dict[LayoutName, str] = {"webdataset": f"{out}/couplings-webdataset", "zarr": f"{out}/couplings-zarr"}
    missing = not all(Root(url).exists("dataset.json") for url in stores.values())
    with ray_session() if missing else nullcontext():
        for layout, url in stores.items():
            encode = config.encode.model_copy(update={"layout": layout})
            encode_couplings(encode, f"{out}/samples/train", teacher, url, config.storage)
    couplings = stores[config.encode.layout]
    students = {}
    step(4, "train-student: flow matching on the teacher's pairs and on random pairs")
    for coupling in ("nfm", "independent"):
        student = config.student.model_copy(update={"coupling": coupling})
        train_student(student, couplings, f"{out}/student-{coupling}")
        students[coupling] = f"{out}/student-{coupling}/model.safetensors"
    step(5, "evaluate: Fréchet distance, curvature, z-space")
    summary = evaluate_and_report(config, f"{out}/samples", couplings, teacher, students, out)
    step(6, "done")
    click.echo(summary)
