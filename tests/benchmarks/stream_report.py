"""docs/benchmarks/streaming.md and its picture, from the results of a run."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from tests.benchmarks.stores import BLOCK_ROWS, CASES
from tests.benchmarks.stream import BATCH, LIBRARIES, OURS, PEERS

FOLDER = Path("docs/benchmarks")
PRODUCTS = {"stored": "as stored (x uint8, z float16)", "float32": "as float32 (x in [−1, 1], z / σ_f)"}


def write(results: dict[str, Any]) -> None:
    machine = results["machine"]
    versions = dict(machine["versions"])
    for case in results["formats"].values():
        for row in case["float32"].values():
            versions |= {f"{name} (peers)": value for name, value in row.get("versions", {}).items()}
    text = [
        "# Streaming",
        "",
        "```sh",
        "make bench-stream",
        "```",
        "",
        f"On {machine['cores']} cores of {machine['cpu']}, Linux {machine['kernel']}; "
        f"medians of {machine['rounds']} × {machine['repeats']} measurements: "
        "the rows of a table take turns, each in a process of its own on one core, with everything in the page cache. "
        f"Batches of {BATCH} pairs in a globally shuffled order (or as near as a reader comes), random draws, K = 4, "
        f"blocks of {BLOCK_ROWS:,} images. Versions: "
        + ", ".join(f"{name} {value}" for name, value in sorted(versions.items()))
        + ".",
        "",
        "Every reader ends with the same product, by the same code, in one of two forms: the values *as stored*, "
        "which is what a trainer brings to its GPU and converts there, "
        "and *float32*, which is what `CouplingStream` gives by default.",
        "",
        "Formats, scaling, object storage and training are parts that may be measured at different times (`--parts`); "
        "every ratio is within one part.",
        "",
    ]
    for case in CASES:
        for product, title in PRODUCTS.items():
            text += _table(case.name, title, results["formats"][case.name][product], case.shape, product)
    text += _judgement(results)
    text += _scaling(results["scaling"]) + _remote(results["remote"]) + _training(results["training"])
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "streaming.md").write_text("\n".join(text) + "\n")
    _picture(results["scaling"])


def _table(case: str, title: str, rows: dict[str, Any], shape: tuple[int, int, int], product: str) -> list[str]:
    values = shape[0] * shape[1] * shape[2]
    best = rows["RAM, into preallocated outputs"]["pairs_per_s"]
    lines = [
        f"## {case}, {title}",
        "",
        f"The values of a pair with its share of x are {2 * values + values // 4:,} bytes.",
        "",
        "| reader | pairs/s | range | of RAM | first batch, s | peak memory, MB | bytes on disk a pair |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    pairs = {name: images * draws for name, images, draws in ((c.name, c.images, c.draws) for c in CASES)}[case]
    for name in (*OURS, *PEERS.values()):
        if name in rows:
            row = rows[name]
            mark = "**" if name in OURS else ""
            lines.append(
                f"| {mark}{name}{mark} | {row['pairs_per_s']:,.0f} | {row['low']:,.0f} to {row['high']:,.0f} | "
                f"{row['pairs_per_s'] / best:.2f} | {row['first_batch_s']:.2f} | {row['peak_rss_mb']:,.0f} | "
                f"{row['bytes_on_disk'] / pairs:,.0f} |"
            )
    first = ", ".join(f"{rows[name]['first_passes']:,.0f} ({name.split(', ')[1]})" for name in OURS)
    anonymous = ", ".join(f"{rows[name]['anonymous_mb']:,.0f} MB" for name in OURS)
    lines += [
        "",
        f"Ours over the first K epochs, in which each file is opened and checked once: {first} pairs/s. "
        f"Of our peak memory, all but {anonymous} are pages of the files themselves, which the kernel may take back.",
        "",
    ]
    return lines


def _judgement(results: dict[str, Any]) -> list[str]:
    """Each required ratio, met or not."""
    lines = [
        "## Requirements",
        "",
        "| ratio | required |" + "".join(f" {c.name} {p} |" for c in CASES for p in PRODUCTS),
    ]
    lines.append("| --- | ---: |" + " ---: |" * (len(CASES) * len(PRODUCTS)))
    tar, zarr = OURS
    hand_tuned = ("datasets-tuned", "parquet", "arrow-ipc")
    requirements = [
        ("webdataset layout / webdataset with .npy members", 100, tar, ("webdataset",)),
        ("webdataset layout / fastest streaming library", 10, tar, LIBRARIES),
        ("webdataset layout / fastest hand-tuned format", 1, tar, hand_tuned),
        ("webdataset layout / RAM into preallocated outputs", 0.75, tar, ("ram-preallocated",)),
        ("zarr layout / zarr-python's fastest", 3, zarr, ("zarr", "zarr-chunks")),
    ]
    columns = [results["formats"][case.name][product] for case in CASES for product in PRODUCTS]
    for description, required_ratio, layout_name, peers in requirements:
        ratios = [
            rows[layout_name]["pairs_per_s"] / max(rows[PEERS[peer]]["pairs_per_s"] for peer in peers)
            for rows in columns
        ]
        lines.append(
            f"| {description} | {required_ratio} |" + "".join(_cell(ratio, required_ratio) for ratio in ratios)
        )
    ratios = [rows[zarr]["pairs_per_s"] / rows[tar]["pairs_per_s"] for rows in columns]
    lines.append("| zarr layout / webdataset layout | 0.8 |" + "".join(_cell(ratio, 0.8) for ratio in ratios))
    lines += ["", "A ratio in bold meets the requirement.", ""]
    remote, training = results["remote"], results["training"]
    best = max(remote["cold"], remote["cold, windows of 8"])
    wait = max(row["data_wait"] for row in training.values())
    others = [
        ("cold / bare parallel download, thrown away", f"{best / remote['bare, thrown away']:.2f}", "at least 0.8"),
        ("cold / bare parallel download, to disk", f"{best / remote['bare, to disk']:.2f}", "at least 0.8"),
        ("warm cache / local", f"{remote['warm cache'] / remote['local']:.2f}", "1"),
        ("waiting for data in training, at most", f"{100 * wait:.2f} %", "under 1 %"),
    ]
    lines += ["| | measured | required |", "| --- | ---: | ---: |"]
    return [
        *lines,
        *(f"| {description} | {result} | {requirement} |" for description, result, requirement in others),
        "",
    ]


def _cell(ratio: float, required_ratio: float) -> str:
    text = f"{ratio:,.0f}" if ratio >= 20 else f"{ratio:.2f}"
    return f" **{text}** |" if ratio >= required_ratio else f" {text} |"


def _scaling(scaling: dict[str, Any]) -> list[str]:
    windows = scaling["windows"]
    memory = ", ".join(f"{value:.0f}" for value in scaling["memory"])
    return [
        "## Window, size and time",
        "",
        "![pairs/s against the window and the number of blocks](streaming.png)",
        "",
        "3×32×32, float32. Window (blocks shuffled together; None is all 49): "
        + ", ".join(f"{name}: {rate:,.0f}" for name, rate in windows.items())
        + " pairs/s.",
        "",
        "Blocks in the store (shuffled as a whole; the larger ones are hard links to the files of the smallest): "
        + ", ".join(f"{int(name):,}: {rate:,.0f}" for name, rate in scaling["blocks"].items())
        + " pairs/s.",
        "",
        f"Anonymous memory after each of ten epochs: {memory} MB.",
        "",
    ]


def _remote(remote: dict[str, Any]) -> list[str]:
    mib = {name: value / 2**20 for name, value in remote.items()}
    rows = ("bare, thrown away", "bare, to disk", "cold", "cold, windows of 8")
    return [
        "## From an S3 server",
        "",
        "OpenStack Swift with its S3 API on the same two cores, which it keeps busy itself. "
        "Cold: into an empty cache, to the first batch where the whole store is shuffled and so must be there first, "
        "and in windows of 8 blocks to the last batch of an epoch; "
        "sha256, the write to the cache and the checks are in it. "
        "Bare: the same objects through the same client (s3fs), as many at a time, "
        "thrown away or written to files durably, as the cache does.",
        "",
        "| | MiB/s | of bare, thrown away | of bare, to disk |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {name} | {mib[name]:.0f} | {mib[name] / mib[rows[0]]:.2f} | {mib[name] / mib[rows[1]]:.2f} |"
            for name in rows
        ),
        "",
        f"Peak memory of the reading process {remote['peak_rss_mb']:,.0f} MB, pages of mapped files included. "
        f"Warm cache {remote['warm cache']:,.0f} pairs/s, local {remote['local']:,.0f}: ratio "
        f"{remote['warm cache'] / remote['local']:.2f} (all cores, float32).",
        "",
    ]


def _training(training: dict[str, Any]) -> list[str]:
    lines = [
        "## In training",
        "",
        "| student | images | seconds | of them for the first batch | waiting for data after it |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in training.items():
        lines.append(
            f"| {name} | {row['images']:,} | {row['seconds']:.1f} | {row['first_batch_seconds']:.2f} | "
            f"{100 * row['data_wait']:.2f} % |"
        )
    return [*lines, "", "Each model's document has the same number, as `training.data_wait`."]


def _picture(scaling: dict[str, Any]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    windows = list(scaling["windows"].items())
    left.plot([name if name != "None" else "all" for name, _ in windows], [rate / 1000 for _, rate in windows], "o-")
    left.set(xlabel="window, blocks", ylabel="thousand pairs/s", title="49 blocks of 1,024, 3×32×32")
    right.plot([int(name) for name in scaling["blocks"]], [rate / 1000 for rate in scaling["blocks"].values()], "o-")
    right.set(xlabel="blocks in the store", xscale="log", title="shuffled as a whole")
    fastest = max(*scaling["windows"].values(), *scaling["blocks"].values())
    left.set_ylim(0, 1.1 * fastest / 1000)  # shared by both
    figure.tight_layout()
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure.savefig(FOLDER / "streaming.png", dpi=110)
    plt.close(figure)
