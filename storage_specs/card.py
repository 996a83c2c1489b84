"""The card of a store: the README.md that travels with it, for a team that has none of our code."""

from storage_specs.schema import Dataset, LayoutName

_READ_X: dict[LayoutName, str] = {
    "webdataset": """\
import webdataset as wds

x = wds.WebDataset("x/000000.tar", shardshuffle=False).decode()  # __key__, x.npy, cls
""",
    "zarr": """\
import zarr

group = zarr.open_group(".", mode="r")
x, label = group["x"], group["label"]  # (N, C, H, W) and (N,)
""",
}
_READ_Z: dict[LayoutName, str] = {
    "webdataset": """\
z = wds.WebDataset("z/k000/000000.tar", shardshuffle=False).decode()  # draw 0 of the same images, in the same order
pairs = zip(x, z)
""",
    "zarr": """\
z = group["z"]  # (draws, N, C, H, W)
""",
}


def card(dataset: Dataset) -> str:
    """Markdown that says what the store holds and how stock tools read it."""
    spec, coupling = dataset.spec, dataset.spec.coupling
    shape = "×".join(map(str, spec.shape))
    lines = [
        f"# {spec.kind.capitalize()}: {spec.rows} images {shape}, {spec.num_classes} classes",
        "",
        "x is uint8; x / 127.5 - 1 is the data in [-1, 1].",
    ]
    if coupling:
        lines += [
            f"z = f(x + η·ε′, label), {coupling.z_dtype}, is the raw output of a "
            f"{coupling.teacher.architecture.get('name')} "
            f"teacher for {coupling.draws} draws of ε′ an image, η = {coupling.eta}.",
            "Divide z by `sigma_f.npy` to train a student on it.",
            f"ε′ is stored as `noise`, {coupling.noise.dtype}, exactly as the teacher saw it.",
        ]
    lines += [
        "",
        f"{dataset.totals.files} files, {dataset.totals.bytes} bytes; `manifest.parquet` lists each with its sha256.",
        "",
        "```python",
        _READ_X[spec.layout] + (_READ_Z[spec.layout] if coupling else "") + "```",
    ]
    return "\n".join(lines) + "\n"


def summary(dataset: Dataset) -> str:
    """The store on a terminal."""
    spec, coupling, totals = dataset.spec, dataset.spec.coupling, dataset.totals
    rows = [
        ("kind", f"{spec.kind}, {spec.layout} layout, schema {dataset.schema_version}"),
        ("images", f"{spec.rows} of {'×'.join(map(str, spec.shape))} in {spec.blocks} blocks of {spec.block_rows}"),
        ("files", f"{totals.files}, {totals.bytes / 1e6:.2f} MB"),
        (
            "labels",
            ", ".join(
                f"{spec.class_names[int(label)]}: {count}" for label, count in list(totals.label_counts.items())[:20]
            ),
        ),
    ]
    if coupling:
        teacher = coupling.teacher
        rows += [
            ("draws", f"{coupling.draws} an image, η = {coupling.eta}"),
            (
                "z, noise",
                f"{coupling.z_dtype}, {coupling.noise.dtype} ({coupling.noise.law}, seed {coupling.noise.seed})",
            ),
            ("bytes", f"{totals.bytes / (spec.rows * coupling.draws):.1f} a pair"),
            (
                "teacher",
                f"{teacher.architecture.get('name')} {teacher.sha256[:12]}, trained on "
                f"{teacher.training.get('images')} images",
            ),
            ("source", coupling.source[:12]),
        ]
    rows.append(("id", dataset.id))
    return "\n".join(f"{name:10}{value}" for name, value in rows)
