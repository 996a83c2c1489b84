"""The shipped presets: a TOML file each."""

from importlib.resources import files


def preset_names() -> list[str]:
    """Their names, sorted."""
    names = [entry.name for entry in files(__name__).iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def preset_text(name: str) -> str:
    """The TOML of a preset."""
    return (files(__name__) / f"{name}.toml").read_text(encoding="utf-8")
