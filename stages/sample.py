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
from nfm.stages.checkpoint import has_dropped_labels, load_network, read_teacher_training, read_x_spec
from nfm.stages.errors import StageError
from nfm.stages.memory import check_memory
from nfm.stages.progress import Progress, count_calls
from nfm.stages.support import describe_x
from nfm.storage_specs.format.pixels import PICTURE_CHANNELS, to_values
from nfm.storage_specs.format.schema import LatentSpec, PixelSpec
from nfm.storage_specs.storage.files import split_url

DEFAULT_SAMPLER = "heun31"  # of students
GRID_SCALE = 4  # pixels of the grid for a pixel of an image that is smaller than GRID_SCALE_BELOW
GRID_SCALE_BELOW = 64
MAX_GRID_BYTES = 1 << 30  # of the pixels of a grid; few programs show a larger picture
BATCH_VALUES = 1 << 25  # of the pixels of a batch: fewer images pass through the network at once if they are large
TENSORS = 8  # float32 tensors of a batch that a sampler holds at once, without those inside the network


@dataclass(frozen=True)
class SampleRequest:
    """What to generate: `count` images of the given classes in turn (none given: of all classes, if there are any; -1:
    without class).

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
            expected = f"0 to {num_classes - 1}, or -1 for none" if num_classes else "no --class: the network has none"
            raise StageError(f"got class {label}, expected {expected}")
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
    if num_classes == 0:
        raise StageError(
            f"got --guidance {request.guidance:g} for a network without classes, so there is nothing to guide towards; "
            "expected no --guidance"
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


def check_size(request: SampleRequest, network: SiT | TarFlow, x_spec: PixelSpec | LatentSpec, as_grid: bool) -> None:
    """Raise StageError for images that are no pictures in a grid, and for more than a grid or the memory of this
    machine holds."""
    config = network.config
    height, width = config.image_sides
    images = f"{request.count} images of {config.channels}×{height}×{width}"
    if as_grid and isinstance(x_spec, LatentSpec):
        raise StageError(
            f"got {images} for a grid, which are {describe_x(x_spec)}, expected pixels; "
            "give --out with a name ending in .npz, for the latents that the decoder takes"
        )
    if as_grid and config.channels not in PICTURE_CHANNELS:
        raise StageError(f"got {images} for a grid, expected 1 or 3 channels; give --out with a name ending in .npz")
    if as_grid:
        rows, columns = grid_shape(request.count)
        scale = grid_scale(height)
        grid_bytes = rows * columns * (height * scale + 1) * (width * scale + 1) * config.channels
        if grid_bytes > MAX_GRID_BYTES:
            raise StageError(
                f"got {images} for a grid, which needs {grid_bytes / 1e9:,.1f} GB, expected at most "
                f"{MAX_GRID_BYTES / 1e9:,.1f} GB; give a smaller --count, or --out with a name ending in .npz"
            )
    values = config.channels * height * width
    # What is kept of all images and the file of it, and at least one image on its way in float32.
    needed_bytes = 2 * request.count * values * _kept_dtype(x_spec).itemsize + TENSORS * 4 * values
    check_memory(needed_bytes, images, "give a smaller --count")


def _kept_dtype(x_spec: PixelSpec | LatentSpec) -> np.dtype[Any]:
    """In which dtype generated images are kept (see `to_values`)."""
    return np.dtype(np.uint8 if isinstance(x_spec, PixelSpec) else np.float32)


@torch.no_grad()
def generate(
    network: SiT | TarFlow, request: SampleRequest, eta: float, x_spec: PixelSpec | LatentSpec
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Images (count, C, H, W), as uint8 pixels or float32 latents, and their labels (count,).

    The η-noise of a teacher's images is removed by one score step; `eta` is not used for a student. Raises
    FloatingPointError if an image is not finite.
    """
    config = network.config
    device = next(network.parameters()).device
    classes = torch.tensor(request.classes or range(config.num_classes) or [NULL_LABEL])
    labels = classes[torch.arange(request.count) % len(classes)]
    generator = torch.Generator().manual_seed(request.seed)
    sampler = request.sampler or parse_sampler(DEFAULT_SAMPLER)
    image_shape = (config.channels, *config.image_sides)
    values = np.empty((request.count, *image_shape), dtype=_kept_dtype(x_spec))
    batches = labels.split(max(1, min(request.batch_size, BATCH_VALUES // values[0].size)))
    done = 0
    if isinstance(network, TarFlow):
        total, unit = len(batches) * network.config.decode_steps, "token"
    else:
        total, unit = len(batches) * sampler.nfe, "evaluation"
    with Progress("sample", total, unit) as progress:
        for i, y in enumerate(batches):
            progress.set_note(f"batch {i + 1} of {len(batches)}, {len(y)} images")
            noise = torch.randn((len(y), *image_shape), generator=generator).to(device)
            y = y.to(device)
            if isinstance(network, TarFlow):
                # A request counts guidance as `Guided` does, where 1 is none; for a Guide, 0 is none.
                noisy = network.sample(noise, y, Guide(weight=request.guidance - 1), progress.advance)
                images = network.denoise(noisy, y, eta)
            else:
                field = count_calls(Guided(network, request.guidance), progress)
                images = sampler(field, noise, y, keep_velocities=False).x
            values[done : done + len(y)] = to_values(images, x_spec)
            done += len(y)
    return values, labels.numpy()


def sample(checkpoint: str, out: str, request: SampleRequest) -> None:
    """Generate images with the finished model at `checkpoint`, a student or a teacher.

    `out` ends in .png, for a grid of the images, or in .npz, for the arrays `x` (uint8, (N, C, H, W)) and `label`
    (int64, (N,), -1 without a class). Of a model of latents, x is float32, as their decoder takes it, and there is no
    grid. Raises StageError for another name, and for a request that does not fit the model or the memory,
    FloatingPointError if an image is not finite.
    """
    suffix = Path(out).suffix
    if suffix not in (".png", ".npz"):
        raise StageError(f"got output {out!r}; expected a name ending in .png or .npz")
    with Progress(f"read {checkpoint}"):
        network, document = load_network(checkpoint)
    check_request(request, network, document)
    x_spec = read_x_spec(document, checkpoint)
    check_size(request, network, x_spec, as_grid=suffix == ".png")
    root, name = split_url(out)
    root.check_writable()
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    eta = 0.0
    if isinstance(network, TarFlow):
        eta = read_teacher_training(document, checkpoint).eta
    try:
        values, labels = generate(network, request, eta, x_spec)
    except FloatingPointError as error:
        raise FloatingPointError(f"{checkpoint}: {error}; nothing was written") from error
    buffer = io.BytesIO()
    if suffix == ".npz":
        np.savez(buffer, x=values, label=labels)
    else:
        grid_image(values, grid_shape(len(values))[1]).save(buffer, "PNG")
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
