"""The command `nfm`: a subcommand for each stage, and the demo that runs them all.

Each subcommand imports what it needs when it runs, so that `nfm --help` answers at once.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nfm import __version__
from nfm.pipeline.checkpoint_cli import export_command, import_command
from nfm.pipeline.errors import ConfigError, InterruptedRunError, continues_when_repeated
from nfm.pipeline.output import echo, guard_output
from nfm.pipeline.presets import preset_names
from nfm.pipeline.store_cli import store
from nfm.stages.errors import ResumableError, StageError
from nfm.stages.progress import print_line
from nfm.storage_specs.storage.errors import OutageError, ShownError, StoreError

if TYPE_CHECKING:
    from nfm.pipeline.config import Config

USER_ERRORS = (ConfigError, StageError, StoreError, OSError)
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h
EXIT_INTERRUPTED = 130
STUDENT_NAME = re.compile(r"[^\W_]+([-_.]+[^\W_]+)*")  # of a student in the report: my-run


class Shortcut(click.Option):
    """An option that overrides one key of the config, as `--set key=value` does."""

    def __init__(self, *declarations: Any, key: str, **settings: Any) -> None:
        settings["help"] += f" Short for --set {key}=…"
        super().__init__(*declarations, **settings)
        self.key = key


def required_option(*declarations: str, **settings: Any) -> Callable[..., Any]:
    """An option that is required, except with --dry-run."""
    settings["help"] += "  [required]"
    return click.option(*declarations, callback=_require, **settings)


def _require(context: click.Context, option: click.Parameter, value: Any) -> Any:
    if value in (None, ()) and not context.params["dry_run"]:
        raise click.MissingParameter(ctx=context, param=option)
    return value


def config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --preset and --set; the command gets the resolved `config`. Its shortcuts are applied after --set."""

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
        help="Override one key of the preset; may be repeated. nfm config prints all keys.",
    )
    @functools.wraps(command)
    def wrapped(preset: str, overrides: tuple[str, ...], **arguments: Any) -> None:
        from nfm.pipeline.config import load_config

        shortcuts = []
        for option in click.get_current_context().command.params:
            if isinstance(option, Shortcut):
                value = arguments.pop(str(option.name))
                if value is not None:
                    shortcuts.append(f"{option.key}={value}")
        command(config=load_config(preset, [*overrides, *shortcuts]), **arguments)

    return wrapped


def stage_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that all stages share: those of the config, and --dry-run."""

    @config_options
    @click.option(
        "--dry-run",
        is_flag=True,
        is_eager=True,  # parsed first: the other options depend on it
        help="Print the resolved config as TOML, which --preset reads, and stop.",
    )
    @functools.wraps(command)
    def wrapped(config: Config, dry_run: bool, **arguments: Any) -> None:
        if dry_run:
            print_config(config)
        else:
            config.storage.apply()
            command(config=config, **arguments)

    return wrapped


def print_config(config: Config) -> None:
    """Prints the config as a TOML file with comments."""
    from nfm.pipeline.config_docs import config_toml

    echo(*config_toml(config).splitlines())


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def nfm() -> None:
    """Normalized Flow Matching: train flow-matching students on the noise/data pairs of a normalizing-flow teacher.

    Data flows one way: prepare → train-teacher → encode → train-student → evaluate. Stores and checkpoints are local
    paths or any fsspec URL (s3://, gs://). The same command again continues where it stopped.
    """


@nfm.command("config", short_help="All keys with meaning, values and default, as TOML.")
@config_options
def config_command(config: Config) -> None:
    """All keys of the config, with meaning, values and default: a TOML file to save, change and give to --preset."""
    print_config(config)


@nfm.command()
@continues_when_repeated
@stage_options
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Image folder: train/<class>/*.jpg (or .jpeg, .png, .webp, .gif, .bmp), and optionally val/<class>/*.jpg.",
)
@required_option("--out", help="Where the sample stores train and val are written.")
@click.option(
    "--skip-bad-images", is_flag=True, help="Leave out images that do not decode, and count them, instead of stopping."
)
@click.option("--licence", cls=Shortcut, key="attribution.licence", help="SPDX licence of the data, as CC-BY-4.0.")
def prepare(config: Config, data: Path | None, out: str, skip_bad_images: bool) -> None:
    """Images → sample stores (x as uint8, label, index).

    Images are turned upright as their EXIF data say, and resized to data.image_size with PIL's box filter, as in the
    paper. One that is not square is stretched to a square as a whole: nothing is cropped or padded.
    """
    from nfm.stages.prepare import prepare as run

    run(config.data, out, data, skip_bad_images, config.attribution)
    echo(f"{out}/train and {out}/val are complete; nfm store info shows what they hold")


@nfm.command(short_help="Sample store → TarFlow teacher.")
@continues_when_repeated
@stage_options
@required_option("--samples", help="Folder of the sample stores train and val: the --out of prepare.")
@required_option("--out", help="Folder of the checkpoint; model.safetensors is the finished teacher.")
def train_teacher(config: Config, samples: str, out: str) -> None:
    """Sample store → TarFlow teacher, chosen by held-out likelihood."""
    from nfm.stages.train_teacher import train_teacher as run

    document = run(config.teacher, samples, out)
    echo(
        f"{out}/model.safetensors: {document['bpd']:.3f} bits per dimension held out, "
        f"chosen at {document['training']['chosen_at']} images"
    )


@nfm.command(short_help="Sample store + teacher → coupling store, on Ray.")
@continues_when_repeated
@stage_options
@required_option("--samples", help="The sample store to encode: train in the --out of prepare.")
@required_option("--teacher", help="model.safetensors of a teacher.")
@required_option("--out", help="Where the coupling store is written.")
@click.option(
    "--layout", cls=Shortcut, key="encode.layout", type=click.Choice(["webdataset", "zarr"]), help="File layout."
)
@click.option(
    "--z-dtype",
    cls=Shortcut,
    key="encode.z_dtype",
    type=click.Choice(["float32", "float16", "bfloat16", "int8"]),
    help="Number format of z; nfm store info shows what it costs.",
)
@click.option(
    "--noise",
    cls=Shortcut,
    key="encode.noise",
    type=click.Choice(["stored", "derived"]),
    help="Whether the noise is written, or computed again by readers.",
)
@click.option(
    "--draws",
    cls=Shortcut,
    key="encode.draws",
    type=click.IntRange(min=1),
    help="Noise draws for each image; if the store has fewer, the others are added.",
)
@click.option(
    "--precision",
    cls=Shortcut,
    key="encode.precision",
    type=click.Choice(["fp32", "tf32", "bf16"]),
    help="Arithmetic of the teacher.",
)
@click.option(
    "--max-bad",
    cls=Shortcut,
    key="encode.max_bad",
    type=click.IntRange(min=0),
    help="Non-finite pairs to tolerate before stopping at once; "
    "with any, the job still fails at the end and lists them.",
)
@click.option(
    "--device",
    cls=Shortcut,
    key="encode.device",
    type=click.Choice(["cuda", "cpu"]),
    help="Device of the workers; without it, what the cluster has.",
)
@click.option(
    "--workers",
    cls=Shortcut,
    key="encode.workers",
    type=click.IntRange(min=1),
    help="Largest number of workers, also if the cluster has room for more.",
)
@click.option(
    "--cpus-per-worker",
    cls=Shortcut,
    key="encode.cpus_per_worker",
    type=click.IntRange(min=1),
    help="CPU cores of each worker.",
)
@click.option(
    "--insecure-cluster",
    cls=Shortcut,
    key="encode.insecure_cluster",
    flag_value="true",
    help="Use a cluster in RAY_ADDRESS that has no authentication.",
)
@click.option("--json-progress", "as_json", is_flag=True, help="Progress and summary as JSON lines on stdout.")
@click.option(
    "--estimate", is_flag=True, help="Time the teacher on one worker, print what the job costs and saves, and stop."
)
def encode(config: Config, samples: str, teacher: str, out: str, as_json: bool, estimate: bool) -> None:
    """Sample store + teacher → coupling store, on all GPUs of a Ray cluster (RAY_ADDRESS) or of this machine.

    z together with its teacher and the noise law is the image: a coupling store is as private as its images.

    Exit code 75: it received SIGTERM, or the cluster is lost; run the same command again to continue.
    """
    from nfm.pipeline.encode_estimate import estimate_job
    from nfm.pipeline.encode_job import encode_couplings
    from nfm.pipeline.encode_report import print_summary

    if estimate:
        report = estimate_job(config.encode, config.student, samples, teacher, out, config.storage, as_json)
        echo(*([json.dumps(report.as_document())] if as_json else report.describe().splitlines()))
        return
    summary = encode_couplings(config.encode, samples, teacher, out, config.storage, as_json, config.attribution)
    print_summary(summary, out, config.student.train.images, as_json)


@nfm.command()
@continues_when_repeated
@stage_options
@required_option("--couplings", "urls", multiple=True, help="A coupling store; several are a mixture.")
@click.option(
    "--weight", "weights", multiple=True, type=float, help="Share of each store of a mixture, in their order."
)
@required_option("--out", help="Folder of the checkpoint; model.safetensors is the finished student.")
@click.option(
    "--coupling",
    cls=Shortcut,
    key="student.coupling",
    type=click.Choice(["nfm", "independent"]),
    help="The noise that an image is paired with: the teacher's, or random.",
)
def train_student(config: Config, urls: tuple[str, ...], weights: tuple[float, ...], out: str) -> None:
    """Coupling store → SiT student. Under torchrun, all processes train one student."""
    from nfm.stages.train_student import train_student as run
    from nfm.storage_specs.reading.stream import Source

    if weights and len(urls) == 1:
        raise StageError("got --weight for one store; it is a share of a mixture: expected several --couplings")
    if weights and len(weights) != len(urls):
        raise StageError(f"got {len(weights)} --weight for {len(urls)} --couplings; expected one each, or none")
    sources = [Source(url, weight) for url, weight in zip(urls, weights or (1.0,) * len(urls), strict=True)]
    document = run(config.student, sources, out)
    echo(
        f"{out}/model.safetensors: "
        f"loss {document['curves']['loss'][-1]:.4f} after {document['training']['images']} images"
    )


@nfm.command(short_help="Images of a student or a teacher.")
@click.argument("checkpoint")
@click.option("--out", required=True, help="A .png grid, or .npz with arrays x and label.")
@click.option("--count", default=100, show_default=True, type=click.IntRange(min=1), help="How many images.")
@click.option(
    "--sampler",
    help="Of a student: heun<NFE> or euler<NFE>, with :t for a linear schedule; heun31 if not given. "
    "A teacher has none.",
)
@click.option("--class", "classes", multiple=True, type=int, help="Only this class index (-1: none); may be repeated.")
@click.option(
    "--guidance",
    default=1.0,
    show_default=True,
    help="Weight of classifier-free guidance; 1 is none. At least 0 for a student, 1 for a teacher.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1), help="Same seed, same images.")
def sample(
    checkpoint: str, out: str, count: int, sampler: str | None, classes: tuple[int, ...], guidance: float, seed: int
) -> None:
    """Draw images from the model.safetensors of a student or a teacher."""
    from nfm.models.solvers import parse_sampler
    from nfm.stages.sample import SampleRequest
    from nfm.stages.sample import sample as run

    try:
        parsed = None if sampler is None else parse_sampler(sampler)
    except ValueError as error:
        raise StageError(str(error)) from error
    run(checkpoint, out, SampleRequest(count, parsed, classes, guidance, seed))
    echo(f"{out}: {count} images")


@nfm.command(short_help="Teacher and students → metrics.json and a report.")
@stage_options
@required_option("--samples", help="Folder of the sample stores train and val: the --out of prepare.")
@required_option("--couplings", help="The coupling store that the students were trained on.")
@required_option("--teacher", help="model.safetensors of the teacher.")
@required_option(
    "--student",
    "students",
    multiple=True,
    metavar="NAME=URL",
    help="model.safetensors of a student; may be repeated.",
)
@required_option("--out", help="Folder for metrics.json and report.html.")
def evaluate(config: Config, samples: str, couplings: str, teacher: str, students: tuple[str, ...], out: str) -> None:
    """Teacher and students → metrics.json and a report to look at."""
    from nfm.pipeline.evaluation import evaluate_and_report

    named: dict[str, str] = {}
    for student in students:
        name, equals, url = student.partition("=")
        if not equals or not STUDENT_NAME.fullmatch(name):
            raise StageError(
                f"got --student {student!r}; expected NAME=URL, as in my-run=runs/student/model.safetensors, "
                "where NAME is letters and digits, with -, _ and . between them"
            )
        if name in named:
            raise StageError(f"got --student {name}=… twice; expected another name for each student")
        named[name] = url
    echo(*evaluate_and_report(config, samples, couplings, teacher, named, out))


@nfm.command(short_help="All stages on small data, and their report.")
@continues_when_repeated
@stage_options
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
nfm.add_command(import_command)
nfm.add_command(export_command)


def main() -> None:
    """Runs `nfm` and exits with a code that says how it ended.

    0: done. 1: the run failed. 2: the user can fix it, and the message says how. 75: it received SIGTERM, or lost its
    machines or its storage; the same command continues. 130: Ctrl-C; the message says if the same command continues.
    """
    guard_output()
    try:
        nfm.main(standalone_mode=False)
    except click.ClickException as error:
        if isinstance(error, click.UsageError) and error.ctx is not None:
            for line in error.ctx.get_usage().split("\n"):
                print_line(line)
            print_line(f"Try '{error.ctx.command_path} --help' for help.")
        print_line(f"Error: {error.format_message()}")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print_line("interrupted")
        sys.exit(EXIT_INTERRUPTED)
    except OutageError as error:  # before USER_ERRORS: it is a StoreError too, but there is nothing to fix
        print_error("error", error)
        sys.exit(EXIT_RESUMABLE)
    except USER_ERRORS as error:
        print_error("error", error)
        sys.exit(EXIT_USER)
    except InterruptedRunError as error:
        click.echo(err=True)  # the terminal shows ^C
        print_line(f"{error}; run the same command again to continue")
        sys.exit(EXIT_INTERRUPTED)
    except ResumableError as error:
        print_line(f"{error}; run the same command again to continue")
        if error.skips_cleanup:
            sys.stdout.flush()
            os._exit(EXIT_RESUMABLE)
        sys.exit(EXIT_RESUMABLE)
    except FloatingPointError as error:
        print_error("failed", error)
        sys.exit(EXIT_FAILED)


def print_error(kind: str, error: Exception) -> None:
    """Print an error on stderr: on one line, or on the lines of a ShownError."""
    first, *others = str(error).split("\n") if isinstance(error, ShownError) else [str(error)]
    for line in (f"{kind}: {first}", *others):
        print_line(line)
