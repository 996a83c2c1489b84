"""Texts that reach a person: what came from outside is put on one line, without what steers a terminal, and without
secrets.

Names in a store, keys of a document, host names, paths and messages of libraries are whatever somebody wrote. Every
line that nfm prints and every message of its errors goes through `shown`.
"""

import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote, unquote

HIDDEN: Final = "***"  # what is shown in place of a secret
MIN_SECRET = 6  # characters; a shorter value would be found in words that have nothing to do with it

# Names that secrets have in queries and options: X-Amz-Signature, sig, account_key, Authorization, …
_HIDDEN_NAME = "sig|token|secret|pass|pwd|cred|auth|key|cookie|policy|jwt|session|connection_string|header|code"
# A value ends before the colon of a message, as in "https://host/a?sig=***: HTTP 403".
_QUERY_VALUE = re.compile(
    rf"([?&;#][\w.%~-]{{0,64}}(?:{_HIDDEN_NAME})[\w.%~-]{{0,64}}=)[^\s&#'\"<>]+?(?=:?(?:[\s&#'\"<>]|$))", re.IGNORECASE
)
_WEB_SCHEME = re.compile(r"\b(?:https?|ftps?)$", re.IGNORECASE)  # where a user without a password may be a token
_OPTION_VALUE = re.compile(r"(storage\.options\.(?:[^\s=.]+\.)*([^\s=.]+)=)(\S+)")
# Options of file systems whose values are no secrets. Texts of any other option are taken for one.
_PLAIN_NAMES = """
account_name addressing_style cache_type consistency default_cache_type endpoint endpoint_url host hostname profile
project protocol region region_name repo_type revision signature_version target_protocol
"""
_PLAIN_OPTIONS = frozenset(_PLAIN_NAMES.split())

_secrets: frozenset[str] = frozenset()  # values that `redact` hides wherever they stand
_secrets_lock = threading.Lock()


def escape(text: str) -> str:
    """The text with `\\u001b` in place of every character that is not printable: control characters, what turns the
    reading direction, line breaks, bytes of a file name that are no UTF-8."""
    return "".join(
        char if char.isprintable() else f"\\u{ord(char):04x}" if ord(char) < 1 << 16 else f"\\U{ord(char):08x}"
        for char in text
    )


def printable(text: str) -> str:
    """The text in one line: white space of any kind is a space, and others that are not printable are escaped, so that
    they cannot steer a terminal, turn the reading direction, or begin a line that looks like one of ours."""
    if text.isprintable():
        return text
    return escape("".join(" " if char.isspace() else char for char in text))


def redact(text: str) -> str:
    """The text without secrets: user and password of URLs, signatures and tokens in their queries, values of
    `storage.options`, and every value that `hide_url` and `hide_options` were told."""
    if "://" in text and "@" in text:
        text = re.sub(r"\S+", lambda word: "".join(_redact_users(word[0])), text)
    if "=" in text:
        text = _QUERY_VALUE.sub(rf"\g<1>{HIDDEN}", text)
        text = _OPTION_VALUE.sub(_redact_option, text)
    for secret in sorted(_secrets, key=len, reverse=True):  # one may hold another
        text = text.replace(secret, HIDDEN)
    return text


def _redact_users(word: str) -> Iterator[str]:
    """The parts of a text without white space that may hold URLs, without their users."""
    before, *parts = word.split("://")
    yield before
    for part in parts:
        length = len(_user_of(before, part))
        yield f"://{HIDDEN if length else ''}{part[length:]}"
        before = part


def _user_of(before: str, part: str) -> str:
    """user:password, or at a web or FTP server any user, at the beginning of what follows :// in a URL; "" if there is
    none to hide. `before` stands before the ://.

    A password may hold what a URL must not: an @ before the first slash, or a slash before the first @; host:8000/a@v1
    has none.
    """
    host, _, _ = part.partition("/")
    user, at, _ = host.rpartition("@")
    if at:
        return user if ":" in user or _WEB_SCHEME.search(before) else ""
    user, at, _ = part.partition("@")
    has_password = re.match(r"[^:/\[]*:(?!:|[0-9]{1,5}/)", user)
    return user if at and has_password else ""


def _redact_option(match: re.Match[str]) -> str:
    """`storage.options.….name=value` without a value that may be a secret."""
    _, name, text = match.groups()
    value: object = text
    if re.fullmatch(r"true|false|[0-9]+", text):
        value = int(text) if text.isdigit() else text == "true"
    return match[1] + HIDDEN if _may_be_secret(name, value) else match[0]


def shown(text: str) -> str:
    """The text as a person may see it: `redact`, then `printable`. Applied twice, it gives the same."""
    return printable(redact(text))


def hide_url(url: str) -> None:
    """Hide the secrets of a URL also where libraries repeat them without it, as in "Invalid bucket name"."""
    before, *parts = url.split("://")
    found = [_user_of(scheme, part) for scheme, part in zip([before, *parts], parts, strict=False)]
    found += [secret for user in found for secret in user.split(":", 1)]
    found += [match[0][len(match[1]) :] for match in _QUERY_VALUE.finditer(url)]
    _hide(found)


def hide_options(options: Mapping[str, Any]) -> None:
    """Hide the values of file system options that may be secrets."""
    _hide(str(value) for value in _secret_values(options))


def shown_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of file systems, with HIDDEN in place of every value that may be a secret."""
    return {name: _shown_option(name, value) for name, value in options.items()}


def _may_be_secret(name: str, value: object) -> bool:
    """Whether the value of the option `name` may be a secret. Numbers are one if the name says so, texts unless it says
    that they are none."""
    if value is None or isinstance(value, bool):
        return False
    if isinstance(value, int | float):
        return re.search(_HIDDEN_NAME, name, re.IGNORECASE) is not None
    return name not in _PLAIN_OPTIONS


def _shown_option(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return shown_options(value)
    if isinstance(value, list | tuple):
        return [_shown_option(name, element) for element in value]
    if _may_be_secret(name, value):
        return HIDDEN
    return redact(value) if isinstance(value, str) else value


def _secret_values(options: Mapping[str, Any]) -> Iterator[Any]:
    """The values in `options` that `shown_options` hides."""
    for name, value in options.items():
        for element in value if isinstance(value, list | tuple) else (value,):
            if isinstance(element, Mapping):
                yield from _secret_values(element)
            elif _may_be_secret(name, element):
                yield element


def _hide(values: Iterator[str] | list[str]) -> None:
    global _secrets
    with _secrets_lock:
        spellings = {spelling for value in values for spelling in (value, quote(value, safe=""), unquote(value))}
        _secrets |= {value for value in spellings if len(value) >= MIN_SECRET and value != HIDDEN}
