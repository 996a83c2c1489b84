"""The Fréchet distance between images and those of a store."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nfm.models.metrics import PixelFeatures, frechet_metric
from nfm.stages.errors import StageError
from nfm.stages.memory import check_memory
from nfm.stages.progress import Progress
from nfm.storage_specs.format.pixels import to_float, to_uint8
from nfm.storage_specs.format.schema import LatentSpec, Spec
from nfm.storage_specs.reading.store import Store

Features = Literal["pixels", "inception"]
INCEPTION_WIDTH = 2048  # of the features that FID is taken over
FRECHET_MATRICES = 6  # float64 matrices of features × features that are held while a distance is computed
UNPICKLING_ERROR: type[Exception] = sys.modules["pickle"].UnpicklingError  # PyTorch raises it
FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def weights_alone() -> Iterator[None]:
    """Makes PyTorch read weights alone, whatever its caller asks for: torch-fidelity asks for any pickled object, which
    may run code, of a file that it downloads without a hash."""
    before = os.environ.get(FORCE_WEIGHTS_ONLY)
    os.environ[FORCE_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        del os.environ[FORCE_WEIGHTS_ONLY]
        if before is not None:
            os.environ[FORCE_WEIGHTS_ONLY] = before


def all_images(store: Store) -> NDArray[np.int64]:
    """The numbers of all images of a store with N rows: image i is row i mod N in the view with number ⌊i / N⌋, so that
    a store with two views has 2·N images."""
    return np.arange(store.spec.rows * len(store.spec.views), dtype=np.int64)


def read_images(store: Store, images: NDArray[np.int64]) -> Tensor:
    """x of the images with some numbers, (len(images), C, H, W): pixels in [-1, 1], or scaled latents."""
    spec = store.spec
    view_numbers, rows = np.divmod(images, spec.rows)
    stored = np.empty((len(images), *spec.shape), dtype=spec.dtype("x"))
    for view_number, view in enumerate(spec.views):
        positions = np.flatnonzero(view_numbers == view_number)
        stored[positions] = store.x_of_rows(rows[positions], view)
    return to_float(stored, spec.x)


class FrechetDistance:
    """Fréchet distance of images to reference images, which `spec` describes: FID over Inception features, or over the
    values of x, which are pixels or latents; `over` says which.

    Raises StageError if torch-fidelity, which Inception features need, is not installed, or if its weights cannot be
    read, or if the pixels are too many.
    """

    def __init__(self, features: Features, batch_size: int, spec: Spec, device: torch.device) -> None:
        dim = spec.dim
        self.are_latents = isinstance(spec.x, LatentSpec)
        self.over = "latents" if self.are_latents else features
        self.batch_size = batch_size
        self.device = device
        self.over_pixels = features == "pixels"
        if self.over_pixels:
            needed = FRECHET_MATRICES * 8 * dim**2
            check_memory(needed, f"evaluate.features = 'pixels' of {dim} values an image", "use 'inception'")
        try:
            with weights_alone():
                metric = frechet_metric(PixelFeatures(dim) if self.over_pixels else INCEPTION_WIDTH)
        except ModuleNotFoundError as error:
            raise StageError(
                f"evaluate.features = 'inception' needs torch-fidelity ({error}); install nfm[fid], or use 'pixels'"
            ) from error
        except (OSError, RuntimeError, EOFError, UNPICKLING_ERROR) as error:
            reason = str(error).partition("\n")[0]
            if isinstance(error, UNPICKLING_ERROR):  # whose text advises to run what the file holds
                reason = "the file holds something else than weights"
            raise StageError(
                "evaluate.features = 'inception': cannot read the Inception weights that torch-fidelity downloads to "
                f"{torch.hub.get_dir()}/checkpoints ({reason}); delete a damaged file there, or use 'pixels'"
            ) from error
        self.metric = metric.to(device)

    def set_reference(self, store: Store, progress: Progress) -> None:
        """Take all images of a store, in all of its views, as the reference."""
        self._update_from_store(store, all_images(store), is_reference=True, progress=progress)

    def measure_stored(self, store: Store, images: NDArray[np.int64], progress: Progress) -> float:
        """The distance of the images of a store with some numbers (see `all_images`)."""
        self.metric.reset()  # keeps the reference
        self._update_from_store(store, images, is_reference=False, progress=progress)
        return float(self.metric.compute())

    def measure(self, images: Tensor, progress: Progress) -> float:
        """The distance of images (N, C, H, W); pixels are clamped to [-1, 1]."""
        self.metric.reset()  # keeps the reference
        for batch in (images if self.are_latents else images.clamp(-1, 1)).split(self.batch_size):
            self._update(batch, is_reference=False)
            progress.advance(len(batch))
        return float(self.metric.compute())

    def _update_from_store(
        self, store: Store, images: NDArray[np.int64], is_reference: bool, progress: Progress
    ) -> None:
        """Read a batch at a time: the store may be larger than memory."""
        for start in range(0, len(images), self.batch_size):
            batch = read_images(store, images[start : start + self.batch_size])
            self._update(batch, is_reference)
            progress.advance(len(batch))

    def _update(self, images: Tensor, is_reference: bool) -> None:
        if not self.over_pixels:
            images = torch.from_numpy(to_uint8(images)).expand(-1, 3, -1, -1)  # (B, 3, H, W), grey images three times
        self.metric.update(images.to(self.device), real=is_reference)
