"""sample: student or teacher checkpoint → images."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nfm.models.fields import Guided
from nfm.models.labels import NULL_LABEL
from nfm.models.sit import SiT
from nfm.models.solvers import Sampler
from nfm.models.tarflow import Guide, TarFlow
from nfm.stages.checkpoint import build, load, network_name, split
from nfm.stages.errors import StageError
from nfm.storage_specs.format.pixels import to_uint8

GRID_SCALE = 4  # screen pixels per image pixel for images under 64 pixels


@dataclass(frozen=True)
class SampleRequest:
    """What to draw: `count` images of the given classes in turn (empty: all classes in turn; -1: no class)."""

    count: int
    sampler: Sampler
    classes: tuple[int, ...] = ()
    guidance: float = 1.0
    seed: int = 0
    batch_size: int = 256


@torch.no_grad()
def draw(network: SiT | TarFlow, request: SampleRequest, eta: float) -> tuple[Tensor, Tensor]:
    """Images (count, C, H, W) in [-1, 1] and their labels. Guidance 1 is none; a teacher ignores the sampler and has
    its η-noise removed by one score step."""
    config = network.config
    bad = [c for c in request.classes if not NULL_LABEL <= c < config.num_classes]
    if bad:
        raise StageError(f"got class {bad[0]}, expected 0 to {config.num_classes - 1}, or -1 for none")
    device = next(network.parameters()).device
    classes = torch.tensor(request.classes or range(config.num_classes))
    labels = classes[torch.arange(request.count) % len(classes)]
    generator = torch.Generator().manual_seed(request.seed)
    images = []
    for y in labels.split(request.batch_size):
        noise = torch.randn((len(y), config.channels, config.image_size, config.image_size), generator=generator)
        noise, y = noise.to(device), y.to(device)
        if isinstance(network, TarFlow):
            noisy = network.sample(noise, y, Guide(weight=request.guidance - 1))
            images.append(network.denoise(noisy, y, eta))
        else:
            images.append(request.sampler(Guided(network, request.guidance), noise, y).x)
    return torch.cat(images).clamp(-1, 1).cpu(), labels


def sample(checkpoint: str, out: str, request: SampleRequest) -> None:
    """Write a PNG grid, or for a name ending in .npz the arrays `x` (uint8, (N, C, H, W)) and `label`."""
    if Path(out).suffix not in (".png", ".npz"):
        raise StageError(f"got output {out!r}; expected a name ending in .png or .npz")
    loaded = load(checkpoint)
    teacher = loaded.document["run"].get("teacher")
    network = build(loaded, network_name(loaded), checkpoint)
    assert isinstance(network, SiT | TarFlow)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    eta = float(teacher["eta"]) if teacher else 0.0
    images, labels = draw(network, request, eta)
    pixels = to_uint8(images)
    buffer = io.BytesIO()
    if Path(out).suffix == ".npz":
        np.savez(buffer, x=pixels, label=labels.numpy())
    else:
        columns = min(len(pixels), max(1, round(len(pixels) ** 0.5)))
        grid_image(pixels, columns).save(buffer, "PNG")
    root, name = split(out)
    root.write(name, buffer.getvalue())


def grid_image(pixels: NDArray[np.uint8], columns: int) -> Image.Image:
    """uint8 (N, C, H, W) as one picture, row by row, one pixel of white between images."""
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    scale = GRID_SCALE if height < 64 else 1
    canvas = np.full(
        (rows * (height * scale + 1) - 1, columns * (width * scale + 1) - 1, channels), 255, dtype=np.uint8
    )
    for i, image in enumerate(pixels.repeat(scale, axis=2).repeat(scale, axis=3)):
        top, left = i // columns * (height * scale + 1), i % columns * (width * scale + 1)
        canvas[top : top + height * scale, left : left + width * scale] = image.transpose(1, 2, 0)
    return Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas)
