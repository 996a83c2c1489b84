"""Where the data of a store come from and on what terms, and what may be written as that. Stores that others wrote may
hold any text."""

from collections.abc import Iterable
from typing import Annotated

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from pydantic import Field

from nfm.storage_specs.storage.documents import StrictModel
from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.text import redact

MAX_TEXT = 20_000  # characters of a text

Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]


class Attribution(StrictModel):
    """Where the data come from and on what terms; what is not known is null. It is outside the store's id, so it can be
    corrected by a new version."""

    licence: Text | None = None  # an SPDX expression, such as "CC-BY-4.0" or "LicenseRef-ImageNet"
    citation: Text | None = None
    creator: Text | None = None
    source_url: Text | None = None
    notes: Text | None = None

    def updated(self, other: "Attribution") -> "Attribution":
        """This attribution with every field that `other` gives.

        Raises StoreError if what `other` gives may not be written.
        """
        given = other.model_dump(exclude_none=True)
        for field, check in (("licence", canonical_licence), ("source_url", check_public_url)):
            if field in given:
                given[field] = check(given[field])
        return self.model_copy(update=given)

    def without(self, fields: Iterable[str]) -> "Attribution":
        """This attribution without these fields."""
        return self.model_copy(update=dict.fromkeys(fields))


UNKNOWN = Attribution()


def canonical_licence(licence: str) -> str:
    """An SPDX expression in its usual spelling. Raises StoreError for another text."""
    try:
        return canonicalize_license_expression(licence)
    except InvalidLicenseExpression as error:
        raise StoreError(
            f"got {licence!r}; expected an SPDX expression, such as CC-BY-4.0, MIT or LicenseRef-my-terms"
        ) from error


def check_public_url(url: str) -> str:
    """Return `url`. Raises StoreError if it holds a secret: stores are published."""
    if redact(url) != url:
        raise StoreError(
            f"got {redact(url)}, where *** is a secret; expected a URL without password, signature or token, as it is "
            "written into the store"
        )
    return url
