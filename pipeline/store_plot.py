"""A picture of a store: some of its images, and its z beside the normal distribution."""

import io
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from nfm.storage_specs.format.codecs import decode_float, decode_z
from nfm.storage_specs.format.schema import PixelSpec
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.files import split_url

ROWS, COLUMNS = 6, 10  # of the grid of images
MAX_SIDE = 128  # pixels of an image in the grid; of a larger one every second, third, … pixel is shown
MAX_Z = 1 << 24  # values in the histogram
Z_RANGE = 6.0  # the histogram goes from -Z_RANGE to Z_RANGE


def plot_store(store: Store, out: str) -> None:
    """Write a PNG: images of the first block, and the histogram of z / σ_f of its first draw (log scale). What is not
    shown is not read, so large images take little memory."""
    if store.spec.coupling:
        figure, axes = plt.subplots(1, 2, figsize=(11, 4), squeeze=False)
        _plot_z(axes[0, 1], store)
    else:
        figure, axes = plt.subplots(1, 1, figsize=(6, 4), squeeze=False)
    _plot_images(axes[0, 0], store)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    root, name = split_url(out)
    root.write(name, picture.getvalue())


def _plot_images(axes: Axes, store: Store) -> None:
    """A grid of the first images, with a white pixel between them."""
    shown = slice(3) if store.spec.shape[0] >= 3 else slice(1)  # of one or two channels, the first
    step = _step(store)
    images = _to_pixels(store, store.column("x", 0)[: ROWS * COLUMNS, shown, ::step, ::step])
    height, width = images.shape[2:]
    grid = np.full((ROWS * (height + 1), COLUMNS * (width + 1), 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, COLUMNS)
        top, left = row * (height + 1), column * (width + 1)
        grid[top : top + height, left : left + width] = np.moveaxis(image, 0, -1)
    axes.imshow(grid)
    axes.set_axis_off()
    name = "x" if isinstance(store.spec.x, PixelSpec) else "x (latents, not decoded)"
    axes.set_title(f"{name}, {len(images)} of {store.spec.rows}")


def _step(store: Store) -> int:
    """Of how many pixels in each direction one is shown."""
    _, height, width = store.spec.shape
    return -(-max(height, width) // MAX_SIDE)


def _to_pixels(store: Store, stored: NDArray[Any]) -> NDArray[np.uint8]:
    """Stored x (rows, C, H, W) as pixels; of latents, from their least to their largest value here."""
    if isinstance(store.spec.x, PixelSpec):
        return stored
    values = decode_float(stored, store.spec.x.dtype)
    least, largest = float(values.min()), float(values.max())
    pixels: NDArray[np.uint8] = np.rint((values - least) * (255 / max(largest - least, 1e-30))).astype(np.uint8)
    return pixels


def _plot_z(axes: Axes, store: Store) -> None:
    """The histogram of z / σ_f of block 0, draw 0, of at most MAX_Z values of its first images, and the standard normal
    density."""
    step = _step(store)
    stored = store.column("z", 0, 0)[:, :, ::step, ::step]
    stored = stored[: max(1, MAX_Z // stored[0].size)]
    scale = None if store.z_scale is None else store.z_scale[:, ::step, ::step]
    z = (decode_z(stored, store.spec.nfm.z_dtype, scale) / store.sigma_f[:, ::step, ::step]).ravel()
    edges = np.linspace(-Z_RANGE, Z_RANGE, 121)
    density, _ = np.histogram(z, edges, density=True)
    normal = np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi)
    axes.stairs(density, edges, fill=True, alpha=0.5, label=f"z / σ_f, {len(z):,} values")
    axes.plot(edges, normal, color="black", linewidth=1, label="normal")
    axes.set(
        yscale="log",
        ylim=(1e-6, 1),
        xlabel="z / σ_f",
        title=f"z of block 0, draw 0 (η = {store.spec.nfm.eta})",
    )
    axes.legend()
