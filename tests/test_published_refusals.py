"""Files that are no published network, or hostile: each is refused in one line, and nothing in it is run."""

import argparse
import os
import random
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nfm.models.sit import SiT, SiTConfig
from nfm.models.tarflow import TarFlow, TarFlowConfig
from nfm.stages.checkpoint import Checkpoint, add_prefix, architecture, load, load_document, save
from nfm.stages.errors import StageError
from nfm.stages.published import export_published, import_published
from nfm.stages.published_shapes import FormatName, ImportOptions
from nfm.stages.sample import SampleRequest, sample
from nfm.storage_specs.storage.errors import ShownError, StoreError
from tests.tools.published import OPTIONS, assert_same_tensors, imported, published, read, write
from tests.tools.small_run import Run


def refusal(folder: Path, file: str, format_name: FormatName = "sit", options: ImportOptions | None = None) -> str:
    """The line that refuses to import a file; nothing was written."""
    out = f"{folder}/refused.safetensors"
    with pytest.raises((StageError, StoreError)) as caught:
        import_published(format_name, file, out, options or OPTIONS[format_name])
    assert not os.path.exists(out)
    message = str(caught.value)
    assert "\n" not in message
    return message


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    """The state dict of the SiT with other tensors; None: without it. `__` stands for a dot."""
    state = published("sit")[1]
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    return state


BIAS = "final_layer__linear__bias"  # of 32 values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(**{BIAS: torch.full((32,), torch.nan)}), "'final_layer.linear.bias' with NaN or infinite values"),
        (changed(**{BIAS: torch.full((32,), -torch.inf)}), "'final_layer.linear.bias' with NaN or infinite values"),
        (changed(**{BIAS: torch.zeros(32, dtype=torch.float64)}), "'final_layer.linear.bias' of dtype float64"),
        (changed(**{BIAS: torch.zeros(32, dtype=torch.int64)}), "'final_layer.linear.bias' of dtype int64"),
        (changed(**{BIAS: torch.zeros(33)}), r"'final_layer.linear.bias' of shape \[33\], expected \[32\]"),
        (changed(**{BIAS: None}), "missing 'final_layer.linear.bias'"),
        (changed(**{BIAS: None, "projector": torch.zeros(1)}), "missing 'final_layer.*; unknown 'projector'"),
        (changed(blocks__7__attn__qkv__bias=torch.zeros(144)), "missing 'blocks.3.attn.qkv.weight'.* more"),
        (changed(pos_embed=None), "no tensor 'pos_embed', which such a network has"),
        (changed(pos_embed=torch.zeros(1, 15, 48)), "got 15 tokens, expected a square number"),
        (changed(pos_embed=torch.zeros(16, 48)), r"'pos_embed' of shape \[16, 48\], expected 3 sizes"),
        (changed(pos_embed=torch.zeros(1, 0, 48)), r"'pos_embed' of shape \[1, 0, 48\], expected 3 sizes"),
        (changed(y_embedder__embedding_table__weight=torch.zeros(1, 48)), "unknown 'y_embedder"),
        (changed(x_embedder__proj__weight=torch.zeros(50, 4, 2, 2)), "the width must be a multiple"),
        (published("vp_cond")[1], "no tensor 'x_embedder.proj.weight', which such a network has"),
        ({"opt": {"state": {}}, "steps": 3}, "got entries 'opt'; 'steps', expected a state dict, by itself or as"),
        ({"ema": {"a": 1}}, "got entries 'ema', expected a state dict"),
        ({}, "got no entries, expected a state dict"),
        ([torch.zeros(2)], "got a list, expected a state dict"),
        (torch.zeros(2), "got a Tensor, expected a state dict"),
        ({"model": changed(), "args": argparse.Namespace(path_type="VP")}, "trained with path_type = 'VP'"),
        (
            {"model": changed(), "args": {"prediction": "noise"}},
            "trained with prediction = 'noise', expected 'velocity'",
        ),
    ],
)
def test_what_is_no_sit_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    assert re.search(message, refusal(tmp_path, write(tmp_path / "file.pt", content)))


def teacher(**tensors: Tensor) -> dict[str, Tensor]:
    return published("nvp_cond")[1] | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (teacher(), ImportOptions(), "got no --eta for ml-tarflow.* 0.07 of afhq_model_8_768_8_8_0.07.pth"),
        (teacher(), ImportOptions(eta=-1), "got --eta -1, expected a number from 0"),
        (teacher(), ImportOptions(eta=float("nan")), "got --eta nan, expected a number from 0"),
        (teacher(), ImportOptions(eta=0.1, image_size=5), "fit images of 12×4×4; 3×8×8; give --image-size or"),
        (teacher(), ImportOptions(eta=0.1, channels=4), "fit images of 12×4×4; 3×8×8; give --image-size or"),
        (teacher(), ImportOptions(eta=0.1, heads=3), "got width 64 and 3 heads"),
        (teacher(blocks__1__attn_mask=torch.ones(16, 16)), None, "a mask 'blocks.1.attn_mask' that is not causal"),
        (teacher(blocks__1__attn_mask=torch.ones(16, 16).tril().half()), None, "masks of several dtypes"),
        (teacher(blocks__1__attn_mask=torch.ones(4, 4).tril()), None, r"'blocks.1.attn_mask' of shape \[4, 4\]"),
        (teacher(blocks__0__proj_in__weight=torch.zeros(64, 4)), None, "1×8×8; give --image-size or --channels of one"),
        (published("sit")[1], None, "no tensor 'blocks.0.pos_embed', which such a network has"),
    ],
)
def test_what_is_no_tarflow_is_refused(
    tmp_path: Path, content: Any, options: ImportOptions | None, message: str
) -> None:
    assert re.search(message, refusal(tmp_path, write(tmp_path / "file.pth", content), "ml-tarflow", options))


def test_a_sit_of_no_published_size_needs_its_heads(tmp_path: Path) -> None:
    file = write(tmp_path / "file.pt", published("sit")[1])
    assert "nothing says its attention heads; give --heads" in refusal(tmp_path, file, "sit", ImportOptions())
    assert "got --eta for sit" in refusal(tmp_path, file, "sit", ImportOptions(eta=0.1))


def test_a_sit_of_a_published_size_needs_nothing(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = SiT(SiTConfig(channels=3, image_size=4, num_classes=2, patch=2, width=384, depth=12, heads=6))
    state = {name: torch.zeros(tensor.shape, dtype=torch.float16) for name, tensor in network.state_dict().items()}
    file, out = write(tmp_path / "s.pt", state), f"{tmp_path}/s.safetensors"
    lines = import_published("sit", file, out, ImportOptions())
    assert lines[0].endswith("SiT-12x384h6/2, 6 heads, images of 3×4×4, 2 classes")
    assert "assumed: 6 attention heads, as the published size has" in lines
    assert "x" not in load_document(out), "pixels"


def test_sizes_that_the_shapes_do_not_say_are_options(tmp_path: Path) -> None:
    """16 values in a token are 1×4×4, 4×2×2 or 16×1×1."""
    network = TarFlow(TarFlowConfig(channels=4, image_size=4, patch=2, width=64, depths=(1, 2)))
    file, out = write(tmp_path / "t.pth", network.state_dict()), f"{tmp_path}/t.safetensors"
    assert "fit images of 4×4×4; 1×8×8; give" in refusal(tmp_path, file, "ml-tarflow")
    for options in (ImportOptions(eta=0.1, channels=4), ImportOptions(eta=0.1, image_size=4)):
        first, *assumed = import_published("ml-tarflow", file, out, options)
        assert first.endswith("TarFlow TF-1×1+1×2-64/2, 1 head, images of 4×4×4, no classes")
        assert "assumed: 4 channels are latents; --samples STORE says of which decoder" in assumed
    with pytest.raises(StageError, match=r"latents of unknown .* expected pixels"):
        sample(out, f"{tmp_path}/x.png", SampleRequest(1))


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (Evil(os.system, "touch ran"), "posix system"),
        ({"model": changed(), "args": Evil(os.mkdir, "ran")}, "posix mkdir"),
        (Evil(bytearray, 1 << 40), "__builtin__ bytearray"),
        (Evil(torch.zeros, 1 << 40), "torch .*zeros|getattr"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear Linear"),
        ({"a": torch.zeros(2).to_sparse()}, "torch._utils _rebuild_sparse_tensor"),
        ({"a": np.float32(1)}, "numpy"),
    ],
    ids=["system", "mkdir", "bytearray", "zeros", "module", "sparse", "numpy"],
)
def test_pickles_that_are_more_than_tensors_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refusal(tmp_path, write(tmp_path / "file.pt", content))
    assert re.search(f"got a pickle that uses .*({name})", line)
    assert not os.path.exists("ran")


def rezipped(file: str, **change: Any) -> str:
    """The archive written again: compressed, or with other bytes in some members."""
    with zipfile.ZipFile(file) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    with zipfile.ZipFile(file, "w", change.get("compression", zipfile.ZIP_STORED)) as archive:
        for name, data in members.items():
            archive.writestr(name, change.get("edit", lambda _, data: data)(name, data))
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compression": zipfile.ZIP_DEFLATED}, "a zip archive that torch.save did not write"),
        ({"edit": lambda name, data: b"big" if name.endswith("byteorder") else data}, "the other byte order"),
        ({"edit": lambda name, data: data[:-4] if "/data/" in name else data}, "in other bytes than it says"),
        ({"edit": lambda name, data: b"" if name.endswith("data.pkl") else data}, "a file that cannot be read"),
        ({"edit": lambda name, data: data[:99] if name.endswith("data.pkl") else data}, "a file that cannot be read"),
        ({"edit": lambda name, data: data + bytes(1 << 25) if name.endswith("data.pkl") else data}, "expected at most"),
    ],
)
def test_archives_that_lie_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = rezipped(write(tmp_path / "file.pt", published("sit")[1]), **change)
    assert message in refusal(tmp_path, file)


def test_tensors_larger_than_their_bytes_are_refused(tmp_path: Path) -> None:
    """A million values that are one value, and tensors that all claim the same bytes."""
    huge = torch.zeros(1).expand(1 << 10, 48)
    tensors = {
        "x_embedder__proj__weight": torch.zeros(1).expand(1 << 20, 4, 2, 2),
        "pos_embed": huge.view(1, 1 << 10, 48),
    }
    assert refusal(tmp_path, write(tmp_path / "file.pt", changed(**tensors)))
    position = torch.zeros(1).expand(1, 1 << 16, 48)
    line = refusal(tmp_path, write(tmp_path / "file.pt", changed(pos_embed=position)))
    assert re.search(r"got tensors of \d+ bytes in a file of \d+", line)
    small = torch.zeros(1).expand(1, 16, 48)
    line = refusal(tmp_path, write(tmp_path / "file.pt", changed(pos_embed=small)))
    assert "'pos_embed' of shape [1, 16, 48] in other bytes than it says" in line


def test_other_files_are_refused(run: Run, tmp_path: Path) -> None:
    old = tmp_path / "old.pt"
    torch.save(published("sit")[1], old, _use_new_zipfile_serialization=False)
    assert "a pickle, as old .pt" in refusal(tmp_path, str(old))
    assert "expected a file of torch.save (PyTorch 1.6 or later) or safetensors" in refusal(tmp_path, str(old))
    assert "got a checkpoint of nfm" in refusal(tmp_path, run.teacher)
    assert "is missing" in refusal(tmp_path, f"{tmp_path}/nothing.pt")
    (tmp_path / "empty.pt").touch()
    assert "a file of 0 bytes" in refusal(tmp_path, f"{tmp_path}/empty.pt")
    with zipfile.ZipFile(tmp_path / "plain.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    assert "a zip archive that torch.save did not write" in refusal(tmp_path, f"{tmp_path}/plain.zip")
    assert refusal(tmp_path, str(tmp_path))
    data = (tmp_path / "old.pt").read_bytes()
    write(tmp_path / "cut.pt", published("sit")[1])
    data = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    assert "a file that cannot be read" in refusal(tmp_path, f"{tmp_path}/cut.pt")


def test_a_file_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    state = published("sit")[1]
    file, other = write(tmp_path / "sit.pt", state), write(tmp_path / "sit.safetensors", state)
    for source, out in ((file, other), (file, file), (other, other)):
        with pytest.raises(StageError, match="a file that nfm did not write, and would replace; give another --out"):
            import_published("sit", source, out, OPTIONS["sit"])
    assert_same_tensors(read(other), state)
    assert_same_tensors(read(file), state)


def test_damaged_files_give_one_line(tmp_path: Path) -> None:
    """Bytes changed at random: the file is imported, or refused in one line."""
    generator = random.Random(0)
    whole = Path(write(tmp_path / "whole.pt", published("sit")[1])).read_bytes()
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        pickle_end = archive.infolist()[1].header_offset
    damaged = tmp_path / "damaged.pt"
    for trial in range(150):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 4)):  # in the pickle, or in the list of members
            start, end = [(0, pickle_end), (len(data) - 4000, len(data))][trial % 2]
            data[generator.randrange(start, end)] = generator.randrange(256)
        damaged.write_bytes(data)
        message = ""
        try:
            import_published("sit", str(damaged), f"{tmp_path}/out.safetensors", OPTIONS["sit"])
        except ShownError as error:
            message = str(error)
        assert "\n" not in message


@pytest.mark.parametrize(
    ("published_form", "message"),
    [
        ({"format": "sit"}, "does not say how it was imported: file: Field required"),
        ({"format": "sit", "file": "x", "key": "opt", "prefix": "", "masks": None}, "how it was imported: key"),
        ([], "how it was imported"),
    ],
)
def test_a_model_that_lies_about_its_file_is_not_exported(tmp_path: Path, published_form: Any, message: str) -> None:
    checkpoint = load(imported(tmp_path, "sit"))
    document = checkpoint.document | {"run": {"published": published_form}}
    save(f"{tmp_path}/lies.safetensors", Checkpoint(checkpoint.tensors, document))
    with pytest.raises(StageError, match=message):
        export_published("sit", f"{tmp_path}/lies.safetensors", f"{tmp_path}/out.pt")


def test_a_model_is_not_replaced_by_its_export(tmp_path: Path) -> None:
    model = imported(tmp_path, "sit")
    before = Path(model).read_bytes()
    with pytest.raises(StageError, match="as model and output; give another output"):
        export_published("sit", model, model)
    assert Path(model).read_bytes() == before


def test_models_that_a_format_cannot_hold_are_not_exported(run: Run, tmp_path: Path) -> None:
    out = f"{tmp_path}/out.pt"
    with pytest.raises(StageError, match="got a checkpoint of TarFlow for sit, expected one of SiT"):
        export_published("sit", run.teacher, out)
    with pytest.raises(StageError, match="got heads of 8 channels, expected 64"):
        export_published("ml-tarflow", run.teacher, out)
    for config, got in (
        (SiTConfig(1, (4, 8), 2, 16, 1, 2, 3), "images of 4×8"),
        (SiTConfig(1, 4, 2, 16, 1, 2, 0), "no classes"),
    ):
        network, model = SiT(config), f"{tmp_path}/model.safetensors"
        document = {"run": {"student": {}}, "architecture": architecture(network)}
        save(model, Checkpoint(add_prefix("model", network.state_dict()), document))
        with pytest.raises(StageError, match=f"got {got}, which a published SiT does not have"):
            export_published("sit", model, out)
    assert not os.path.exists(out)
