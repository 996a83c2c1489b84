"""What a store delivers, by every reader, and whether it is what it must be."""

import io
import os
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nfm.storage_specs.format import codecs
from nfm.storage_specs.format.dataset import is_1_0
from nfm.storage_specs.format.image_names import list_names
from nfm.storage_specs.format.noise import standard_normal
from nfm.storage_specs.format.schema import Spec
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.reading.stream import CouplingStream
from nfm.storage_specs.storage.errors import StoreError
from tests.tools.fuzz_seals import strict_json
from tests.tools.kinds import as_float, scaled_x

MAX_ROWS = 64  # of a stream that is read to the end of its epochs
OUTSIDE_THE_ID_OF_1_0 = ("sigma_f", "label_counts")

Content = dict[
    str, NDArray[Any]
]  # x, label, index (N, …); z0, noise0, z1, … of each draw; sigma_f, names, label_counts


class Finding(Exception):  # noqa: N818  (what the fuzzer looks for, and no error of its own)
    """What no store may bring about."""


class Delivery(NamedTuple):
    """What a reader got of a store, and why it did not get the rest."""

    store: Store
    content: Content
    refusals: list[str]


def read_content(url: str) -> Delivery:
    """Everything that `Store` delivers. Raises StoreError if it refuses the store as a whole."""
    store = Store(url)
    try:
        strict_json(store.document)
    except (ValueError, RecursionError) as error:
        raise Finding(f"a document was opened that is no strict JSON: {type(error).__name__} {error}") from None
    content: Content = {}
    refusals: list[str] = []

    def take(name: str, read: Any) -> None:
        try:
            content[name] = read()
        except StoreError as error:
            refusals.append(str(error))

    spec = store.spec
    blocks = range(spec.num_blocks)
    for column in (*spec.image_columns, "label", "index"):
        take(column, lambda column=column: np.concatenate([store.column(column, block) for block in blocks]))
    for draw in range(spec.num_draws):
        for column in ("z", "noise"):
            if column == "noise" and f"z{draw}" not in content:
                continue  # noise that is derived takes long where a spec asks for much of it
            read = [lambda block=block, c=column, k=draw: store.column(c, block, k) for block in blocks]
            take(f"{column}{draw}", lambda read=read: np.concatenate([read_block() for read_block in read]))
    if spec.coupling is not None:
        take("sigma_f", lambda: store.sigma_f)
    content["label_counts"] = np.array(repr([sorted(counts.items()) for counts in store.label_counts]))
    if spec.names:
        take("names", lambda: np.array(repr(list_names(store.image_names))))
    return Delivery(store, content, refusals)


def stream_content(url: str, seed: int, window: int | None) -> Delivery:
    """What a stream delivers in as many epochs as there are draws, compared with what its floats stand for. Raises
    StoreError if it refuses the store."""
    store = Store(url)
    spec, pairs = store.spec, store.spec.coupling is not None
    epochs = spec.num_draws or len(spec.views)
    taken: dict[tuple[int, int], tuple[NDArray[Any], NDArray[Any] | None, int]] = {}
    batch_size = min(spec.rows, MAX_ROWS)
    with closing(
        CouplingStream(url, batch_size, seed, "pairs" if pairs else "samples", window_blocks=window, stored=True)
    ) as stream:
        for number in range(epochs if batch_size == spec.rows else 2):
            batch = next(stream)
            x, z = _stored(batch.x), _stored(batch.z) if pairs else None
            floats = stream.to_float(batch)
            _same("x of a stream", floats.x.numpy(), scaled_x(spec, x))
            if pairs:
                expected = x_or_z_float(store, z) / store.sigma_f
                _same("z of a stream", floats.z.numpy(), expected)
            for row, index in enumerate(batch.index.tolist()):
                draw = int(batch.draw[row]) if pairs else number
                z_row = None if z is None else z[row]
                taken[index, draw] = (x[row], z_row, int(batch.label[row]))
    if batch_size < spec.rows:
        return Delivery(store, {}, [])
    if len(taken) != spec.rows * epochs:
        raise Finding(f"a stream gave {len(taken)} different pairs in {epochs} epochs of {spec.rows} rows")
    content: Content = {"label": np.array([taken[index, 0][2] for index in range(spec.rows)])}
    for draw in range(epochs):
        rows = [taken[index, draw] for index in range(spec.rows)]
        if pairs:
            content[f"z{draw}"] = np.stack([row[1] for row in rows if row[1] is not None])
            content[f"x of draw {draw}"] = np.stack([row[0] for row in rows])
        elif len(spec.views) == 1:
            content["x"] = np.stack([row[0] for row in rows])
    return Delivery(store, content, [])


def _stored(values: torch.Tensor) -> NDArray[Any]:
    """The values of a batch as the files hold them."""
    array: NDArray[Any] = (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
    return array


def x_or_z_float(store: Store, z: NDArray[Any] | None) -> NDArray[np.float32]:
    """The float32 that stored z stands for."""
    assert z is not None
    if z.dtype == np.int8:
        assert store.z_scale is not None
        return np.asarray(z.astype(np.float32) * store.z_scale)
    return as_float(z)


def _same(what: str, got: NDArray[Any], expected: NDArray[Any]) -> None:
    if (got.dtype, got.shape) != (expected.dtype, expected.shape):
        raise Finding(f"{what}: got {got.dtype} {got.shape}, not {expected.dtype} {expected.shape}")
    if np.ascontiguousarray(got).tobytes() != np.ascontiguousarray(expected).tobytes():
        raise Finding(f"{what}: other values")


def with_views(spec: Spec, content: Content) -> Content:
    """The content, and the x that each draw was made of, as far as its columns are there."""
    extended = dict(content)
    for draw in range(spec.num_draws):
        if spec.view_of(draw) == "plain" and "x" in content:
            extended[f"x of draw {draw}"] = content["x"]
        elif "x_mirrored" in content:
            extended[f"x of draw {draw}"] = content["x_mirrored"]
        elif "x" in content and "x_mirrored" not in spec.image_columns:
            extended[f"x of draw {draw}"] = content["x"][..., ::-1]
    return extended


def compare(delivery: Delivery, expected: Content, what: str, left_out: tuple[str, ...] = ()) -> None:
    """Raise Finding if something was delivered that is not as expected. What was refused, or is not expected, is not
    compared."""
    wanted = with_views(delivery.store.spec, expected)
    for name, values in delivery.content.items():
        if name in wanted and name not in left_out:
            _same(f"{what} gave {name} of id {delivery.store.dataset.id[:8]}", values, wanted[name])


def compare_with_id(delivery: Delivery, contents: dict[str, Content], what: str) -> None:
    """Raise Finding if a store with a known id delivered anything else than that id stands for."""
    expected = contents.get(delivery.store.dataset.id)
    if expected is None:
        return
    left_out = OUTSIDE_THE_ID_OF_1_0 if is_1_0(delivery.store.dataset) else ()
    compare(delivery, expected, what, left_out)
    if not delivery.refusals and what != "a stream":
        missing = expected.keys() - delivery.content.keys()
        if missing:
            raise Finding(f"{what} gave nothing for {sorted(missing)}, and no reason")


def check_soundness(delivery: Delivery) -> None:
    """Raise Finding unless a store that `verify` calls sound is: everything can be read, and what is computed from it
    follows from it."""
    store, content = delivery.store, delivery.content
    spec = store.spec
    if delivery.refusals:
        raise Finding(f"verify called a store sound that is refused: {delivery.refusals[0]}")
    counts = [
        np.unique(content["label"][block_rows(spec, block)], return_counts=True) for block in range(spec.num_blocks)
    ]
    expected = [list(zip(*(values.tolist() for values in pair), strict=True)) for pair in counts]
    if spec.has_labels and content["label_counts"].item() != repr(expected):
        raise Finding("verify called a store sound whose label counts are others")
    if spec.coupling is None:
        return
    z = np.stack([x_or_z_float(store, content[f"z{draw}"]) for draw in range(spec.num_draws)]).astype(np.float64)
    if not np.allclose(store.sigma_f, np.sqrt(np.square(z).mean(axis=(0, 1))), rtol=2e-6, atol=0):
        raise Finding("verify called a store sound whose σ_f is not that of z")
    if not all(codecs.all_finite(content[f"z{draw}"]) for draw in range(spec.num_draws)):
        raise Finding("verify called a store sound whose z is not finite")
    first_rows = np.array([block * spec.block_rows for block in range(spec.num_blocks)])
    for draw in range(spec.num_draws):
        law = standard_normal(spec.nfm.noise.seed, first_rows, draw, spec.shape).astype(spec.dtype("noise"))
        _same(
            "verify called a store sound whose noise is another: the first row",
            content[f"noise{draw}"][first_rows],
            law,
        )


def block_rows(spec: Spec, block: int) -> slice:
    """The rows of a block."""
    return slice(block * spec.block_rows, block * spec.block_rows + spec.rows_of(block))


def links_in(store: Store, documents: tuple[str, ...]) -> list[str]:
    """The files of columns, and of these documents, which are links, or lie behind links inside the store."""
    by_name = store.dataset.documents.by_name()
    paths = [*(by_name[name].path for name in documents if name in by_name and by_name[name].path)]
    found = []
    for path in [*paths, *(record.path for record in store.files.values())]:
        parts = Path(path).parts
        if any(os.path.islink(Path(store.root.path, *parts[: n + 1])) for n in range(len(parts))):
            found.append(path)
    return found


def tuples_content(spec: Spec, folder: Path) -> Content:
    """What an export of tuples holds: x of each draw, z as floats, noise, label."""
    rows: dict[str, dict[int, NDArray[Any]]] = {}
    for path in sorted(folder.glob("k*/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, suffix = member.name.split(".", 1)
                index, draw = int(key[:12]), int(key.split("_k")[1])
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
                value = np.array(int(data)) if suffix == "cls" else np.load(io.BytesIO(data), allow_pickle=False)
                column = {
                    "x.npy": f"x of draw {draw}",
                    "z.npy": f"z{draw}",
                    "noise.npy": f"noise{draw}",
                    "cls": "label",
                }
                rows.setdefault(column[suffix], {})[index] = value
    return {name: np.stack([by_index[index] for index in range(spec.rows)]) for name, by_index in rows.items()}
