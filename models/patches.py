"""The height and width of images, and their grid of patches, as all networks of this project take them."""

ImageSize = int | tuple[int, int]  # one number where H = W, else (H, W), in pixels


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """(H, W) of an image size."""
    return (size, size) if isinstance(size, int) else size


def canonical_size(size: ImageSize) -> ImageSize:
    """The size as one number where H = W, so that equal networks have equal configs."""
    height, width = height_and_width(size)
    return height if height == width else (height, width)


def patch_grid(size: ImageSize, patch: int) -> tuple[int, int]:
    """Rows and columns of the square patches of an image. Raises ValueError if the patch does not divide both sides."""
    height, width = height_and_width(size)
    if height % patch or width % patch:
        shown = f"{height}" if height == width else f"{height}×{width}"
        raise ValueError(f"got image size {shown} and patch {patch}; the patch must divide the image")
    return height // patch, width // patch
