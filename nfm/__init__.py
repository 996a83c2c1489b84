"""Normalized Flow Matching: flow-matching students trained on the noise/data pairs of a normalizing-flow teacher.

These are the names for notebooks and other people's code (docs/api.md); each is imported when it is first used. The
folders `models`, `stages`, `pipeline` and `storage_specs` at the root of the repository are packages in here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nfm.stages.checkpoint import load_model as load
    from nfm.storage_specs.reading.store import Store
    from nfm.storage_specs.reading.stream import CouplingStream, Source, StreamState

    __version__: str

__all__ = ["CouplingStream", "Source", "Store", "StreamState", "__version__", "load"]

_HOMES = {
    "CouplingStream": ("nfm.storage_specs.reading.stream", "CouplingStream"),
    "Source": ("nfm.storage_specs.reading.stream", "Source"),
    "Store": ("nfm.storage_specs.reading.store", "Store"),
    "StreamState": ("nfm.storage_specs.reading.stream", "StreamState"),
    "load": ("nfm.stages.checkpoint", "load_model"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("nfm")
    if name not in _HOMES:
        raise AttributeError(f"module 'nfm' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
