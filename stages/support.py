"""What x stands for, and whether a network takes the images of a store."""

from typing import Any

from nfm.models.sit import SiT
from nfm.models.tarflow import TarFlow
from nfm.stages.checkpoint import read_x_spec
from nfm.stages.errors import StageError
from nfm.storage_specs.format.schema import LatentSpec, PixelSpec
from nfm.storage_specs.reading.store import Store


def check_network(network: SiT | TarFlow, document: dict[str, Any], url: str, store: Store) -> None:
    """Raise StageError unless the network, whose checkpoint is at `url` and has this document, takes images and labels
    of the store."""
    config, spec = network.config, store.spec
    kind = "teacher" if isinstance(network, TarFlow) else "student"
    shape = (config.channels, *config.image_sides)
    if (shape, config.num_classes) != (spec.shape, spec.num_classes):
        raise StageError(
            f"{url}: got a {kind} of {shape} images with {config.num_classes} classes, expected {spec.shape} with "
            f"{spec.num_classes} classes as in {store.url}; use the {kind} that was trained on these samples"
        )
    x_spec = read_x_spec(document, url)
    if meaning(x_spec) != meaning(spec.x):
        raise StageError(
            f"{url}: got a {kind} of {describe_x(x_spec)}, expected {describe_x(spec.x)} as in {store.url}; "
            f"use the {kind} that was trained on these samples"
        )


def levels_of(x_spec: PixelSpec | LatentSpec) -> int | None:
    """The number of values that x can have in [-1, 1], as bits per dimension need it; None for latents."""
    return 256 if isinstance(x_spec, PixelSpec) else None


def meaning(x_spec: PixelSpec | LatentSpec) -> tuple[Any, ...]:
    """What x stands for, whatever the dtype in which it is stored."""
    return () if isinstance(x_spec, PixelSpec) else (x_spec.scale, x_spec.shift, x_spec.decoder)


def describe_x(x_spec: PixelSpec | LatentSpec) -> str:
    """What x stands for, in words."""
    if isinstance(x_spec, PixelSpec):
        return "pixels"
    decoder = x_spec.decoder
    return f"latents of {decoder.name} {decoder.sha256[:8]} (scale {x_spec.scale:g}, shift {x_spec.shift:g})"
