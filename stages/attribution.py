"""Where data come from and on what terms, as prepare and encode write it into stores."""

import reprlib

from pydantic import Field, field_validator

from nfm.stages.progress import print_line
from nfm.stages.section import Section
from nfm.storage_specs.format.attribution import MAX_TEXT, Attribution, canonical_licence, check_public_url
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.writing.publish import annotate_store


class AttributionConfig(Section):
    """Where the data come from and on what terms. A coupling store inherits it from its samples."""

    licence: str | None = Field(
        default=None,
        max_length=MAX_TEXT,
        description='Licence of the data as an SPDX expression, such as "CC-BY-4.0"; '
        'for terms that SPDX does not list, "LicenseRef-" and a name. Without it: that of the samples, if any.',
    )
    citation: str | None = Field(
        default=None,
        max_length=MAX_TEXT,
        description="How to cite the data: a reference, or BibTeX. Without it: that of the samples, if any.",
    )
    creator: str | None = Field(
        default=None,
        max_length=MAX_TEXT,
        description="Who made the data: a person or an organization. Without it: that of the samples, if any.",
    )
    source_url: str | None = Field(
        default=None,
        max_length=MAX_TEXT,
        description="Where the data were obtained. Without it: that of the samples, if any.",
    )
    notes: str | None = Field(
        default=None,
        max_length=MAX_TEXT,
        description="Anything else that a user of the data should know. Without it: those of the samples, if any.",
    )

    @field_validator("*")
    @classmethod
    def _check_is_not_empty(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise ValueError(f"got {text!r}; expected a text, or no such key (nfm store annotate --remove clears it)")
        return text

    @field_validator("licence")
    @classmethod
    def _check_licence(cls, licence: str | None) -> str | None:
        return None if licence is None else canonical_licence(licence)

    @field_validator("source_url")
    @classmethod
    def _check_source_url(cls, url: str | None) -> str | None:
        return None if url is None else check_public_url(url)

    def to_attribution(self) -> Attribution:
        """The part of a store's document that this config gives."""
        return Attribution(**self.model_dump())


def update_attribution(url: str, config: AttributionConfig) -> None:
    """Give the complete store at a URL what the config says, as a new version if it says something new, and print what
    that changes."""
    attribution = config.to_attribution()
    if attribution == Attribution():
        return
    before = Store(url).dataset.attribution.model_dump()
    dataset = annotate_store(Store(url), attribution)
    changes = [
        f"{field} {_shorten(before[field])} → {_shorten(text)}"
        for field, text in dataset.attribution.model_dump().items()
        if text != before[field]
    ]
    if changes:
        print_line(f"{url}: version {dataset.version} changes {'; '.join(changes)}")


def _shorten(text: str | None) -> str:
    """A text of an attribution for one line."""
    return "none" if text is None else reprlib.repr(text)
