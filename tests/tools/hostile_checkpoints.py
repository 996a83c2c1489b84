"""Checkpoints that ask for far more memory than they have bytes on the disk."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from nfm.models.sit import SiT, SiTConfig
from nfm.stages.checkpoint import DOCUMENT_KEY, add_prefix, architecture
from nfm.stages.safetensors_header import MAX_HEADER_BYTES

SPARSE_VALUES = 50_000_000_000  # of four bytes


def write_checkpoint(folder: Path, header: bytes, value_bytes: int = 0) -> str:
    """A safetensors file of a header and of zeros, which take no space."""
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + value_bytes)
    return str(path)


def sound_header(document: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> tuple[bytes, int]:
    """A header whose offsets are right, and the bytes of the values."""
    header: dict[str, Any] = {"__metadata__": {DOCUMENT_KEY: json.dumps(document)}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    return json.dumps(header).encode(), end


def student_of(config: SiTConfig) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The document of a student, and the shapes of its weights."""
    with torch.device("meta"):
        network = SiT(config)
    shapes = add_prefix("model", {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()})
    return {"run": {"student": {}}, "architecture": architecture(network)}, shapes


def sparse_weights(folder: Path) -> tuple[str]:
    """200 GB that are no weights of its network."""
    document, shapes = student_of(SiTConfig(1, 8, 2, 16, 1, 2, 10))
    return (write_checkpoint(folder, *sound_header(document, shapes | {"model.more": (SPARSE_VALUES,)})),)


def sparse_network(folder: Path) -> tuple[str]:
    """200 GB that are the weights of its network."""
    document, shapes = student_of(SiTConfig(1, 8, 2, 50_000, 1, 2, 10))
    header, value_bytes = sound_header(document, shapes)
    assert value_bytes > 4 * SPARSE_VALUES
    return (write_checkpoint(folder, header, value_bytes),)


def sparse_state(folder: Path) -> tuple[str]:
    """200 GB of a state, for which nothing says how large it is."""
    return (write_checkpoint(folder, *sound_header({"run": {}, "stream": {}}, {"network.a": (SPARSE_VALUES,)})),)


def long_header(folder: Path) -> tuple[str]:
    """60 MB of nested lists."""
    return (write_checkpoint(folder, b"[" * 60_000_000),)


def nested_header(folder: Path) -> tuple[str]:
    """As many lists as fit into a header."""
    return (write_checkpoint(folder, b"[" + b"[]," * ((MAX_HEADER_BYTES - 8) // 3) + b"0]"),)


def nested_document(folder: Path) -> tuple[str]:
    """As many lists as fit into the document in a header."""
    text = '{"run": [' + "[]," * ((MAX_HEADER_BYTES - 100) // 3) + "0]}"
    return (write_checkpoint(folder, json.dumps({"__metadata__": {DOCUMENT_KEY: text}}).encode()),)


def wide_document(folder: Path) -> tuple[str]:
    """As many numbers as fit into the document in a header."""
    text = '{"run": {"a": [' + "1.5," * ((MAX_HEADER_BYTES - 100) // 4) + "0]}}"
    return (write_checkpoint(folder, json.dumps({"__metadata__": {DOCUMENT_KEY: text}}).encode()),)


def many_layers(folder: Path) -> tuple[str]:
    """A network of as many layers as there are tensors in the header."""
    document, shapes = student_of(SiTConfig(1, 8, 2, 16, 1, 2, 10))
    document["architecture"]["depth"] = 90_000
    return (write_checkpoint(folder, *sound_header(document, shapes | {f"model.a{i}": () for i in range(90_000)})),)


def large_images(folder: Path) -> tuple[str, str]:
    """A small student of images of 8192 × 8192, and where 100 of them would be written."""
    document, shapes = student_of(SiTConfig(1, 8192, 1024, 4, 1, 1, 10))
    return write_checkpoint(folder, *sound_header(document, shapes)), f"{folder}/images.png"
