"""Descriptions of a store: README.md and croissant.json, which lie in it for a team that has none of our code, and the
summary for a terminal."""

from typing import Any, NamedTuple

from nfm.storage_specs.format.codecs import STORED_MEANING
from nfm.storage_specs.format.layouts import LAYOUTS
from nfm.storage_specs.format.names import MANIFEST_FILE, SIGMA_F_FILE
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
    """Such as "Couplings: 50000 images 3×32×32, 10 classes"."""
    return f"{spec.kind.capitalize()}: {spec.rows} images {'×'.join(map(str, spec.shape))}, {spec.num_classes} classes"


def _describe_meaning(spec: Spec) -> list[str]:
    """Sentences that say what x and z are, however they are stored."""
    lines = ["x is uint8; x / 127.5 - 1 is the data in [-1, 1]."]
    coupling = spec.coupling
    if coupling is not None:
        lines.append(
            f"z = f(x + η·ε′, label) is the raw output of a {coupling.teacher.architecture.get('name')} teacher "
            f"for {coupling.draws} draws of ε′ per image, η = {coupling.eta}."
        )
        lines.append(f"Divide z by `{SIGMA_F_FILE}` to train a student on it.")
    return lines


def _describe_storage(spec: Spec) -> list[str]:
    """Sentences that say how the files of the store hold z and the noise; none for a sample store."""
    coupling = spec.coupling
    if coupling is None:
        return []
    noise = coupling.noise
    lines = [f"z is stored as {coupling.z_dtype}."]
    if coupling.z_dtype in STORED_MEANING:
        lines = [f"z is stored as {coupling.z_dtype}: {STORED_MEANING[coupling.z_dtype]}."]
    if noise.stored:
        lines.append(f"ε′ is stored as `noise`, {noise.dtype}, exactly as the teacher got it.")
    else:
        lines.append(
            "ε′ is not stored. "
            f"It is a function of seed, image index and draw, by the law {noise.law} with seed {noise.seed}, "
            f"and is then rounded to {noise.dtype} as the teacher got it. "
            "The law: NumPy's `Philox`, constructed with key (seed, 0) and counter (0, 0, draw, index), "
            "gives 32-bit words w, low word first, and ε′ = Φ⁻¹((w + ½) / 2³²) by Wichura's algorithm AS 241. "
            "docs/store.md of nfm has the details, "
            "and storage_specs/format/noise.py of nfm computes it with NumPy alone."
        )
    return lines


def readme(dataset: Dataset) -> str:
    """README.md of a store: what it holds, and the code with which stock tools read it."""
    spec = dataset.spec
    code = _READ_X[spec.layout]
    if spec.coupling:
        code += _READ_Z[spec.layout]
    lines = [
        f"# {_title(spec)}",
        "",
        *_describe_meaning(spec),
        *_describe_storage(spec),
        "",
        f"{dataset.totals.files} files, {dataset.totals.bytes} bytes; `{MANIFEST_FILE}` lists each with its sha256.",
        "",
        "```python",
        code + "```",
    ]
    return "\n".join(lines) + "\n"


def tuples_readme(dataset: Dataset) -> str:
    """README.md of a folder of tuples that were exported from a coupling store."""
    assert dataset.spec.coupling is not None
    z_dtype = dataset.spec.coupling.z_dtype
    exported_dtype = "float32" if z_dtype in ("bfloat16", "int8") else z_dtype
    lines = [
        f"# Tuples of store {dataset.id[:12]}. {_title(dataset.spec)}",
        "",
        *_describe_meaning(dataset.spec),
        f"Every sample of k<draw>/<block>.tar has x.npy, z.npy ({exported_dtype}), "
        "noise.npy (ε′ as the teacher got it) and cls.",
        "",
    ]
    return "\n".join(lines)


_FILE_FORMATS: dict[LayoutName, tuple[str, str]] = {  # media type, and which files of a folder are meant
    "webdataset": ("application/x-tar", "**.tar"),
    "zarr": ("application/x-zarr", "c/**"),
}
_MANIFEST_FIELDS = {
    "column": "sc:Text",
    "draw": "sc:Integer",
    "block": "sc:Integer",
    "first_index": "sc:Integer",
    "rows": "sc:Integer",
    "path": "sc:Text",
    "bytes": "sc:Integer",
    "sha256": "sc:Text",
    "squared_error": "sc:Float",
}


def croissant(dataset: Dataset) -> dict[str, Any]:
    """croissant.json, the metadata that data set search engines and loaders read: Croissant 1.0 (MLCommons)."""
    spec = dataset.spec
    media_type, pattern = _FILE_FORMATS[spec.layout]
    kinds = (*LAYOUTS[spec.layout].base_kinds, *spec.planes)
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
        "description": " ".join([f"{_title(spec)}.", *_describe_meaning(spec), *_describe_storage(spec)]),
        "version": dataset.schema_version,
        "identifier": dataset.id,
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": MANIFEST_FILE,
                "name": MANIFEST_FILE,
                "contentUrl": MANIFEST_FILE,
                "encodingFormat": "application/x-parquet",
                "sha256": dataset.manifest_sha256,
            },
            *(
                {
                    "@type": "cr:FileSet",
                    "@id": kind,
                    "name": kind,
                    "encodingFormat": media_type,
                    "includes": f"{kind}/{pattern}",
                }
                for kind in kinds
            ),
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "files",
                "name": "files",
                "description": "One row per file of the store.",
                "field": [
                    {
                        "@type": "cr:Field",
                        "@id": f"files/{name}",
                        "name": name,
                        "dataType": data_type,
                        "source": {"fileObject": {"@id": MANIFEST_FILE}, "extract": {"column": name}},
                    }
                    for name, data_type in _MANIFEST_FIELDS.items()
                ],
            }
        ],
    }


class RowBytes(NamedTuple):
    """What one row takes in the files of one kind."""

    values: float  # bytes of its values
    file: float  # bytes of the file divided by its rows: values, headers and padding


def bytes_per_row(spec: Spec) -> dict[str, RowBytes]:
    """By file kind, the bytes of one row in a file with `block_rows` rows."""
    layout, rows = LAYOUTS[spec.layout], spec.block_rows
    result: dict[str, RowBytes] = {}
    for kind in (*layout.base_kinds, *spec.planes):
        values_per_row = 1 if kind in ("label", "index") else spec.dim
        value_bytes = float(spec.dtype(kind).itemsize * values_per_row)
        result[kind] = RowBytes(values=value_bytes, file=layout.file_size(spec, kind, rows) / rows)
    return result


def summarize(dataset: Dataset, sigma_f_rms: float | None = None) -> str:
    """The summary of a store for a terminal. For a coupling store it needs `sigma_f_rms`, the root mean square of its
    σ_f, as the error of the stored z is given relative to it."""
    spec, coupling, totals = dataset.spec, dataset.spec.coupling, dataset.totals
    rows = [
        ("kind", f"{spec.kind}, {spec.layout} layout, schema {dataset.schema_version}"),
        ("images", f"{spec.rows} of {'×'.join(map(str, spec.shape))} in {spec.blocks} blocks of {spec.block_rows}"),
        ("files", f"{totals.files}, {totals.bytes / 1e6:.2f} MB"),
    ]
    if coupling:
        noise, teacher = coupling.noise, coupling.teacher
        assert totals.z_rms_error is not None and sigma_f_rms is not None
        relative_error = totals.z_rms_error / sigma_f_rms
        noise_form = f"stored as {noise.dtype}"
        if not noise.stored:
            noise_form = f"recomputed from the seed; the teacher got it as {noise.dtype}"
        trained_images = teacher.training.get("images")
        rows += [
            ("draws", f"K = {coupling.draws} per image, η = {coupling.eta}"),
            ("z", f"{coupling.z_dtype}, rounding error {relative_error:.1e} of its rms"),
            ("noise", f"{noise_form} ({noise.law}, seed {noise.seed})"),
            (
                "teacher",
                f"{teacher.architecture.get('name')} {teacher.sha256[:12]}, trained on {trained_images} images",
            ),
            ("source", coupling.source[:12]),
        ]
    for kind, row_bytes in bytes_per_row(spec).items():
        if kind in spec.planes:
            size = f"{row_bytes.file:.0f} per pair"
        elif coupling:
            size = f"{row_bytes.file:.0f} per image, or {row_bytes.file / spec.draws:.0f} per pair"
        else:
            size = f"{row_bytes.file:.0f} per image"
        rows.append((f"bytes {kind}", f"{size} (values {row_bytes.values:.0f})"))
    if coupling:
        rows.append(("bytes", f"{totals.bytes / (spec.rows * coupling.draws):.0f} per pair in all"))
    rows.append(("labels", _label_histogram(dataset)))
    rows.append(("id", dataset.id))
    return "\n".join(f"{name:12}{value}" for name, value in rows)


def _label_histogram(dataset: Dataset, max_classes: int = 20) -> str:
    """A line on the label counts, and a bar for each of the first classes."""
    names = dataset.spec.class_names
    counts = [dataset.totals.label_counts.get(str(label), 0) for label in range(len(names))]
    lines = [f"{len(names)} classes, {min(counts)} to {max(counts)} images each"]
    for name, count in list(zip(names, counts, strict=True))[:max_classes]:
        bar = "█" * round(30 * count / max(counts))
        lines.append(f"{'':12}{name[:24]:24} {count:8d} {bar}")
    return "\n".join(lines)
