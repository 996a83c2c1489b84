"""The cards of a store, README.md and croissant.json, that travel with it for a team that has none of our code; and the
summary for a terminal."""

from typing import Any

from nfm.storage_specs.format.codecs import STORED_MEANING
from nfm.storage_specs.format.layouts import LAYOUTS
from nfm.storage_specs.format.schema import Dataset, LayoutName, Spec

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


def _title(spec: Spec) -> str:
    return f"{spec.kind.capitalize()}: {spec.rows} images {'×'.join(map(str, spec.shape))}, {spec.num_classes} classes"


def _meaning(spec: Spec) -> list[str]:
    lines = ["x is uint8; x / 127.5 - 1 is the data in [-1, 1]."]
    if coupling := spec.coupling:
        noise = coupling.noise
        lines += [
            f"z = f(x + η·ε′, label) is the raw output of a {coupling.teacher.architecture.get('name')} teacher for "
            f"{coupling.draws} draws of ε′ an image, η = {coupling.eta}.",
            f"z is stored as {coupling.z_dtype}: {STORED_MEANING[coupling.z_dtype]}.",
            "Divide z by `sigma_f.npy` to train a student on it.",
            f"ε′ is stored as `noise`, {noise.dtype}, exactly as the teacher saw it."
            if noise.stored
            else f"ε′ is not stored: the law {noise.law} gives it back from seed {noise.seed}, image index and draw, "
            f"rounded to {noise.dtype} as the teacher saw it.",
        ]
    return lines


def readme(dataset: Dataset) -> str:
    """Markdown that says what the store holds and how stock tools read it."""
    spec = dataset.spec
    lines = [
        f"# {_title(spec)}",
        "",
        *_meaning(spec),
        "",
        f"{dataset.totals.files} files, {dataset.totals.bytes} bytes; `manifest.parquet` lists each with its sha256.",
        "",
        "```python",
        _READ_X[spec.layout] + (_READ_Z[spec.layout] if spec.coupling else "") + "```",
    ]
    return "\n".join(lines) + "\n"


def tuples_readme(dataset: Dataset) -> str:
    """The same for an export of tuples."""
    z = dataset.spec.coupling.z_dtype if dataset.spec.coupling else ""
    stored = [line for line in _meaning(dataset.spec) if not line.startswith(("z is stored", "ε′ is"))]
    return "\n".join(
        [
            f"# Tuples of store {dataset.id[:12]}. {_title(dataset.spec)}",
            "",
            *stored,
            f"Every sample of k<draw>/<block>.tar has x.npy, z.npy ({'float32' if z in ('bfloat16', 'int8') else z}), "
            "noise.npy (ε′ as the teacher saw it) and cls.",
            "",
        ]
    )


def croissant(dataset: Dataset) -> dict[str, Any]:
    """Croissant 1.0 (MLCommons): the metadata that data set search engines and loaders read."""
    spec = dataset.spec
    encoding, suffix = {"webdataset": ("application/x-tar", "**.tar"), "zarr": ("application/x-zarr", "c/**")}[
        spec.layout
    ]
    kinds = (*LAYOUTS[spec.layout].base_kinds, *spec.planes)
    types = {"string": "sc:Text", "int32": "sc:Integer", "int64": "sc:Integer", "double": "sc:Float"}
    columns = {"column": "string", "draw": "int32", "block": "int32", "first_index": "int64", "rows": "int32"}
    columns |= {"path": "string", "bytes": "int64", "sha256": "string", "squared_error": "double"}
    return {
        "@context": {
            "@language": "en",
            "@vocab": "https://schema.org/",
            "sc": "https://schema.org/",
            "cr": "http://mlcommons.org/croissant/",
            "dct": "http://purl.org/dc/terms/",
            "conformsTo": "dct:conformsTo",
            "recordSet": "cr:recordSet",
            "field": "cr:field",
            "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
            "source": "cr:source",
            "fileObject": "cr:fileObject",
            "extract": "cr:extract",
            "column": "cr:column",
            "includes": "cr:includes",
        },
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": f"nfm-{spec.kind}-{dataset.id[:12]}",
        "description": " ".join([f"{_title(spec)}.", *_meaning(spec)]),
        "version": dataset.schema_version,
        "identifier": dataset.id,
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": "manifest.parquet",
                "name": "manifest.parquet",
                "contentUrl": "manifest.parquet",
                "encodingFormat": "application/x-parquet",
                "sha256": dataset.manifest_sha256,
            },
            *(
                {
                    "@type": "cr:FileSet",
                    "@id": kind,
                    "name": kind,
                    "encodingFormat": encoding,
                    "includes": f"{kind}/{suffix}",
                }
                for kind in kinds
            ),
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "files",
                "name": "files",
                "description": "One row a file of the store.",
                "field": [
                    {
                        "@type": "cr:Field",
                        "@id": f"files/{name}",
                        "name": name,
                        "dataType": types[kind],
                        "source": {"fileObject": {"@id": "manifest.parquet"}, "extract": {"column": name}},
                    }
                    for name, kind in columns.items()
                ],
            }
        ],
    }


def bytes_per_row(spec: Spec) -> dict[str, tuple[float, float]]:
    """By file kind: bytes of the values of one row (its information), and its share of the files' bytes."""
    layout, rows = LAYOUTS[spec.layout], spec.block_rows
    found: dict[str, tuple[float, float]] = {}
    for kind in (*layout.base_kinds, *spec.planes):
        values = spec.dtype(kind).itemsize * (1 if kind in ("label", "index") else spec.dim)
        found[kind] = float(values), layout.file_size(spec, kind, rows) / rows
    return found


def summarize(dataset: Dataset, sigma_f_rms: float | None = None) -> str:
    """The store on a terminal; `sigma_f_rms`, of a coupling store, puts the error of its codec into proportion."""
    spec, coupling, totals = dataset.spec, dataset.spec.coupling, dataset.totals
    rows = [
        ("kind", f"{spec.kind}, {spec.layout} layout, schema {dataset.schema_version}"),
        ("images", f"{spec.rows} of {'×'.join(map(str, spec.shape))} in {spec.blocks} blocks of {spec.block_rows}"),
        ("files", f"{totals.files}, {totals.bytes / 1e6:.2f} MB"),
    ]
    if coupling:
        noise, teacher = coupling.noise, coupling.teacher
        assert totals.z_rms_error is not None and sigma_f_rms is not None
        kept = f"stored as {noise.dtype}" if noise.stored else f"derived, seen as {noise.dtype}"
        rows += [
            ("draws", f"K = {coupling.draws} an image, η = {coupling.eta}"),
            ("z", f"{coupling.z_dtype}, off by {totals.z_rms_error / sigma_f_rms:.1e} of its rms after the round trip"),
            ("noise", f"{kept} ({noise.law}, seed {noise.seed})"),
            (
                "teacher",
                f"{teacher.architecture.get('name')} {teacher.sha256[:12]}, trained on "
                f"{teacher.training.get('images')} images",
            ),
            ("source", coupling.source[:12]),
        ]
    for kind, (values, held) in bytes_per_row(spec).items():
        one = "pair" if kind in spec.planes else f"image, or {held / spec.draws:.0f} a pair" if coupling else "image"
        rows.append((f"bytes {kind}", f"{held:.0f} an {one}".replace("an pair", "a pair") + f" (values {values:.0f})"))
    if coupling:
        rows.append(("bytes", f"{totals.bytes / (spec.rows * coupling.draws):.0f} a pair in all"))
    rows.append(("labels", _histogram(dataset)))
    rows.append(("id", dataset.id))
    return "\n".join(f"{name:12}{value}" for name, value in rows)


def _histogram(dataset: Dataset, most: int = 20) -> str:
    """The label counts as bars, the first classes of many."""
    names = dataset.spec.class_names
    counts = [dataset.totals.label_counts.get(str(label), 0) for label in range(len(names))]
    top, lines = max(counts), [f"{len(names)} classes, {min(counts)} to {max(counts)} images each"]
    for name, count in list(zip(names, counts, strict=True))[:most]:
        lines.append(f"{'':12}{name[:24]:24} {count:8d} {'█' * round(30 * count / top)}")
    return "\n".join(lines)
