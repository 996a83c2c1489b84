"""A picture of a store: some of its images, and its z beside the normal distribution."""

import io

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.files import Root

ROWS, COLUMNS = 6, 10


def plot_store(store: Store, out: str) -> None:
    """Write a PNG: images of the first block, and the histogram of z / σ_f of its first draw (log scale)."""
    spec = store.spec
    shown = store.column("x", 0)[: ROWS * COLUMNS]
    figure, axes = plt.subplots(1, 2 if spec.coupling else 1, figsize=(11 if spec.coupling else 6, 4), squeeze=False)
    c, h, w = spec.shape
    grid = np.full((ROWS * (h + 1), COLUMNS * (w + 1), 3), 255, dtype=np.uint8)
    for i, image in enumerate(shown):
        top, left = divmod(i, COLUMNS)
        pixels = image[:3] if c >= 3 else image[:1]  # of latents, one channel
        grid[top * (h + 1) :][:h, left * (w + 1) :][:, :w] = np.moveaxis(pixels, 0, -1)
    axes[0, 0].imshow(grid)
    axes[0, 0].set_axis_off()
    axes[0, 0].set_title(f"x, {len(shown)} of {spec.rows}")
    if spec.coupling:
        z = (store.z(0, 0) / store.sigma_f).ravel()
        edges = np.linspace(-6, 6, 121)
        density, _ = np.histogram(z, edges, density=True)
        axes[0, 1].stairs(density, edges, fill=True, alpha=0.5, label=f"z / σ_f, {len(z):,} values")
        normal = np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi)
        axes[0, 1].plot(edges, normal, color="black", linewidth=1, label="normal")
        axes[0, 1].set(
            yscale="log", ylim=(1e-6, 1), xlabel="z / σ_f", title=f"z of block 0, draw 0 (η = {spec.coupling.eta})"
        )
        axes[0, 1].legend()
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    folder, slash, name = out.rpartition("/")
    Root(folder or slash or ".").write(name, picture.getvalue())
