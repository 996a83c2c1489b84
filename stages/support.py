"""What the stages can work with: the format holds more than they do yet, and networks take the images they were made
for."""

from nfm.models.sit import SiT
from nfm.models.tarflow import TarFlow
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


def check_network(network: SiT | TarFlow, url: str, store: Store) -> None:
    """Raise StageError unless the network, whose checkpoint is at `url`, takes images and labels of the store."""
    config, spec = network.config, store.spec
    shape = (config.channels, config.image_size, config.image_size)
    if (shape, config.num_classes) != (spec.shape, spec.num_classes):
        kind = "teacher" if isinstance(network, TarFlow) else "student"
        raise StageError(
            f"{url}: got a {kind} of {shape} images with {config.num_classes} classes, expected {spec.shape} with "
            f"{spec.num_classes} classes as in {store.url}; use the {kind} that was trained on these samples"
        )
