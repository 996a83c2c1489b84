"""What the cards of a store have in common: sentences that say what it holds, and how texts that came with a store are
shown. Nobody has checked those, so they must stay text wherever they are put."""

import re
from collections.abc import Callable, Sequence
from typing import Final

from nfm.storage_specs.format.attribution import Attribution
from nfm.storage_specs.format.codecs import STORED_MEANING
from nfm.storage_specs.format.names import Z_SCALE_FILE
from nfm.storage_specs.format.schema import LatentSpec, Spec
from nfm.storage_specs.storage.text import printable

Z_IS_THE_IMAGE: Final = (
    "z together with its teacher and noise law is the image; leaving out x saves bytes and protects nothing."
)

Escape = Callable[[str], str]


def escape_markdown(text: str) -> str:
    """Markdown that shows the text in one line and is nothing else: any ASCII punctuation behind a backslash is literal
    (CommonMark 0.31, section 2.4)."""
    return re.sub(r"[!-/:-@\[-`{-~]", r"\\\g<0>", printable(text))


def quote_yaml(text: str) -> str:
    """The text as a YAML string in double quotes, on one line (YAML 1.2, section 5.7). A JSON string will not do: YAML
    knows no surrogate pairs, and takes some of what JSON leaves as it is for line breaks."""
    quoted = "".join(char if char.isprintable() and char not in '"\\' else f"\\U{ord(char):08x}" for char in text)
    return f'"{quoted}"'


def rows_to_lines(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of text: the name of each row, and beside it its text, which may have several lines."""
    width = max(12, *(len(name) + 1 for name, _ in rows))
    lines: list[str] = []
    for name, text in rows:
        first, *others = text.splitlines() or [""]
        lines.append(f"{name:{width}}{printable(first)}")
        lines += [f"{'':{width}}{printable(line)}" for line in others]
    return lines


def attribution_rows(attribution: Attribution) -> list[tuple[str, str]]:
    """Name and text of what is known of a store's origin, and of its licence in any case."""
    rows = [
        ("licence", attribution.licence or "not stated"),
        ("creator", attribution.creator),
        ("source url", attribution.source_url),
        ("citation", attribution.citation),
        ("notes", attribution.notes),
    ]
    return [(name, text) for name, text in rows if text is not None]


def title(spec: Spec) -> str:
    """Such as "Couplings: 50000 images 3×32×32, 10 classes"."""
    classes = f"{spec.num_classes} classes" if spec.has_labels else "no labels"
    return f"{spec.kind.capitalize()}: {spec.rows} images {'×'.join(map(str, spec.shape))}, {classes}"


def teacher_name(spec: Spec) -> str:
    """The name of the teacher's architecture."""
    return str(spec.nfm.teacher.architecture.get("name", "unnamed"))


def describe_meaning(spec: Spec, sigma_f_path: str | None, escape: Escape) -> list[str]:
    """Sentences that say what x, the labels and z are, however they are stored. `escape` makes names that came with the
    store into text of the card."""
    if isinstance(spec.x, LatentSpec):
        x = spec.x
        bits = ", the upper 16 bits of float32: (value.astype('<u4') << 16).view('<f4')"
        lines = [
            f"x is latents, stored as {x.dtype}{bits if x.dtype == 'bfloat16' else ''}.",
            f"(x - {x.shift}) * {x.scale} is the data.",
            f"x itself is what the decoder {escape(x.decoder.name)} takes; its weights have sha256 {x.decoder.sha256}.",
        ]
    else:
        lines = ["x is uint8; x / 127.5 - 1 is the data in [-1, 1]."]
    lines.append("label is the index of the class." if spec.has_labels else "The images have no labels.")
    if spec.coupling is not None:
        f_arguments = "x + η·ε′, label" if spec.has_labels else "x + η·ε′"
        lines += [
            f"z = f({f_arguments}) is the raw output of a teacher, {escape(teacher_name(spec))}, "
            f"for {spec.num_draws} draws of ε′ per image, η = {spec.nfm.eta}.",
            f"Divide z by `{sigma_f_path}` to train a student on it.",
            Z_IS_THE_IMAGE,
        ]
    return lines


_DRAWS_OF_VIEWS = "Draws 0, 2, … were made of the image, and draws 1, 3, … of its mirror image"
TUPLES_OF_VIEWS: Final = f"{_DRAWS_OF_VIEWS}; x is the one that the draw was made of."


def describe_views(spec: Spec) -> list[str]:
    """Sentences on the mirror images in the store, if there are any."""
    if "mirrored" not in spec.views:
        return []
    of_draws = [f"{_DRAWS_OF_VIEWS}."] if spec.coupling is not None else []
    if isinstance(spec.x, LatentSpec):
        return [*of_draws, "The latents of the mirror image are in the column x_mirrored."]
    return [*of_draws, "The mirror image is x with its last axis reversed."]


def describe_storage(spec: Spec) -> list[str]:
    """Sentences that say how the files of the store hold z and the noise; none for a sample store."""
    if spec.coupling is None:
        return []
    z_dtype, noise = spec.nfm.z_dtype, spec.nfm.noise
    lines = [f"z is stored as {z_dtype}."]
    if z_dtype in STORED_MEANING:
        lines = [f"z is stored as {z_dtype}: {STORED_MEANING[z_dtype]}."]
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


# Code that makes float32 of a stored value, here called {0}.
_DECODED_IN_PYTHON: dict[str, str] = {
    "float32": "{0}",
    "float16": '{0}.astype("f4")',
    "bfloat16": '({0}.astype("<u4") << 16).view("<f4")',
    "int8": "{0} * z_scale",
}


def python_x(spec: Spec, value: str) -> str:
    """Code that makes x, as data, of its stored form in the Python expression `value`."""
    if isinstance(spec.x, LatentSpec):
        return f"({_DECODED_IN_PYTHON[spec.x.dtype].format(value)} - {spec.x.shift}) * {spec.x.scale}"
    return f"{value} / 127.5 - 1"


def python_z(spec: Spec, value: str) -> str:
    """Code that makes z / σ_f, what a student is trained on, of the stored form of z in the expression `value`."""
    return f"{_DECODED_IN_PYTHON[spec.nfm.z_dtype].format(value)} / sigma_f"


def python_scales(spec: Spec, sigma_f_path: str | None) -> str:
    """Lines of code that load what `python_z` needs."""
    load_z_scale = f'z_scale = np.load("{Z_SCALE_FILE}")\n' if spec.nfm.z_dtype == "int8" else ""
    return f'{load_z_scale}sigma_f = np.load("{sigma_f_path}")'
