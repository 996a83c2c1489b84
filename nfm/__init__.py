"""Normalized Flow Matching: flow-matching students trained on the noise/data pairs of a normalizing-flow teacher.

The names in `__all__` are for notebooks and other people's code; docs/api.md shows each. They are imported when they
are first used, so that `import nfm` takes no time. The folders `models`, `stages`, `pipeline` and `storage_specs` at
the root of the repository are packages inside this one.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nfm.stages.checkpoint import load_any_network as load
    from nfm.storage_specs.reading.store import Store
    from nfm.storage_specs.reading.stream import CouplingStream, Source, StreamState

__all__ = ["CouplingStream", "Source", "Store", "StreamState", "__version__", "load"]

__version__ = "0.1.0"  # pyproject.toml reads it here

# Public name → the module that defines it, and its name there.
_LOCATIONS = {
    "CouplingStream": ("nfm.storage_specs.reading.stream", "CouplingStream"),
    "Source": ("nfm.storage_specs.reading.stream", "Source"),
    "Store": ("nfm.storage_specs.reading.store", "Store"),
    "StreamState": ("nfm.storage_specs.reading.stream", "StreamState"),
    "load": ("nfm.stages.checkpoint", "load_any_network"),
}


if not TYPE_CHECKING:  # type checkers read the imports above, and so find names that do not exist

    def __getattr__(name: str) -> object:
        """Import a public name at its first use. Raises AttributeError for any other name."""
        if name not in _LOCATIONS:
            raise AttributeError(f"module 'nfm' has no attribute {name!r}; its names are {', '.join(__all__)}")
        module, attribute = _LOCATIONS[name]
        value = getattr(import_module(module), attribute)
        globals()[name] = value  # later uses find it without this function
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
