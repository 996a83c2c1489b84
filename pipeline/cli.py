"""`nfm`: one command a stage, and the demo that runs them all.

Every command imports what it needs when it runs, so that `nfm --help` answers at once.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nfm.pipeline.errors import ConfigError
from nfm.pipeline.presets import preset_names
from nfm.pipeline.store_cli import store
from nfm.stages.errors import ResumableError, StageError
from nfm.storage_specs.storage.errors import OutageError, StoreError

if TYPE_CHECKING:
    from nfm.pipeline.config import Config

USER_ERRORS = (ConfigError, StageError, StoreError, OSError)
EXIT_FAILED, EXIT_USER, EXIT_RESUMABLE, EXIT_INTERRUPTED = 1, 2, 75, 130


def configured(command: Callable[..., None]) -> Callable[..., None]:
    """The options every stage shares; the command gets the resolved `config`, with `shortcuts` applied last."""

    @click.option(
        "--preset",
        default="digits",
        show_default=True,
        help=f"One of {', '.join(preset_names())}, or the path of a .toml file.",
    )
    @click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Override one value of the preset; may be repeated.",
    )
    @click.option("--dry-run", is_flag=True, help="Print the resolved config and stop.")
    @functools.wraps(command)
    def wrapped(preset: str, overrides: tuple[str, ...], dry_run: bool, **arguments: Any) -> None:
        from nfm.pipeline.config import load_config

        shortcuts = {key: arguments.pop(name) for name, key in SHORTCUTS.items() if name in arguments}
        chosen = [f"{key}={value}" for key, value in shortcuts.items() if value is not None]
        config = load_config(preset, [*overrides, *chosen])
        if dry_run:
            click.echo(config.model_dump_json(indent=2))
        else:
            config.storage.apply()
            command(config=config, **arguments)

    return wrapped


SHORTCUTS = {
    "layout": "encode.layout",
    "draws": "encode.draws",
    "z_dtype": "encode.z_dtype",
    "noise": "encode.noise",
    "precision": "encode.precision",
    "max_bad": "encode.max_bad",
    "device": "encode.device",
    "workers": "encode.workers",
    "cpus_per_worker": "encode.cpus_per_worker",
    "coupling": "student.coupling",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="nfm")
def nfm() -> None:
    """Normalized Flow Matching: train flow-matching students on the noise/data pairs of a normalizing-flow teacher.

    Data flows one way: prepare → train-teacher → encode → train-student → evaluate. Stores and checkpoints are local
    paths or any fsspec URL (s3://, gs://). The same command again continues where it stopped.
    """


@nfm.command()
@configured
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Image folder: train/<class>/*.jpg, and optionally val/<class>/*.jpg.",
)
@click.option("--out", required=True, help="Where the sample stores train and val are written.")
@click.option(
    "--skip-bad-images", is_flag=True, help="Leave out images that do not decode, and count them, instead of stopping."
)
def prepare(config: Config, data: Path | None, out: str, skip_bad_images: bool) -> None:
    """Images → sample stores (x as uint8, label, index)."""
    from nfm.stages.prepare import prepare as run

    run(config.data, out, data, skip_bad_images)
    click.echo(f"{out}/train and {out}/val are complete; nfm store info shows what they hold")


@nfm.command()
@configured
@click.option("--samples", required=True, help="What prepare wrote.")
@click.option("--out", required=True, help="Folder of the checkpoint; model.safetensors is the finished teacher.")
def train_teacher(config: Config, samples: str, out: str) -> None:
    """Sample store → TarFlow teacher, chosen by held-out likelihood."""
    from nfm.stages.train_teacher import train_teacher as run

    document = run(config.teacher, samples, out)
    click.echo(
        f"{out}/model.safetensors: {document['bpd']:.3f} bits per dimension held out, chosen at "
        f"{document['training']['chosen_at']} images"
    )


@nfm.command()
@configured
@click.option("--samples", required=True, help="The sample store to encode: the train folder of what prepare wrote.")
@click.option("--teacher", required=True, help="model.safetensors of a teacher.")
@click.option("--out", required=True, help="Where the coupling store is written.")
@click.option("--layout", type=click.Choice(["webdataset", "zarr"]), help="Short for --set encode.layout=…")
@click.option(
    "--z-dtype",
    type=click.Choice(["float32", "float16", "bfloat16", "int8"]),
    help="Short for --set encode.z_dtype=…; nfm store info shows what it costs.",
)
@click.option("--noise", type=click.Choice(["stored", "derived"]), help="Short for --set encode.noise=…")
@click.option(
    "--draws",
    type=click.IntRange(min=1),
    help="Noise draws an image; more than a store has are added to it. Short for --set encode.draws=…",
)
@click.option(
    "--precision", type=click.Choice(["fp32", "tf32", "bf16"]), help="Of the teacher; --set encode.precision=…"
)
@click.option(
    "--max-bad", type=click.IntRange(min=0), help="Go on past this many pairs whose z is not finite, to name them all."
)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Of the workers; by default what the cluster has.")
@click.option("--workers", type=click.IntRange(min=1), help="At most so many, also where the cluster has more room.")
@click.option("--cpus-per-worker", type=click.IntRange(min=1), help="CPU cores of each worker.")
@click.option("--json-progress", "as_json", is_flag=True, help="Progress and summary as JSON lines on stdout.")
@click.option("--estimate", is_flag=True, help="Time a few batches on one worker, print what the job will cost, stop.")
def encode(config: Config, samples: str, teacher: str, out: str, as_json: bool, estimate: bool) -> None:
    """Sample store + teacher → coupling store, on all GPUs of a Ray cluster (RAY_ADDRESS) or of this machine.

    Exit code 75: told to end (SIGTERM), or the cluster is lost; the same command continues.
    """
    from nfm.pipeline import encode_job
    from nfm.pipeline.encode_report import print_summary

    if estimate:
        click.echo(encode_job.estimate(config.encode, samples, teacher, out, config.storage))
        return
    summary = encode_job.encode_couplings(config.encode, samples, teacher, out, config.storage, as_json)
    print_summary(summary, out, config.student.train.images, as_json)


@nfm.command()
@configured
@click.option("--couplings", "urls", required=True, multiple=True, help="A coupling store; several are a mixture.")
@click.option(
    "--weight", "weights", multiple=True, type=float, help="Share of each store of a mixture, in their order."
)
@click.option("--out", required=True, help="Folder of the checkpoint; model.safetensors is the finished student.")
@click.option("--coupling", type=click.Choice(["nfm", "independent"]), help="Short for --set student.coupling=…")
def train_student(config: Config, urls: tuple[str, ...], weights: tuple[float, ...], out: str) -> None:
    """Coupling store → SiT student. Under torchrun, all processes train one student."""
    from nfm.stages.train_student import train_student as run
    from nfm.storage_specs.reading.stream import Source

    if weights and len(weights) != len(urls):
        raise StageError(f"got {len(weights)} --weight for {len(urls)} --couplings; expected one each, or none")
    sources = [Source(url, weight) for url, weight in zip(urls, weights or (1.0,) * len(urls), strict=True)]
    document = run(config.student, sources, out)
    click.echo(
        f"{out}/model.safetensors: loss {document['curves']['loss'][-1]:.4f} after "
        f"{document['training']['images']} images"
    )


@nfm.command()
@click.argument("checkpoint")
@click.option("--out", required=True, help="A .png grid, or .npz with arrays x and label.")
@click.option("--count", default=100, show_default=True, type=click.IntRange(min=1), help="How many images.")
@click.option(
    "--sampler", default="heun31", show_default=True, help="heun<NFE> or euler<NFE>, with :t for a linear schedule."
)
@click.option("--class", "classes", multiple=True, type=int, help="Only this class index (-1: none); may be repeated.")
@click.option("--guidance", default=1.0, show_default=True, help="Classifier-free guidance weight; 1 is none.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1), help="Same seed, same images.")
def sample(
    checkpoint: str, out: str, count: int, sampler: str, classes: tuple[int, ...], guidance: float, seed: int
) -> None:
    """Draw images from the model.safetensors of a student or a teacher."""
    from nfm.models.solvers import parse_sampler
    from nfm.stages.sample import SampleRequest
    from nfm.stages.sample import sample as run

    try:
        parsed = parse_sampler(sampler)
    except ValueError as error:
        raise StageError(str(error)) from error
    run(checkpoint, out, SampleRequest(count, parsed, classes, guidance, seed))
    click.echo(f"{out}: {count} images")


@nfm.command()
@configured
@click.option("--samples", required=True, help="What prepare wrote.")
@click.option("--couplings", required=True, help="The coupling store the students were trained on.")
@click.option("--teacher", required=True, help="model.safetensors of the teacher.")
@click.option(
    "--student",
    "students",
    multiple=True,
    required=True,
    metavar="NAME=URL",
    help="model.safetensors of a student; may be repeated.",
)
@click.option("--out", required=True, help="Folder for metrics.json and report.html.")
def evaluate(config: Config, samples: str, couplings: str, teacher: str, students: tuple[str, ...], out: str) -> None:
    """Teacher and students → metrics.json and a report to look at."""
    from nfm.pipeline.evaluation import evaluate_and_report

    named: dict[str, str] = {}
    for student in students:
        name, equals, url = student.partition("=")
        if not equals or not name.isidentifier():
            raise StageError(f"got --student {student!r}; expected NAME=URL, as in nfm=runs/student/model.safetensors")
        named[name] = url
    click.echo(evaluate_and_report(config, samples, couplings, teacher, named, out))


@nfm.command()
@configured
@click.option("--data", type=click.Path(path_type=Path), help="Image folder instead of the embedded digits.")
@click.option("--out", default="runs/demo", show_default=True, help="Folder of the whole run.")
@click.option(
    "--skip-bad-images", is_flag=True, help="Leave out images that do not decode, and count them, instead of stopping."
)
def demo(config: Config, data: Path | None, out: str, skip_bad_images: bool) -> None:
    """The whole path: data, teacher, couplings in both layouts, two students, evaluation, report."""
    from nfm.pipeline.demo import run_demo

    run_demo(config, out, data, skip_bad_images)


nfm.add_command(store)


def main() -> None:
    """Exit codes: 0 done; 2 something the user can mend, said in one line; 1 a run that failed; 75 (EX_TEMPFAIL) told
    to end or out of machines, and 130 interrupted: the same command continues."""
    try:
        nfm.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; the same command continues", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except OutageError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(EXIT_RESUMABLE)
    except USER_ERRORS as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(EXIT_USER)
    except ResumableError as error:
        click.echo(f"{error}; the same command continues", err=True)
        if error.at_once:
            sys.stdout.flush()
            os._exit(EXIT_RESUMABLE)
        sys.exit(EXIT_RESUMABLE)
    except FloatingPointError as error:
        click.echo(f"failed: {error}", err=True)
        sys.exit(EXIT_FAILED)
