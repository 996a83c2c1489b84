"""Checkpoints from strangers: what is no finite floating-point number, or lies about itself, is refused in one line."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from nfm.stages.checkpoint import (
    DOCUMENT_KEY,
    Checkpoint,
    has_dropped_labels,
    load,
    load_any_network,
    load_document,
    read_curves,
    read_teacher_training,
    remove,
    save,
    trained_on,
)
from nfm.stages.errors import StageError
from nfm.stages.memory import memory_bytes
from nfm.stages.safetensors_header import MAX_HEADER_BYTES
from nfm.storage_specs.storage.errors import StoreError
from tests.tools.small_run import Run

TENSOR = "model.blocks.0.proj_in.weight"


def with_tensor(run: Run, folder: Path, tensor: Tensor) -> str:
    """The teacher with another tensor in the place of TENSOR."""
    url = f"{folder}/model.safetensors"
    checkpoint = load(run.teacher)
    metadata = {DOCUMENT_KEY: json.dumps(checkpoint.document)}
    Path(url).write_bytes(safetensors.torch.save(checkpoint.tensors | {TENSOR: tensor}, metadata))
    return url


def with_header(folder: Path, header: bytes, values: bytes = b"") -> str:
    """A safetensors file of a header and values."""
    path = folder / "hostile.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + values)
    return str(path)


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_with_the_name_of_the_tensor(
    run: Run, tmp_path: Path, value: float
) -> None:
    weights = load(run.teacher).tensors[TENSOR].clone()
    weights.view(-1)[-1] = value
    url = with_tensor(run, tmp_path, weights)
    for read in (load, load_any_network):
        with pytest.raises(StageError) as caught:
            read(url)
        assert f"{url}: got tensor {TENSOR!r} with NaN or infinite values" in one_line(caught)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.int8, torch.uint8, torch.int64, torch.bool, torch.float64, torch.complex64),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    ],
    ids=str,
)
def test_weights_of_other_dtypes_are_refused_with_the_name_of_the_tensor(
    run: Run, tmp_path: Path, dtype: torch.dtype
) -> None:
    url = with_tensor(run, tmp_path, torch.zeros(load(run.teacher).tensors[TENSOR].shape).to(dtype))
    with pytest.raises(StageError) as caught:
        load_any_network(url)
    assert f"got tensor {TENSOR!r} of dtype " in one_line(caught)
    assert "expected one of F32, F16, BF16" in one_line(caught)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_half_precision_are_read(run: Run, tmp_path: Path, dtype: torch.dtype) -> None:
    weights = load(run.teacher).tensors[TENSOR].to(dtype)
    network = load_any_network(with_tensor(run, tmp_path, weights))
    assert torch.equal(network.state_dict()[TENSOR.removeprefix("model.")], weights.float())


DOCUMENT = {DOCUMENT_KEY: json.dumps({"run": {}})}
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("tensors", "num_bytes", "message"),
    [
        ({"a": ENTRY | {"shape": [3]}}, 8, r"tensor 'a' of shape \[3\] in 8 bytes"),
        ({"a": ENTRY | {"shape": [1 << 47], "data_offsets": [0, 1 << 49]}}, 8, "no sizes"),
        ({"a": ENTRY | {"shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, 8, "bytes of tensors in a file of"),
        ({"a": ENTRY | {"shape": [-2, -1]}}, 8, "no sizes"),
        ({"a": ENTRY | {"shape": [True, 2]}}, 8, "no sizes"),
        ({"a": ENTRY | {"shape": [1] * 9 + [2]}}, 8, "no sizes"),
        ({"a": ENTRY | {"shape": [2.0]}}, 8, "no sizes"),
        ({"a": ENTRY | {"data_offsets": [8, 16]}}, 16, "tensor 'a' at 8, where 0 is next"),
        ({"a": ENTRY, "b": ENTRY}, 8, "tensor 'b' at 0, where 8 is next"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, 12, "tensor 'b' at 4, where 8 is next"),
        ({"a": ENTRY}, 16, "8 bytes of tensors in a file of"),
        ({"a": ENTRY}, 4, "8 bytes of tensors in a file of"),
        ({"a": ENTRY | {"code": "x"}}, 8, "without dtype, shape and data_offsets alone"),
        ({"a": 3}, 8, "without dtype, shape and data_offsets alone"),
        ({"a": ENTRY | {"dtype": ["F32"]}}, 8, r"of dtype \['F32'\]"),
        ({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40, 0], "data_offsets": [0, 0]}}, 0, "PyTorch does not take"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, tensors: dict[str, Any], num_bytes: int, message: str) -> None:
    url = with_header(tmp_path, json.dumps({"__metadata__": DOCUMENT} | tensors).encode(), bytes(num_bytes))
    with pytest.raises(StageError, match=message) as caught:
        load(url)
    one_line(caught)


ARRAY = b"[" * 100_000


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"__metadata__": {"nfm": "{\\"run\\": {}, \\"run\\": {}}"}}', "a key twice"),
        (b'{"__metadata__": {"nfm": "{\\"run\\": {\\"a\\": 1, \\"a\\": 2}}"}}', "a key twice"),
        (b'{"__metadata__": {}, "__metadata__": {}}', "a key twice"),
        (b'{"__metadata__": {"nfm": "{\\"run\\": {\\"a\\": NaN}}"}}', "got NaN, which is no JSON"),
        (b'{"__metadata__": {"nfm": "{\\"run\\": {\\"a\\": -Infinity}}"}}', "got -Infinity, which is no JSON"),
        (b'{"__metadata__": {"nfm": "{\\"run\\": {\\"a\\": 1e999}}"}}', "got 1e999, which is too large"),
        (b'{"__metadata__": {"nfm": "{\\"run\\": {\\"a\\": ' + b"9" * 5000 + b'}}"}}', "not a JSON document"),
        (b'{"__metadata__": {"nfm": "[]"}}', "no JSON object"),
        (b'{"__metadata__": {"nfm": {"run": {}}}}', "a safetensors file that nfm did not write"),
        (b'{"__metadata__": {"format": "pt"}}', "a safetensors file that nfm did not write"),
        (b'{"__metadata__": []}', "__metadata__ that is no object"),
        (b'{"__metadata__": {"nfm": "{\\"run\\": []}"}}', "a document without a run"),
        (ARRAY, "not a JSON document"),
        (ARRAY + b"]" * 100_000, "not a JSON document"),
        (b"[" + b"[]," * 300_000 + b"1]", "more than 300000 lists and objects"),
        ('{"__metadata__": {}}'.encode("utf-16"), "not a JSON document"),
        (b"", "not a JSON document"),
    ],
)
def test_headers_that_are_no_document_are_refused(tmp_path: Path, header: bytes, message: str) -> None:
    url = with_header(tmp_path, header)
    for read in (load, load_document):
        with pytest.raises((StageError, StoreError), match=message) as caught:
            read(url)
        assert len(one_line(caught)) < 1000


def zip_archive() -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("weights/data.pkl", b"\x80\x02}q\x00.")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (zip_archive(), r"a zip archive, as PyTorch's \.pt and \.pth files are"),
        (b"\x80\x02}q\x00." + bytes(100), "a pickle"),
        (b'{"schema_version": "1.1"}', "a JSON document"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "a picture"),
        (b"\x93NUMPY\x01\x00v\x00" + bytes(100), "a NumPy array"),
        (b"", "a file of 0 bytes"),
        (b"\x01", "a file of 1 bytes"),
        ((MAX_HEADER_BYTES + 8).to_bytes(8, "little"), "a header of 33554440 bytes in a file of 8"),
    ],
)
def test_other_files_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "weights.pth").write_bytes(data)
    with pytest.raises(StageError, match=rf"weights\.pth: got no checkpoint of nfm \({message}") as caught:
        load_any_network(f"{tmp_path}/weights.pth")
    assert "expected a safetensors file that train-teacher or train-student wrote" in one_line(caught)


def test_the_state_of_a_training_is_named(run: Run, tmp_path: Path) -> None:
    document = {"run": {}, "images": 64, "stream": {"epoch": 0, "position": 64}}
    save(f"{tmp_path}/state.safetensors", Checkpoint({"network.a": torch.zeros(2)}, document))
    with pytest.raises(StageError) as caught:
        load_any_network(f"{tmp_path}/state.safetensors")
    assert "the state of a training that is not finished, which the command that began it continues" in one_line(caught)
    assert "expected the model.safetensors of a finished" in one_line(caught)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 16.0}, "width: Input should be a valid integer"),
        ({"width": "16"}, "width: Input should be a valid integer"),
        ({"width": True}, "width: Input should be a valid integer"),
        ({"depths": "11"}, "depths: Input should be a valid"),
        ({"depths": []}, "got depths"),
        ({"nvp": "no"}, "nvp: Input should be a valid boolean"),
        ({"more": 1}, "unknown more"),
        ({"depths": [1] * 50_000}, "got 50000 layers; expected at most 512"),
        ({"width": 10**30}, "architecture"),
        ({"name": 3}, "got a checkpoint of 3, expected one of TarFlow or SiT"),
    ],
)
def test_architectures_that_are_none_are_refused(
    run: Run, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    checkpoint = load(run.teacher)
    document = checkpoint.document | {"architecture": checkpoint.document["architecture"] | changes}
    save(f"{tmp_path}/x.safetensors", Checkpoint(checkpoint.tensors, document))
    with pytest.raises(StageError, match=message) as caught:
        load_any_network(f"{tmp_path}/x.safetensors")
    assert len(one_line(caught)) < 1000


def test_a_file_larger_than_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """It takes no space: it has holes."""
    values = memory_bytes() // 4
    header = {"__metadata__": DOCUMENT, "a": {"dtype": "F32", "shape": [values], "data_offsets": [0, 4 * values]}}
    url = with_header(tmp_path, data := json.dumps(header).encode())
    with open(url, "r+b") as file:
        file.truncate(8 + len(data) + 4 * values)
    with pytest.raises(
        StageError, match=r"got about .* GB of memory to fill, expected at most the .* GB of this machine"
    ):
        load(url)
    with pytest.raises(StageError, match="without an architecture"):  # which comes first, as it costs nothing
        load_any_network(url)


@pytest.mark.parametrize(
    "teacher",
    [{"eta": None}, {"eta": -0.1}, {}, None, {"eta": "much"}, {"eta": 10**400}, {"eta": 1e200}],
)
def test_a_teacher_without_eta_is_refused(teacher: Any) -> None:
    document = {"run": {"teacher": teacher}, "training": {"images": 1, "val": 0.5}}
    with pytest.raises(StageError, match="does not say how it was trained") as caught:
        read_teacher_training(document, "x")
    one_line(caught)


@pytest.mark.parametrize("training", [{"images": 1, "val": 1.7e308}, {"images": 1}, {"images": [], "val": 0.5}, None])
def test_a_teacher_without_likelihood_is_refused(training: Any) -> None:
    with pytest.raises(StageError, match="does not say how it was trained"):
        read_teacher_training({"run": {"teacher": {"eta": 0.1}}, "training": training}, "x")


POINTS: dict[str, Any] = {"images": [64, 128], "loss": [0.5, 0.25], "val_images": [], "val": []}


@pytest.mark.parametrize(
    "curves",
    [
        None,
        [],
        POINTS | {"images": []},
        POINTS | {"images": [128, 64]},
        POINTS | {"images": [0, 64]},
        POINTS | {"images": [64, 1 << 60]},
        POINTS | {"loss": ["0.5", "0.25"]},
        POINTS | {"loss": [0.5]},
        POINTS | {"val": [0.5]},
        {"images": [], "loss": [], "val_images": [], "val": []},
    ],
)
def test_curves_that_are_none_are_refused(curves: Any) -> None:
    with pytest.raises(StageError, match="its curves") as caught:
        read_curves({"curves": curves}, "x")
    one_line(caught)


def test_curves_are_read() -> None:
    curves = read_curves({"curves": POINTS | {"loss": [0, 0.25]}}, "x")
    assert vars(curves) == POINTS | {"loss": [0.0, 0.25]}
    assert curves.final_loss() == 0.25


def test_strange_runs_are_read_as_runs_that_say_nothing() -> None:
    assert has_dropped_labels({"run": {"teacher": "x"}})
    assert has_dropped_labels({"run": {"student": {"label_drop": "x"}}})
    assert not has_dropped_labels({"run": {"student": {"label_drop": 0}}})
    assert trained_on({"run": {"couplings": [{"id": 3}, "x", {"id": "a"}]}}) == [None, None, "a"]
    assert trained_on({"run": {"couplings": "a"}}) == ["a"]
    assert trained_on({"run": {}}) == [None]


def test_a_link_in_the_place_of_a_checkpoint_is_not_written_through(tmp_path: Path) -> None:
    """A user may read a checkpoint by a link, as those in a snapshot of the Hugging Face client are."""
    real, link = tmp_path / "real", tmp_path / "link"
    save(str(real), Checkpoint({}, {"run": {"a": 1}}))
    link.symlink_to("real")
    before = real.read_bytes()
    assert load(str(link)).document == {"run": {"a": 1}}
    with pytest.raises(StoreError, match="link is a link, and no link below"):
        remove(str(link))
    save(str(link), Checkpoint({}, {"run": {}}))
    assert not link.is_symlink() and real.read_bytes() == before
