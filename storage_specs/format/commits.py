"""The JSON documents of those who write a store: which store it is, and the record of each unit that is durable."""

from typing import Annotated

from pydantic import Field

from nfm.storage_specs.format.schema import FileRecord, Sha256, Spec
from nfm.storage_specs.storage.documents import StrictModel

# Of work, up to thirty million years: sums of them are finite.
Seconds = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]


class StartedStore(StrictModel):
    """`commits/spec.json`: which store is being written, or was, in a folder; and the id of the store that it is
    converted from, if it is."""

    schema_version: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+$")]
    spec: Spec
    converted_from: Sha256 | None = None


class Commit(StrictModel):
    """The commit record of a unit: draws `first` … `stop` - 1 of a block. It is written when all files of the unit are
    durable. Beside the files of columns it lists those that are added up when the store is completed: "z_sums" and
    "z_class_sums" of its draws (sums.py), and "names" of its images."""

    lineage: Sha256
    block: int
    first: int
    stop: int
    rows: int
    files: list[FileRecord]
    label_counts: dict[str, int]
    seconds: Seconds  # that the worker spent in the teacher
    device: str


class Cost(StrictModel):
    """`cost.json`: the seconds that the teacher took to make the couplings, by device name. No hash covers this file:
    it is information, which nobody can check."""

    seconds: dict[str, Seconds]

    @property
    def total(self) -> float:
        """Seconds on all devices together."""
        return sum(self.seconds.values())
