"""Where data come from and on what terms, as prepare and encode write it into stores."""

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from pydantic import Field, field_validator

from nfm.stages.section import Section
from nfm.storage_specs.format.schema import MAX_TEXT, Attribution
from nfm.storage_specs.reading.store import Store
from nfm.storage_specs.storage.text import redact
from nfm.storage_specs.writing.publish import annotate_store


class AttributionConfig(Section):
    """Where the data come from and on what terms. A coupling store inherits it from its samples."""

    licence: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_TEXT,
        description='Licence of the data as an SPDX expression, such as "CC-BY-4.0"; '
        'for terms that SPDX does not list, "LicenseRef-" and a name. Without it: that of the samples, if any.',
    )
    citation: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_TEXT,
        description="How to cite the data: a reference, or BibTeX. Without it: that of the samples, if any.",
    )
    creator: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_TEXT,
        description="Who made the data: a person or an organization. Without it: that of the samples, if any.",
    )
    source_url: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_TEXT,
        description="Where the data were obtained. Without it: that of the samples, if any.",
    )
    notes: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_TEXT,
        description="Anything else that a user of the data should know. Without it: those of the samples, if any.",
    )

    @field_validator("licence")
    @classmethod
    def _check_licence(cls, licence: str | None) -> str | None:
        if licence is None:
            return None
        try:
            return canonicalize_license_expression(licence)
        except InvalidLicenseExpression as error:
            raise ValueError(
                f"got {licence!r}; expected an SPDX expression, such as CC-BY-4.0, MIT or LicenseRef-my-terms"
            ) from error

    @field_validator("source_url")
    @classmethod
    def _check_source_url(cls, url: str | None) -> str | None:
        if url is not None and redact(url) != url:
            raise ValueError(
                f"got {redact(url)}, where *** is a secret; expected a URL without password, signature or token, as it "
                "is written into the store"
            )
        return url

    def to_attribution(self) -> Attribution:
        """The part of a store's document that this config gives."""
        return Attribution(**self.model_dump())


def update_attribution(url: str, config: AttributionConfig) -> None:
    """Give the complete store at a URL what the config says, as a new version if it says something new."""
    attribution = config.to_attribution()
    if attribution != Attribution():
        annotate_store(Store(url), attribution)
