"""`nfm store`: look at stores, check them, and move them about."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import click

from nfm.pipeline.errors import continues_when_repeated
from nfm.pipeline.output import echo
from nfm.stages.progress import Progress, print_line
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.messages import count, list_numbers

if TYPE_CHECKING:
    from nfm.storage_specs.format.schema import LayoutName
    from nfm.storage_specs.reading.store import Store


def storage_option(command: Callable[..., None]) -> Callable[..., None]:
    """The option of every command that says how storage is reached."""

    @click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="STORAGE.KEY=VALUE",
        help="How storage is reached, as in storage.options.s3.endpoint_url=…; may be repeated.",
    )
    @functools.wraps(command)
    def wrapped(overrides: tuple[str, ...], **arguments: Any) -> None:
        from nfm.pipeline.config import load_storage

        load_storage(overrides).apply()
        command(**arguments)

    return wrapped


def store_command(command: Callable[..., None]) -> Callable[..., None]:
    """The argument and option of every command that gets an open store. URL@v1 or URL@tag is an older version."""

    @click.argument("url")
    @storage_option
    @functools.wraps(command)
    def wrapped(url: str, **arguments: Any) -> None:
        from nfm.storage_specs.reading.store import Store

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
    from nfm.storage_specs.format.sums import moments as compute_moments

    versions = describe_versions(store)
    rms = float(np.sqrt(np.square(store.sigma_f, dtype=np.float64).mean())) if store.spec.coupling else None
    echo(*summarize(store.dataset, rms).split("\n"))
    if store.z_sums is not None:
        moments = compute_moments(store.spec, store.z_sums.by_dimension)
        text = (
            f"mean {moments.mean:.3f} σ, skewness {moments.skewness:.3f}, "
            f"excess kurtosis {moments.excess_kurtosis:.3f} (rms over dimensions; 0 of a Gaussian)"
        )
        if not np.isfinite(moments).all():
            text = "none: z does not vary, or its sums are not those of any values; nfm store verify compares them"
        echo(f"{'z moments':12}{text}")
    for number, line in enumerate(versions):
        echo(f"{'versions' if number == 0 else '':12}{line}")
    if plot is not None:
        with Progress("plot"):
            from nfm.pipeline.store_plot import plot_store

            plot_store(store, plot)
        echo(f"{'picture':12}{plot}")


def describe_versions(store: Store) -> list[str]:
    """A line for each version of a store, with its tags; none for a store of schema 1.0. Raises StoreError if a
    document is damaged."""
    from nfm.storage_specs.reading.versions import Tags, list_documents, list_tags

    documents = list_documents(store.root, store.opened)
    tags: dict[int, list[str]] = {}
    version_of = Tags(store.root, {dataset.version: dataset.id for dataset in documents}).version_of
    for tag in list_tags(store.root):
        tags.setdefault(version_of(tag), []).append(tag)
    lines = []
    for dataset in documents:
        names = "".join(f" @{tag}" for tag in tags.get(dataset.version, []))
        draws = f", {count(dataset.spec.num_draws, 'draw')}" if dataset.spec.num_draws else ""
        licence = f", licence {dataset.attribution.licence}" if dataset.attribution.licence else ""
        lines.append(f"@v{dataset.version}{names}: id {dataset.id[:12]}{draws}{licence}")
    return lines


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
    """Read every file and check size, sha256, structure, labels, finite values, and all that is computed from them."""
    from nfm.storage_specs.reading.verify import describe_weak_promises, find_faults

    options_agree = bool(num_pairs) == (teacher is not None)
    if not options_agree or (num_pairs and store.spec.coupling is None):
        raise StoreError(f"{store.url}: --reencode N and --teacher MODEL go together, for a coupling store")
    if seed is not None and not num_pairs:
        raise StoreError("got --seed without --reencode N, whose pairs it chooses; expected both or none")
    num_faults = 0
    with Progress("verify", store.dataset.totals.bytes, "B") as progress:
        for fault in find_faults(store, progress.advance):
            num_faults += 1
            print_line(fault.message)
    if num_faults:
        raise StoreError(f"{store.url}: {count(num_faults, 'fault')}; nfm store repair mends them, or says what does")
    if teacher is not None and num_pairs:
        from nfm.stages.reencode import verify_by_reencoding

        reencoding = verify_by_reencoding(store, teacher, num_pairs, seed or 0)
        echo(
            f"{store.url}: z of {count(reencoding.num_pairs, 'pair')} encoded again differs by at most "
            f"{reencoding.largest_difference:.1e} "
            "of the root mean square of z"
        )
    for promise in describe_weak_promises(store):
        echo(f"note: {promise}")
    echo(f"{store.url}: {len(store.files)} files are sound")


@store.command()
@click.argument("url")
@storage_option
def repair(url: str) -> None:
    """Write damaged documents again, and mark exactly the blocks with bad or missing files, for the command that wrote
    the store to write them again."""
    from nfm.storage_specs.writing.repair import repair_store

    with Progress("verify", unit="B") as progress:
        repaired = repair_store(url, progress.advance)
    for fault in repaired.faults:
        print_line(fault)
    if not repaired.faults:
        echo(f"{url}: nothing to repair")
    elif repaired.is_complete:
        echo(f"{url}: repaired; no block was damaged")
    else:
        blocks = repaired.damaged_blocks
        what = f"{count(len(blocks), 'block')} ({list_numbers(blocks)})" if blocks else "its documents"
        echo(
            f"{url}: {what} must be written again; run the command that wrote the store (nfm encode, prepare or store "
            "convert) again, with the same arguments, to complete it"
        )


@store.command()
@continues_when_repeated
@store_command
@click.argument("out")
@click.option("--layout", required=True, type=click.Choice(["webdataset", "zarr", "tuples"]))
def convert(store: Store, out: str, layout: str) -> None:
    """Write the same store to OUT in another layout, without loss. A store of schema 1.0 becomes one of 1.1.

    --layout tuples writes WebDataset tar files whose samples hold x, z, noise and label together, for readers that take
    one file at a time; nfm does not read them back.
    """
    from nfm.storage_specs.writing.transfer import convert_store
    from nfm.storage_specs.writing.tuples import export_tuples

    passes = 1 if layout == "tuples" else 2  # a store is read back in the end
    with Progress(f"convert to {layout}", passes * store.spec.rows, "image") as progress:
        if layout == "tuples":
            result = f"{export_tuples(store, out, progress.advance, options=None)} files of tuples"
        else:
            dataset = convert_store(store, out, cast("LayoutName", layout), progress.advance, options=None)
            result = f"store {dataset.id[:12]}, {layout} layout"
    echo(f"{out}: {result}")


@store.command()
@continues_when_repeated
@store_command
@click.argument("out")
def copy(store: Store, out: str) -> None:
    """Copy the store to OUT, local or remote, and read it back; the same command again continues.

    A copy of URL@v1 has version 1 as its newest.
    """
    from nfm.storage_specs.reading.verify import describe_weak_promises
    from nfm.storage_specs.writing.transfer import copy_store

    with Progress("copy and check", 2 * store.dataset.totals.bytes, "B") as progress:
        num_written = copy_store(store, out, progress.advance, options=None)
    for promise in describe_weak_promises(store):
        echo(f"note: {promise}")
    echo(f"{out}: {num_written} of {len(store.files)} files written, all {len(store.files)} checked")


@store.command()
@store_command
@click.option("--licence", help="SPDX expression, such as CC-BY-4.0 or LicenseRef-my-terms.")
@click.option("--citation", help="How to cite the data: a reference, or BibTeX.")
@click.option("--creator", help="Who made the data: a person or an organization.")
@click.option("--source-url", help="Where the data were obtained.")
@click.option("--notes", help="Anything else that a user of the data should know.")
@click.option(
    "--remove",
    "removed",
    multiple=True,
    type=click.Choice(["licence", "citation", "creator", "source-url", "notes"]),
    help="A field that the store should no longer have; may be repeated.",
)
def annotate(store: Store, removed: tuple[str, ...], **fields: str | None) -> None:
    """Say where the data come from and on what terms: a new version with the same files and id.

    Options that are not given leave what the store says.
    """
    from nfm.pipeline.config import parse_attribution
    from nfm.storage_specs.writing.publish import annotate_store

    given = {name: value for name, value in fields.items() if value is not None}
    if not given and not removed:
        raise StoreError("got nothing to annotate; expected a field to set or --remove: see nfm store annotate --help")
    dataset = annotate_store(store, parse_attribution(given), [field.replace("-", "_") for field in removed])
    is_new = dataset.version != store.dataset.version
    result = f"version {dataset.version}" if is_new else f"nothing changed, version {dataset.version} stays"
    echo(f"{store.url}: {result}, id {dataset.id[:12]}")


@store.command()
@store_command
@click.argument("name")
def tag(store: Store, name: str) -> None:
    """Give a version a name, under which URL@NAME opens it: that of URL@v1, or without @ the newest."""
    from nfm.storage_specs.writing.publish import tag_version

    tag_version(store, name)
    echo(f"{store.url}@{name}: version {store.dataset.version}, id {store.dataset.id[:12]}")
