"""What may be written as the licence and the source of data. Stores that others wrote may hold any text."""

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from nfm.storage_specs.storage.errors import StoreError
from nfm.storage_specs.storage.text import redact


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
