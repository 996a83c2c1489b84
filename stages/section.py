"""The base of all sections of the config."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of the config. It is immutable; an unknown key, and a value of another type, is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)
