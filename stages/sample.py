"""sample: a student's or a teacher's checkpoint → images."""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from nfm.models.fields import Guided
from nfm.models.labels import NULL_LABEL
from nfm.models.sit import SiT
from nfm.models.solvers import Sampler, parse_sampler
from nfm.models.tarflow import Guide, TarFlow
from nfm.stages.checkpoint import has_dropped_labels, load_network, read_teacher_training
from nfm.stages.errors import StageError
from nfm.stages.memory import check_memory
from nfm.stages.progress import Progress, count_calls
from nfm.storage_specs.format.pixels import PICTURE_CHANNELS, to_uint8
from nfm.storage_specs.storage.files import split_url

DEFAULT_SAMPLER = "heun31"  # of students
GRID_SCALE = 4  # pixels of the grid for a pixel of an image that is smaller than GRID_SCALE_BELOW
GRID_SCALE_BELOW = 64
MAX_GRID_BYTES = 1 << 30  # of the pixels of a grid; few programs show a larger picture
BATCH_VALUES = 1 << 25  # of the pixels of a batch: fewer images pass through the network at once if they are large
TENSORS = 8  # float32 tensors of a batch that a sampler holds at once, without those inside the network


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


def check_request(request: SampleRequest, network: SiT | TarFlow, document: dict[str, Any]) -> None:
    """Raise StageError for classes that the network does not have, and for options that do not apply to it. `document`
    is that of its checkpoint."""
    num_classes = network.config.num_classes
    for label in request.classes:
        if not NULL_LABEL <= label < num_classes:
            raise StageError(f"got class {label}, expected 0 to {num_classes - 1}, or -1 for none")
    if num_classes < 1 and not request.classes:
        raise StageError("got a network without classes; expected --class -1")
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
    if not has_dropped_labels(document):
        raise StageError(
            f"got --guidance {request.guidance:g} for a network that never saw a dropped label (label_drop = 0), "
            "so there is nothing to guide with; expected no --guidance"
        )


def check_size(request: SampleRequest, network: SiT | TarFlow, as_grid: bool) -> None:
    """Raise StageError for more images than a grid or the memory of this machine holds."""
    config = network.config
    side = config.image_size
    images = f"{request.count} images of {config.channels}×{side}×{side}"
    if as_grid and config.channels not in PICTURE_CHANNELS:
        raise StageError(f"got {images} for a grid, expected 1 or 3 channels; give --out with a name ending in .npz")
    if as_grid:
        rows, columns = grid_shape(request.count)
        cell = side * grid_scale(side) + 1
        grid_bytes = rows * columns * cell**2 * config.channels
        if grid_bytes > MAX_GRID_BYTES:
            raise StageError(
                f"got {images} for a grid, which needs {grid_bytes / 1e9:,.1f} GB, expected at most "
                f"{MAX_GRID_BYTES / 1e9:,.1f} GB; give a smaller --count, or --out with a name ending in .npz"
            )
    pixels = request.count * config.channels * side**2
    # The pixels and the file of them, and at least one image on its way in float32.
    check_memory(2 * pixels + TENSORS * 4 * pixels // request.count, images, "give a smaller --count")


@torch.no_grad()
def generate(network: SiT | TarFlow, request: SampleRequest, eta: float) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The pixels (count, C, H, W) of images, and their labels (count,).

    The η-noise of a teacher's images is removed by one score step; `eta` is not used for a student. Raises
    FloatingPointError if an image is not finite.
    """
    config = network.config
    device = next(network.parameters()).device
    classes = torch.tensor(request.classes or range(config.num_classes))
    labels = classes[torch.arange(request.count) % len(classes)]
    generator = torch.Generator().manual_seed(request.seed)
    sampler = request.sampler or parse_sampler(DEFAULT_SAMPLER)
    pixels = np.empty((request.count, config.channels, config.image_size, config.image_size), dtype=np.uint8)
    batches = labels.split(max(1, min(request.batch_size, BATCH_VALUES // pixels[0].size)))
    done = 0
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
                images = network.denoise(noisy, y, eta)
            else:
                field = count_calls(Guided(network, request.guidance), progress)
                images = sampler(field, noise, y, keep_velocities=False).x
            pixels[done : done + len(y)] = to_uint8(images)
            done += len(y)
    return pixels, labels.numpy()


def sample(checkpoint: str, out: str, request: SampleRequest) -> None:
    """Generate images with the finished model at `checkpoint`, a student or a teacher.

    `out` ends in .png, for a grid of the images, or in .npz, for the arrays `x` (uint8, (N, C, H, W)) and `label`
    (int64, (N,)). Raises StageError for another name, and for a request that does not fit the model or the memory,
    FloatingPointError if an image is not finite.
    """
    suffix = Path(out).suffix
    if suffix not in (".png", ".npz"):
        raise StageError(f"got output {out!r}; expected a name ending in .png or .npz")
    with Progress(f"read {checkpoint}"):
        network, document = load_network(checkpoint)
    check_request(request, network, document)
    check_size(request, network, as_grid=suffix == ".png")
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    eta = 0.0
    if isinstance(network, TarFlow):
        eta = read_teacher_training(document, checkpoint).eta
    try:
        pixels, labels = generate(network, request, eta)
    except FloatingPointError as error:
        raise FloatingPointError(f"{checkpoint}: {error}; nothing was written") from error
    buffer = io.BytesIO()
    if suffix == ".npz":
        np.savez(buffer, x=pixels, label=labels)
    else:
        grid_image(pixels, grid_shape(len(pixels))[1]).save(buffer, "PNG")
    root, name = split_url(out)
    root.write(name, buffer.getvalue())


def grid_shape(count: int) -> tuple[int, int]:
    """Rows and columns of the grid of `count` images."""
    columns = max(1, round(count**0.5))
    return math.ceil(count / columns), columns


def grid_scale(height: int) -> int:
    """Pixels of the grid, in each direction, for a pixel of an image."""
    return GRID_SCALE if height < GRID_SCALE_BELOW else 1


def grid_image(pixels: NDArray[np.uint8], columns: int) -> Image.Image:
    """Images (N, C, H, W), uint8, as one picture of `columns` columns, row by row, with a white line between them."""
    count, channels, height, width = pixels.shape
    rows = math.ceil(count / columns)
    scale = grid_scale(height)
    cell_height = height * scale + 1  # with the white line after it
    cell_width = width * scale + 1
    canvas = np.full((rows * cell_height - 1, columns * cell_width - 1, channels), 255, dtype=np.uint8)
    for i, small in enumerate(pixels):
        image = small.repeat(scale, axis=1).repeat(scale, axis=2)
        row, column = divmod(i, columns)
        top = row * cell_height
        left = column * cell_width
        canvas[top : top + height * scale, left : left + width * scale] = image.transpose(1, 2, 0)
    return Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas)
