"""What every stage's part of the config has in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One part of the config: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
