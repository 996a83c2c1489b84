"""What the stages can work with: the format holds more than they do yet."""

from nfm.stages.errors import StageError
from nfm.storage_specs.format.schema import PixelSpec
from nfm.storage_specs.reading.store import Store


def check_supported(store: Store) -> Store:
    """Returns the store. Raises StageError unless its images are square, of uint8 pixels, with labels and in one
    view."""
    spec = store.spec
    got = None
    if not isinstance(spec.x, PixelSpec):
        got = f"{spec.x.dtype} latents"
    elif spec.shape[1] != spec.shape[2]:
        got = f"images of {spec.shape[1]}×{spec.shape[2]}"
    elif not spec.has_labels:
        got = "images without labels"
    elif len(spec.views) > 1:
        got = "mirrored views"
    if got is not None:
        raise StageError(
            f"{store.url}: got {got}; teachers and students take square uint8 pixels with labels, in one view"
        )
    return store
