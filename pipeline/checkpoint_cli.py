"""`nfm import` and `nfm export`: networks of the published code of TarFlow and SiT."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nfm.pipeline.output import echo
from nfm.pipeline.store_cli import storage_option
from nfm.stages.errors import StageError

if TYPE_CHECKING:
    from nfm.stages.published_shapes import FormatName

format_argument = click.argument("format_name", metavar="FORMAT", type=click.Choice(["ml-tarflow", "sit"]))


@click.command("import", short_help="A published TarFlow or SiT → model.safetensors.")
@format_argument
@click.argument("file")
@storage_option
@click.option("--out", help="The model to write. If not given: FILE with the ending .safetensors.")
@click.option("--samples", help="A store of such images as the network takes, which says the decoder of latents.")
@click.option("--eta", type=float, help="η, the noise that a teacher was trained with; ml-tarflow needs it.")
@click.option(
    "--image-size", type=click.IntRange(min=1), help="H = W in pixels, where ml-tarflow's shapes fit several."
)
@click.option("--channels", type=click.IntRange(min=1), help="Channels, where ml-tarflow's shapes fit several.")
@click.option(
    "--heads", type=click.IntRange(min=1), help="Attention heads, where they are not those of published sizes."
)
def import_command(
    format_name: FormatName,
    file: str,
    out: str | None,
    samples: str | None,
    eta: float | None,
    image_size: int | None,
    channels: int | None,
    heads: int | None,
) -> None:
    """A network of published code as a finished model for all other commands, and what it is.

    FORMAT is ml-tarflow or sit; FILE is of torch.save (.pt, .pth) or safetensors, and nothing in it is run. Sizes are
    read from the shapes of the tensors; what those do not say is an option.
    """
    from nfm.stages.published import import_published
    from nfm.stages.published_shapes import ImportOptions

    if out is None:
        stem, dot, ending = file.rpartition(".")
        if not dot or "/" in ending or ending == "safetensors":
            raise StageError(f"got {file} and no --out; expected --out, where the model is written")
        out = f"{stem}.safetensors"
    echo(*import_published(format_name, file, out, ImportOptions(eta, image_size, channels, heads), samples))


@click.command("export", short_help="model.safetensors → a file of the published code.")
@format_argument
@click.argument("model")
@click.argument("out")
@storage_option
def export_command(format_name: FormatName, model: str, out: str) -> None:
    """A finished model as a file that the published code loads.

    FORMAT is ml-tarflow for a teacher, sit for a student. An imported model gives back the tensors of its file: the
    same names, shapes, dtypes and values. OUT is of safetensors if it ends so, else of torch.save.
    """
    from nfm.stages.published import export_published

    echo(export_published(format_name, model, out))
