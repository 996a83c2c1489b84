"""How a command ends when its config is wrong."""


class ConfigError(ValueError):
    """A preset or an override that does not describe a run."""
