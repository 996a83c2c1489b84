"""Errors of the pipeline."""


class ConfigError(ValueError):
    """A preset or an override does not describe a run. The message names every key that is missing or wrong."""
