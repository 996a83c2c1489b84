"""What a stored x means: uint8 0 … 255 stands for [-1, 1]."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def scale_pixels(pixels: Tensor, out: Tensor) -> Tensor:
    """Write x / 127.5 - 1 of uint8 pixels to the float32 tensor `out` of the same shape, in [-1, 1]. Returns `out`."""
    return out.copy_(pixels).div_(127.5).sub_(1)


def to_float(pixels: NDArray[np.uint8]) -> Tensor:
    """A new float32 tensor with x / 127.5 - 1 of uint8 pixels, in [-1, 1]."""
    return scale_pixels(torch.from_numpy(np.array(pixels)), torch.empty(pixels.shape))


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """The pixels 0 … 255, rounded, of images in [-1, 1]. Values outside are clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
