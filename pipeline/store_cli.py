"""`nfm store`: look at stores, check them, and move them about."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import click
from tqdm import tqdm

from nfm.storage_specs.storage.errors import StoreError

if TYPE_CHECKING:
    from nfm.storage_specs.format.schema import LayoutName
    from nfm.storage_specs.reading.store import Store


def on_a_store(command: Callable[..., None]) -> Callable[..., None]:
    """The argument and option every command shares; the command gets an open store."""

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
        command(store=Store(url), **arguments)

    return wrapped


@contextmanager
def bar(text: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on the terminal, or a line now and then elsewhere."""
    seconds = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(total=total, desc=text, unit=unit, unit_scale=True, mininterval=seconds, file=sys.stderr) as shown:
        yield lambda done: cast(None, shown.update(done))


@click.group()
def store() -> None:
    """Look at sample and coupling stores, check them, and move them about."""


@store.command()
@on_a_store
@click.option("--plot", metavar="PNG", help="Draw some x, and the histogram of z against the normal, into a file.")
def info(store: Store, plot: str | None) -> None:
    """What the store holds, and what each column costs."""
    import numpy as np

    from nfm.storage_specs.format.card import summarize

    rms = float(np.sqrt(np.square(store.sigma_f, dtype=np.float64).mean())) if store.spec.coupling else None
    click.echo(summarize(store.dataset, rms))
    if plot is not None:
        from nfm.pipeline.store_plot import plot_store

        plot_store(store, plot)
        click.echo(f"{'picture':12}{plot}")


@store.command()
@on_a_store
@click.option("--reencode", default=0, metavar="N", type=click.IntRange(0), help="Run the teacher again on N records.")
@click.option("--teacher", metavar="MODEL", help="model.safetensors of the teacher that made the store.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**31 - 1), help="Which N records.")
def verify(store: Store, reencode: int, teacher: str | None, seed: int) -> None:
    """Read every file and check size, sha256, structure, labels, counts and finite values."""
    if bool(reencode) != (teacher is not None) or (reencode and store.spec.coupling is None):
        raise StoreError(f"{store.url}: --reencode N and --teacher MODEL go together, for a coupling store")
    faults = []
    with bar("verify", store.dataset.totals.bytes, "B") as progress:
        for _, fault in store.find_faults(progress):
            faults.append(fault)
            tqdm.write(fault, file=sys.stderr)
    if faults:
        raise StoreError(
            f"{store.url}: {len(faults)} faults in {len(store.files)} files; nfm store repair queues them to be "
            "written "
            "again"
        )
    if teacher is not None and reencode:
        from nfm.stages.encode import reencode as run

        worst = run(store, teacher, reencode, seed)
        click.echo(f"{store.url}: z of {reencode} records encoded again differs by at most {worst:.1e} σ_f")
    click.echo(f"{store.url}: {len(store.files)} files are sound")


@store.command()
@on_a_store
def repair(store: Store) -> None:
    """Queue exactly the blocks with bad or missing files to be written again by the command that wrote the store."""
    from nfm.storage_specs.writing.transfer import repair_store as run

    with bar("verify", store.dataset.totals.bytes, "B") as progress:
        faults, blocks = run(store, progress)
    for fault in faults:
        click.echo(fault, err=True)
    if not faults:
        click.echo(f"{store.url}: nothing to repair")
        return
    click.echo(
        f"{store.url}: {len(blocks)} of {store.spec.blocks} blocks are queued {blocks[:20]}; run the command that "
        "wrote the "
        "store (nfm encode, prepare, or store convert) again, with the same arguments, to complete it"
    )


@store.command()
@on_a_store
@click.argument("out")
@click.option("--layout", required=True, type=click.Choice(["webdataset", "zarr", "tuples"]))
def convert(store: Store, out: str, layout: str) -> None:
    """Write the same store to OUT in another layout, without loss; or export it as classic tuples."""
    from nfm.storage_specs.writing.transfer import convert_store as run
    from nfm.storage_specs.writing.transfer import export_tuples

    with bar(f"convert to {layout}", store.spec.rows, "img") as progress:
        if layout == "tuples":
            count = export_tuples(store, out, progress, None)
            done = f"{count} shards of tuples"
        else:
            done = f"store {run(store, out, cast('LayoutName', layout), progress, None).id[:12]}, {layout} layout"
    click.echo(f"{out}: {done}")


@store.command()
@on_a_store
@click.argument("out")
def copy(store: Store, out: str) -> None:
    """Copy the store to OUT, local or remote, and read it back; the same command again continues."""
    from nfm.storage_specs.writing.transfer import copy_store as run

    with bar("copy and check", 2 * store.dataset.totals.bytes, "B") as progress:
        written = run(store, out, progress, None)
    click.echo(f"{out}: {written} of {len(store.files)} files written, all {len(store.files)} checked")
