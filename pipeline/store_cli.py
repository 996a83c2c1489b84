"""`nfm store`: look at stores, check them, and move them about."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import click

from nfm.pipeline.errors import continues_when_repeated
from nfm.stages.progress import Progress, print_line
from nfm.storage_specs.storage.errors import StoreError

if TYPE_CHECKING:
    from nfm.storage_specs.format.schema import LayoutName
    from nfm.storage_specs.reading.store import Store

MAX_LISTED_BLOCKS = 20  # blocks that `repair` names


def store_command(command: Callable[..., None]) -> Callable[..., None]:
    """The argument and option that every command shares; the command gets an open store."""

    @click.argument("url")
    @click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="STORAGE.KEY=VALUE",
        help="How storage is reached, as in storage.options.s3.endpoint_url=…; may be repeated.",
    )
    @functools.wraps(command)
    def wrapped(url: str, overrides: tuple[str, ...], **arguments: Any) -> None:
        from nfm.pipeline.config import load_storage
        from nfm.storage_specs.reading.store import Store

        load_storage(overrides).apply()
        with Progress(f"open {url}"):
            store = Store(url)
        command(store=store, **arguments)

    return wrapped


@click.group(short_help="Look at stores, check them, move them about.")
def store() -> None:
    """Look at sample and coupling stores, check them, and move them about."""


@store.command()
@store_command
@click.option("--plot", metavar="PNG", help="Draw some x, and the histogram of z against the normal, into a file.")
def info(store: Store, plot: str | None) -> None:
    """What the store holds, and what each column costs."""
    import numpy as np

    from nfm.storage_specs.format.card import summarize

    rms = float(np.sqrt(np.square(store.sigma_f, dtype=np.float64).mean())) if store.spec.coupling else None
    click.echo(summarize(store.dataset, rms))
    if plot is not None:
        with Progress("plot"):
            from nfm.pipeline.store_plot import plot_store

            plot_store(store, plot)
        click.echo(f"{'picture':12}{plot}")


@store.command()
@store_command
@click.option(
    "--reencode",
    "num_pairs",
    default=0,
    metavar="N",
    type=click.IntRange(0),
    help="Run the teacher again on N random pairs of an image and a draw.",
)
@click.option("--teacher", metavar="MODEL", help="model.safetensors of the teacher that made the store.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Which N pairs are encoded again; 0 if not given.")
def verify(store: Store, num_pairs: int, teacher: str | None, seed: int | None) -> None:
    """Read every file and check size, sha256, structure, labels, counts and finite values."""
    options_agree = bool(num_pairs) == (teacher is not None)
    if not options_agree or (num_pairs and store.spec.coupling is None):
        raise StoreError(f"{store.url}: --reencode N and --teacher MODEL go together, for a coupling store")
    if seed is not None and not num_pairs:
        raise StoreError("got --seed without --reencode N, whose pairs it chooses; expected both or none")
    num_faults = 0
    with Progress("verify", store.dataset.totals.bytes, "B") as progress:
        for fault in store.find_faults(progress.advance):
            num_faults += 1
            print_line(fault.message)
    if num_faults:
        raise StoreError(
            f"{store.url}: {num_faults} faults in {len(store.files)} files; "
            "nfm store repair marks their blocks to be written again"
        )
    if teacher is not None and num_pairs:
        from nfm.stages.encode import verify_by_reencoding

        largest_difference = verify_by_reencoding(store, teacher, num_pairs, seed or 0)
        click.echo(f"{store.url}: z of {num_pairs} pairs encoded again differs by at most {largest_difference:.1e} σ_f")
    click.echo(f"{store.url}: {len(store.files)} files are sound")


@store.command()
@store_command
def repair(store: Store) -> None:
    """Mark exactly the blocks with bad or missing files, for the command that wrote the store to write them again."""
    from nfm.storage_specs.writing.transfer import repair_store

    with Progress("verify", store.dataset.totals.bytes, "B") as progress:
        faults, blocks = repair_store(store, progress.advance)
    for fault in faults:
        click.echo(fault, err=True)
    if not faults:
        click.echo(f"{store.url}: nothing to repair")
        return
    click.echo(
        f"{store.url}: {describe_blocks(blocks, store.spec.blocks)} must be written again; "
        "run the command that wrote the store (nfm encode, prepare, or store convert) again, "
        "with the same arguments, to complete it"
    )


def describe_blocks(blocks: list[int], num_blocks: int) -> str:
    """`2 of 6 blocks (1, 4)`, naming at most MAX_LISTED_BLOCKS of them; `0 of 6 blocks` if only documents are bad."""
    if not blocks:
        return f"0 of {num_blocks} blocks"
    listed = ", ".join(str(block) for block in blocks[:MAX_LISTED_BLOCKS])
    if len(blocks) > MAX_LISTED_BLOCKS:
        listed += f" and {len(blocks) - MAX_LISTED_BLOCKS} more"
    return f"{len(blocks)} of {num_blocks} blocks ({listed})"


@store.command()
@continues_when_repeated
@store_command
@click.argument("out")
@click.option("--layout", required=True, type=click.Choice(["webdataset", "zarr", "tuples"]))
def convert(store: Store, out: str, layout: str) -> None:
    """Write the same store to OUT in another layout, without loss.

    --layout tuples writes WebDataset tar files whose samples hold x, z, noise and label together, for readers that take
    one file at a time; nfm does not read them back.
    """
    from nfm.storage_specs.writing.transfer import convert_store, export_tuples

    with Progress(f"convert to {layout}", store.spec.rows, "image") as progress:
        if layout == "tuples":
            result = f"{export_tuples(store, out, progress.advance, options=None)} files of tuples"
        else:
            dataset = convert_store(store, out, cast("LayoutName", layout), progress.advance, options=None)
            result = f"store {dataset.id[:12]}, {layout} layout"
    click.echo(f"{out}: {result}")


@store.command()
@continues_when_repeated
@store_command
@click.argument("out")
def copy(store: Store, out: str) -> None:
    """Copy the store to OUT, local or remote, and read it back; the same command again continues."""
    from nfm.storage_specs.writing.transfer import copy_store

    with Progress("copy and check", 2 * store.dataset.totals.bytes, "B") as progress:
        num_written = copy_store(store, out, progress.advance, options=None)
    click.echo(f"{out}: {num_written} of {len(store.files)} files written, all {len(store.files)} checked")
