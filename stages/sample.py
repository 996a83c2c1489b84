"""sample: a student's or a teacher's checkpoint → images."""

import io
import math
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
from nfm.models.solvers import Sampler, parse_sampler
from nfm.models.tarflow import Guide, TarFlow
from nfm.stages.checkpoint import (
    Checkpoint,
    build,
    has_dropped_labels,
    load,
    network_name,
    read_teacher_training,
)
from nfm.stages.errors import StageError
from nfm.stages.progress import Progress, count_calls
from nfm.storage_specs.format.pixels import to_uint8
from nfm.storage_specs.storage.files import split_url

DEFAULT_SAMPLER = "heun31"  # of students
GRID_SCALE = 4  # pixels of the grid for a pixel of an image that is smaller than GRID_SCALE_BELOW
GRID_SCALE_BELOW = 64


@dataclass(frozen=True)
class SampleRequest:
    """What to generate: `count` images of the given classes in turn (none given: of all classes; -1: without class).

    `sampler` is None for a teacher, and for a student that takes DEFAULT_SAMPLER. `guidance` is the weight of
    classifier-free guidance; 1 is no guidance.
    """

    count: int
    sampler: Sampler | None = None
    classes: tuple[int, ...] = ()
    guidance: float = 1.0
    seed: int = 0
    batch_size: int = 256


def check_request(request: SampleRequest, network: SiT | TarFlow, checkpoint: Checkpoint) -> None:
    """Raise StageError for classes that the network does not have, and for options that do not apply to it."""
    num_classes = network.config.num_classes
    for label in request.classes:
        if not NULL_LABEL <= label < num_classes:
            raise StageError(f"got class {label}, expected 0 to {num_classes - 1}, or -1 for none")
    is_teacher = isinstance(network, TarFlow)
    if is_teacher and request.sampler is not None:
        raise StageError(
            f"got --sampler {request.sampler.name} for a teacher, which has none: it decodes its noise token by token; "
            "expected no --sampler"
        )
    if request.guidance == 1:
        return
    min_guidance = 1 if is_teacher else 0
    if not (min_guidance <= request.guidance < math.inf):
        kind = "teacher" if is_teacher else "student"
        raise StageError(
            f"got --guidance {request.guidance:g} for a {kind}, expected a number of at least {min_guidance}"
        )
    if request.classes and set(request.classes) == {NULL_LABEL}:
        raise StageError(
            f"got --guidance {request.guidance:g} for images without a class, which it cannot change; "
            "expected no --guidance, or another --class than -1"
        )
    if not has_dropped_labels(checkpoint.document):
        raise StageError(
            f"got --guidance {request.guidance:g} for a network that never saw a dropped label (label_drop = 0), "
            "so there is nothing to guide with; expected no --guidance"
        )


@torch.no_grad()
def generate(network: SiT | TarFlow, request: SampleRequest, eta: float) -> tuple[Tensor, Tensor]:
    """Images (count, C, H, W) in [-1, 1] on the CPU, and their labels (count,).

    The η-noise of a teacher's images is removed by one score step; `eta` is not used for a student.
    """
    config = network.config
    device = next(network.parameters()).device
    classes = torch.tensor(request.classes or range(config.num_classes))
    labels = classes[torch.arange(request.count) % len(classes)]
    generator = torch.Generator().manual_seed(request.seed)
    sampler = request.sampler or parse_sampler(DEFAULT_SAMPLER)
    batches = labels.split(request.batch_size)
    images: list[Tensor] = []
    if isinstance(network, TarFlow):
        total, unit = len(batches) * network.config.decode_steps, "token"
    else:
        total, unit = len(batches) * sampler.nfe, "evaluation"
    with Progress("sample", total, unit) as progress:
        for i, y in enumerate(batches):
            progress.set_note(f"batch {i + 1} of {len(batches)}, {len(y)} images")
            shape = (len(y), config.channels, config.image_size, config.image_size)
            noise = torch.randn(shape, generator=generator).to(device)
            y = y.to(device)
            if isinstance(network, TarFlow):
                # A request counts guidance as `Guided` does, where 1 is none; for a Guide, 0 is none.
                noisy = network.sample(noise, y, Guide(weight=request.guidance - 1), progress.advance)
                images.append(network.denoise(noisy, y, eta))
            else:
                field = count_calls(Guided(network, request.guidance), progress)
                images.append(sampler(field, noise, y).x)
        result = torch.cat(images).clamp(-1, 1).cpu()
    return result, labels


def sample(checkpoint: str, out: str, request: SampleRequest) -> None:
    """Generate images with the finished model at `checkpoint`, a student or a teacher.

    `out` ends in .png, for a grid of the images, or in .npz, for the arrays `x` (uint8, (N, C, H, W)) and `label`
    (int64, (N,)). Raises StageError for another name, and for a request that does not fit the model.
    """
    if Path(out).suffix not in (".png", ".npz"):
        raise StageError(f"got output {out!r}; expected a name ending in .png or .npz")
    with Progress(f"read {checkpoint}"):
        loaded = load(checkpoint)
        network = build(loaded, network_name(loaded, checkpoint), checkpoint)
    assert isinstance(network, SiT | TarFlow)
    check_request(request, network, loaded)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    eta = 0.0
    if isinstance(network, TarFlow):
        eta = read_teacher_training(loaded.document, checkpoint).eta
    images, labels = generate(network, request, eta)
    pixels = to_uint8(images)
    buffer = io.BytesIO()
    if Path(out).suffix == ".npz":
        np.savez(buffer, x=pixels, label=labels.numpy())
    else:
        columns = min(len(pixels), max(1, round(len(pixels) ** 0.5)))
        grid_image(pixels, columns).save(buffer, "PNG")
    root, name = split_url(out)
    root.write(name, buffer.getvalue())


def grid_image(pixels: NDArray[np.uint8], columns: int) -> Image.Image:
    """Images (N, C, H, W), uint8, as one picture of `columns` columns, row by row, with a white line between them."""
    count, channels, height, width = pixels.shape
    rows = math.ceil(count / columns)
    scale = GRID_SCALE if height < GRID_SCALE_BELOW else 1
    cell_height = height * scale + 1  # with the white line after it
    cell_width = width * scale + 1
    canvas = np.full((rows * cell_height - 1, columns * cell_width - 1, channels), 255, dtype=np.uint8)
    for i, image in enumerate(pixels.repeat(scale, axis=2).repeat(scale, axis=3)):
        row, column = divmod(i, columns)
        top = row * cell_height
        left = column * cell_width
        canvas[top : top + height * scale, left : left + width * scale] = image.transpose(1, 2, 0)
    return Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas)
