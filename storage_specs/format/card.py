"""README.md, which lies in a store for a team that has none of our code, and the summary of a store for a terminal."""

import re
from typing import NamedTuple

from nfm.storage_specs.format.card_text import (
    TUPLES_OF_VIEWS,
    attribution_rows,
    describe_meaning,
    describe_storage,
    describe_views,
    escape_markdown,
    python_scales,
    python_x,
    python_z,
    quote_yaml,
    rows_to_lines,
    teacher_name,
    title,
)
from nfm.storage_specs.format.croissant import croissant
from nfm.storage_specs.format.dataset import is_1_0
from nfm.storage_specs.format.layouts import LAYOUTS
from nfm.storage_specs.format.names import SIGMA_F_NAME
from nfm.storage_specs.format.schema import Dataset, LatentSpec, Spec
from nfm.storage_specs.format.zarr_layout import GROUP_FOLDER
from nfm.storage_specs.storage.documents import canonical_json
from nfm.storage_specs.storage.text import printable

# The identifiers of Hugging Face (huggingface.co/docs/hub/repositories-licenses) that are those of SPDX in lower case.
_LICENCES = """
afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0
cdla-sharing-1.0 ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gpl-2.0 gpl-3.0 isc lgpl-2.1 lgpl-3.0 lppl-1.3c mit
mpl-2.0 ms-pl ncsa ofl-1.1 osl-3.0 postgresql unlicense wtfpl zlib
"""
HUGGING_FACE_LICENCES = frozenset(_LICENCES.split())
_SIZE_STEPS = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]  # 10³, 10⁴, … samples

_CODE = re.compile(rb"\A---$.*?^---$|^[ >]*(?:```|~~~).*?(?:```|~~~)", re.MULTILINE | re.DOTALL)

_ZARR_AND_DATASETS = """\
`datasets` of Hugging Face does not read Zarr. The card offers it no data files, so that `load_dataset` of this folder
raises DataFilesNotFoundError instead of loading other files of the store. `nfm store convert --layout webdataset`
makes a store that it loads."""


def _size_category(samples: int) -> str:
    """Hugging Face's name for a number of samples, such as "10K<n<100K"."""
    step = min(max(len(str(samples)) - 3, 0), len(_SIZE_STEPS))
    if step == 0:
        return f"n<{_SIZE_STEPS[0]}"
    return f"{_SIZE_STEPS[step - 1]}<n<{_SIZE_STEPS[step]}" if step < len(_SIZE_STEPS) else f"n>{_SIZE_STEPS[-1]}"


def _front_matter(dataset: Dataset, name: str, samples: int, data_files: dict[str, list[str]]) -> list[str]:
    """Lines of YAML that Hugging Face reads: what its pages show, and the configurations of `load_dataset` by name,
    each with patterns of its files."""
    licence = dataset.attribution.licence
    if licence is None:
        licence_lines = ["license: unknown"]
    elif licence.lower() in HUGGING_FACE_LICENCES:
        licence_lines = [f"license: {licence.lower()}"]
    else:
        licence_lines = ["license: other", f"license_name: {quote_yaml(licence)}"]
    tags = ["flow-matching", "normalizing-flow"] if dataset.spec.coupling else ["image"]
    lines = [
        "---",
        *licence_lines,
        f"pretty_name: {quote_yaml(name)}",
        f"tags: [{', '.join(tags)}]",
        f"size_categories: [{quote_yaml(_size_category(samples))}]",
        "configs:",
    ]
    for config, patterns in data_files.items():
        lines.append(f"- {{config_name: {quote_yaml(config)}, data_files: [{', '.join(map(quote_yaml, patterns))}]}}")
    return [*lines, "---", ""]


def _data_files(spec: Spec) -> dict[str, list[str]]:
    """The configurations of a store: one for x, and one for each draw of z and of the noise. Those of a Zarr store have
    no files, as `datasets` would otherwise take any JSON or Parquet file of the store for its data."""
    if spec.layout == "zarr":
        return {"none": []}
    names = {column: column for column in spec.image_columns}
    for column in spec.draw_columns:
        names |= {f"{column}-k{draw:03d}": f"{column}/k{draw:03d}" for draw in range(spec.num_draws)}
    return {name: [f"{folder}/*.tar"] for name, folder in names.items()}


def _webdataset_code(spec: Spec, sigma_f_path: str | None) -> str:
    """Code that reads block 0 of a store, with draw 0 if there is z."""
    x, z = python_x(spec, 'image["x.npy"]'), 'draw["z.npy"]'
    read_label = '\n    label = image["cls"]' if spec.has_labels else ""
    if spec.coupling is None:
        return f"""\
import webdataset as wds

images = wds.WebDataset("x/000000.tar", shardshuffle=False).decode()
for image in images:
    x = {x}{read_label}
"""
    return f"""\
import numpy as np
import webdataset as wds

images = wds.WebDataset("x/000000.tar", shardshuffle=False).decode()
draws = wds.WebDataset("z/k000/000000.tar", shardshuffle=False).decode()  # of the same images, in the same order
{python_scales(spec, sigma_f_path)}
for image, draw in zip(images, draws):
    x = {x}{read_label}
    z = {python_z(spec, z)}
"""


def _datasets_code(spec: Spec) -> str:
    """Code that loads a WebDataset store with `datasets`."""
    keys = "__key__, x.npy, cls" if spec.has_labels else "__key__, x.npy"
    code = f"""\
import os

from datasets import load_dataset

folder = os.getcwd()  # this one
images = load_dataset(folder, "x", split="train", streaming=True)  # {keys}
"""
    if spec.coupling is not None:
        code += 'draws = load_dataset(folder, "z-k000", split="train", streaming=True)  # of the same images\n'
    return code


def _zarr_code(spec: Spec, sigma_f_path: str | None) -> str:
    """Code that reads block 0 of a store, with draw 0 if there is z."""
    read_label = '\nlabel = group["label"][:rows]' if spec.has_labels else ""
    x, z = python_x(spec, 'group["x"][:rows]'), 'group["z"][0, :rows]'
    import_numpy = "import numpy as np\n" if spec.coupling is not None else ""
    code = f"""\
{import_numpy}import zarr

group = zarr.open_group("{GROUP_FOLDER}", mode="r")
rows = group["x"].shards[0]  # of a block
x = {x}{read_label}
"""
    if spec.coupling is not None:
        code += f"{python_scales(spec, sigma_f_path)}\nz = {python_z(spec, z)}  # draw 0\n"
    return code


def _tuples_code(spec: Spec) -> str:
    """Code that reads a folder of tuples."""
    x = python_x(spec, 'np.asarray(pair["x.npy"])')
    read_label = '\n    label = pair["cls"]' if spec.has_labels else ""
    return f"""\
import os

import numpy as np
from datasets import load_dataset

sigma_f = np.load("{SIGMA_F_NAME}")
for pair in load_dataset(os.getcwd(), split="train", streaming=True):
    x = {x}{read_label}
    z = np.asarray(pair["z.npy"]) / sigma_f
"""


def _code_block(code: str) -> list[str]:
    return ["```python", *code.splitlines(), "```", ""]


def _attribution_section(dataset: Dataset) -> list[str]:
    """Texts that came with the store, in an indented code block, in which nothing is Markdown (CommonMark 0.31, section
    4.4): no line of them can get out of it, as each begins with four spaces."""
    return [
        "## Licence and origin",
        "",
        *(f"    {line}" for line in rows_to_lines(attribution_rows(dataset.attribution))),
    ]


def readme(dataset: Dataset) -> str:
    """README.md of a store: what it holds, and the code with which stock tools read it."""
    spec, documents = dataset.spec, dataset.documents
    sigma_f_path = documents.sigma_f.path if documents.sigma_f else None
    if spec.layout == "zarr":
        reading = [*_code_block(_zarr_code(spec, sigma_f_path)), _ZARR_AND_DATASETS, ""]
    else:
        reading = [*_code_block(_webdataset_code(spec, sigma_f_path)), *_code_block(_datasets_code(spec))]
    lines = [
        *_front_matter(dataset, title(spec), spec.rows, _data_files(spec)),
        f"# {title(spec)}",
        "",
        *describe_meaning(spec, sigma_f_path, escape_markdown),
        *describe_views(spec),
        *describe_storage(spec),
        "",
        f"Version {dataset.version} of store {dataset.id}: "
        f"{dataset.totals.files} files, {dataset.totals.bytes} bytes; "
        f"`{documents.manifest.path}` lists each with its sha256.",
        f"`dataset.json` describes the store, in schema {dataset.schema_version} (docs/store.md of nfm).",
        *([f"`{documents.names.path}` says where each image comes from."] if documents.names else []),
        "",
        *reading,
        *_attribution_section(dataset),
    ]
    return "\n".join(lines) + "\n"


def make_cards(dataset: Dataset) -> dict[str, bytes]:
    """README.md and croissant.json of a store, by their names in `Documents`."""
    return {"readme": readme(dataset).encode(), "croissant": canonical_json(croissant(dataset))}


def list_code(card: bytes) -> list[bytes]:
    """What programs go by in a README.md, without its prose: its front matter, and each block of code."""
    return _CODE.findall(card)


def tuples_readme(dataset: Dataset) -> str:
    """README.md of a folder of tuples that were exported from a coupling store."""
    spec = dataset.spec
    z_dtype = "float32" if spec.nfm.z_dtype in ("bfloat16", "int8") else spec.nfm.z_dtype
    members = ["x.npy", f"z.npy ({z_dtype})", "noise.npy (ε′ as the teacher got it)"]
    members += ["cls"] if spec.has_labels else []
    name = f"Tuples of store {dataset.id[:12]}. {title(spec)}"
    lines = [
        *_front_matter(dataset, name, spec.rows * spec.num_draws, {"default": ["k*/*.tar"]}),
        f"# {name}",
        "",
        *describe_meaning(spec, SIGMA_F_NAME, escape_markdown),
        *([TUPLES_OF_VIEWS] if "mirrored" in spec.views else []),
        f"Every sample of `k<draw>/<block>.tar` has {', '.join(members[:-1])} and {members[-1]}.",
        "",
        *_code_block(_tuples_code(spec)),
        "`croissant.json` describes the same pairs as its record set `pairs`. "
        "mlcroissant names what it unpacks by the path in this folder alone, "
        "so give every folder that you read with it a `CROISSANT_CACHE` of its own.",
        "",
        *_attribution_section(dataset),
    ]
    return "\n".join(lines) + "\n"


class RowBytes(NamedTuple):
    """What one row takes in the files of one column."""

    values: float  # bytes of its values
    file: float  # bytes of the file divided by its rows: values, headers and padding


def bytes_per_row(spec: Spec) -> dict[str, RowBytes]:
    """By column with files of its own, the bytes of one row in a file with `block_rows` rows."""
    layout, rows = LAYOUTS[spec.layout], spec.block_rows
    result: dict[str, RowBytes] = {}
    for column in (*layout.base_columns(spec), *spec.draw_columns):
        values_per_row = 1 if column in ("label", "index") else spec.dim
        value_bytes = float(spec.dtype(column).itemsize * values_per_row)
        result[column] = RowBytes(values=value_bytes, file=layout.file_size(spec, column, rows) / rows)
    return result


def _describe_x(spec: Spec) -> str:
    """Such as "uint8 pixels, value / 127.5 - 1"."""
    if not isinstance(spec.x, LatentSpec):
        return "uint8 pixels, value / 127.5 - 1"
    decoder = spec.x.decoder
    return (
        f"{spec.x.dtype} latents, (value - {spec.x.shift}) * {spec.x.scale}; "
        f"decoder {printable(decoder.name)} {decoder.sha256[:12]}"
    )


def _coupling_rows(dataset: Dataset, sigma_f_rms: float | None) -> list[tuple[str, str]]:
    """The rows of the summary on z, its noise and its teacher."""
    spec, nfm = dataset.spec, dataset.spec.nfm
    noise, teacher = nfm.noise, nfm.teacher
    z: str = nfm.z_dtype
    if dataset.totals.z_rms_error is not None and sigma_f_rms:
        z += f", rounding error {dataset.totals.z_rms_error / sigma_f_rms:.2g} of its rms"
    noise_form = f"stored as {noise.dtype}"
    if not noise.stored:
        noise_form = f"recomputed from the seed; the teacher got it as {noise.dtype}"
    images = teacher.training.get("images")
    trained = "" if images is None else f", trained on {images} images"
    return [
        ("draws", f"K = {spec.num_draws} per image, η = {nfm.eta}"),
        ("z", z),
        ("noise", f"{noise_form} ({noise.law}, seed {noise.seed})"),
        ("teacher", f"{teacher_name(spec)} {teacher.sha256[:12]}{trained}"),
        ("source", nfm.source[:12]),
        ("note", "z with its teacher and noise law is the image: a store without x would protect nothing"),
    ]


def summarize(dataset: Dataset, sigma_f_rms: float | None = None) -> str:
    """The summary of a store for a terminal. The error of a stored z is given relative to `sigma_f_rms`, the root mean
    square of the store's σ_f."""
    spec, totals = dataset.spec, dataset.totals
    shape = "×".join(map(str, spec.shape))
    rows = [("kind", f"{spec.kind}, {spec.layout} layout, schema {dataset.schema_version}")]
    if not is_1_0(dataset):  # whose stores have no versions
        parent = f", parent {dataset.parent[:12]}" if dataset.parent else ""
        rows.append(("version", f"{dataset.version}{parent}"))
    rows += [
        ("images", f"{spec.rows} of {shape} in {spec.num_blocks} blocks of {spec.block_rows}"),
        ("x", _describe_x(spec)),
        ("views", ", ".join(spec.views)),
        ("files", f"{totals.files}, {totals.bytes / 1e6:.2f} MB"),
    ]
    if spec.coupling:
        rows += _coupling_rows(dataset, sigma_f_rms)
    for column, row_bytes in bytes_per_row(spec).items():
        if column in spec.draw_columns:
            size = f"{row_bytes.file:.0f} per pair"
        elif spec.coupling:
            size = f"{row_bytes.file:.0f} per image, or {row_bytes.file / spec.num_draws:.0f} per pair"
        else:
            size = f"{row_bytes.file:.0f} per image"
        rows.append((f"bytes {column}", f"{size} (values {row_bytes.values:.0f})"))
    if spec.coupling:
        rows.append(("bytes", f"{totals.bytes / (spec.rows * spec.num_draws):.0f} per pair in all"))
    rows.append(("labels", _label_histogram(dataset)))
    rows += attribution_rows(dataset.attribution)
    rows.append(("id", dataset.id))
    return "\n".join(rows_to_lines(rows))


def _label_histogram(dataset: Dataset, max_classes: int = 20) -> str:
    """A line on the label counts, and a bar for each of the first classes."""
    if not dataset.spec.has_labels:
        return "none"
    names = dataset.spec.class_names
    counts = [dataset.totals.label_counts.get(str(label), 0) for label in range(len(names))]
    lines = [f"{len(names)} classes, {min(counts)} to {max(counts)} images each"]
    for name, count in list(zip(names, counts, strict=True))[:max_classes]:
        bar = "█" * round(30 * count / max(1, *counts))
        lines.append(f"{printable(name)[:24]:24} {count:8d} {bar}")
    return "\n".join(lines)
