"""Errors of remote file systems: whether a file is missing, whether another attempt may succeed, and how they read."""

import errno
import socket
import ssl
import sys
from collections.abc import Iterator

_MAX_TEXT = 300  # characters of an error of a library in a message
_PASSING_STATUS = (408, 425, 429)  # of HTTP, beside 5xx
_FINAL_STATUS = (501, 505, 507)  # of HTTP, beside 4xx
# Codes of object stores that come with a status of 4xx and pass.
_PASSING_CODES = {
    *("RequestTimeout", "RequestTimeoutException", "Throttling", "ThrottlingException", "SlowDown"),
    *("IncompleteBody", "XAmzContentSHA256Mismatch", "OperationAborted"),
}
# Numbers of errors that pass where a library gives no better reason; every other number is final.
_PASSING_ERRNOS = {
    *(None, errno.EIO, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ETIMEDOUT, errno.EPIPE, errno.ESTALE),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOBUFS),
    *(errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, getattr(errno, "EREMOTEIO", errno.EIO)),
}
_NO_HOST = {getattr(socket, name, socket.EAI_NONAME) for name in ("EAI_NONAME", "EAI_NODATA")}
_NO_COMMON_TLS = {  # reasons that OpenSSL gives where a port speaks no TLS, or none that we speak
    *("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST", "UNKNOWN_PROTOCOL"),
    *(
        "UNSUPPORTED_PROTOCOL",
        "TLSV1_ALERT_PROTOCOL_VERSION",
        "SSLV3_ALERT_HANDSHAKE_FAILURE",
        "NO_PROTOCOLS_AVAILABLE",
    ),
}
_FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
# Errors of the libraries under fsspec, as (module, class). They are looked up in `sys.modules`: a library that was not
# imported cannot have raised one.
_FINAL_CLASSES = (
    ("aiohttp", "InvalidURL"),
    ("aiohttp", "ClientConnectorCertificateError"),
    ("botocore.exceptions", "SSLError"),
)
_PASSING_CLASSES = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "HTTPClientError"),
    ("botocore.exceptions", "ConnectionError"),
    ("gcsfs.retry", "HttpError"),
    ("http.client", "HTTPException"),
    ("httpx", "TransportError"),
    ("httpx2", "TransportError"),
    ("requests.exceptions", "ConnectionError"),
    ("requests.exceptions", "Timeout"),
    ("urllib3.exceptions", "HTTPError"),
    ("google.auth.exceptions", "TransportError"),
    ("azure.core.exceptions", "ServiceRequestError"),
    ("azure.core.exceptions", "ServiceResponseError"),
)
_CREDENTIAL_CLASSES = (
    ("botocore.exceptions", "BotoCoreError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "ClientAuthenticationError"),
)


def _is_among(error: BaseException, names: tuple[tuple[str, str], ...]) -> bool:
    """Whether an error is of one of the classes with these modules and names."""
    classes = (getattr(sys.modules.get(module), name, None) for module, name in names)
    return isinstance(error, tuple(found for found in classes if isinstance(found, type)))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what libraries say it was raised from."""
    cause: BaseException | None = error
    for _ in range(8):
        if cause is None:
            return
        yield cause
        inner = getattr(cause, "kwargs", {}).get("error")  # where botocore keeps it
        cause = inner if isinstance(inner, BaseException) else cause.__cause__


def find_http_status(error: BaseException) -> tuple[int | None, str]:
    """The status of the HTTP answer that an error is about, or None, and the code that an object store gave, or ""."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # of botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = str(response.get("Error", {}).get("Code", ""))
            if isinstance(status, int):
                return status, code
        for owner, name in ((response, "status_code"), (cause, "status"), (cause, "status_code"), (cause, "code")):
            status = getattr(owner, name, None)
            if isinstance(status, int) and 100 <= status < 600:
                return status, ""
    return None, ""


def is_missing(error: BaseException) -> bool:
    """Whether an error says that there is no such file. Libraries raise FileNotFoundError also where the server did not
    answer, or answered otherwise."""
    status, _ = find_http_status(error)
    if status is not None:
        return status in (404, 410)
    return isinstance(error, FileNotFoundError) and not any(_has_passing_class(cause) for cause in _causes(error))


def _has_passing_class(error: BaseException) -> bool:
    return isinstance(error, (TimeoutError, ConnectionError)) or _is_among(error, _PASSING_CLASSES)


def is_passing(error: BaseException) -> bool:
    """Whether another attempt may not meet an error."""
    status, code = find_http_status(error)
    if status is not None and status >= 400:
        return code in _PASSING_CODES or status in _PASSING_STATUS or (status >= 500 and status not in _FINAL_STATUS)
    causes = list(_causes(error))
    if any(_stays(cause) for cause in causes):
        return False
    if any(_has_passing_class(cause) for cause in causes):
        return True
    return isinstance(error, OSError) and not isinstance(error, _FINAL_ERRORS) and error.errno in _PASSING_ERRNOS


def _stays(error: BaseException) -> bool:
    """Whether the reason for which a server was not reached is none that passes: it speaks no TLS, or not the one that
    we do, its certificate does not hold, or there is no host of that name."""
    if isinstance(error, socket.gaierror):
        return error.errno in _NO_HOST  # EAI_AGAIN passes
    if isinstance(error, ssl.SSLCertVerificationError) or _is_among(error, _FINAL_CLASSES):
        return True
    return isinstance(error, ssl.SSLError) and getattr(error, "reason", None) in _NO_COMMON_TLS


def is_about_credentials(error: BaseException) -> bool:
    """Whether an error says that credentials or a profile are missing or wrong."""
    return _is_among(error, _CREDENTIAL_CLASSES) and not any(_stays(cause) for cause in _causes(error))


def describe(error: BaseException) -> str:
    """An error of a library in one line; of an HTTP answer, its status and what the server says about it."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error
    text = str(cause)  # not that of FileNotFoundError, which names the URL alone
    status, code = find_http_status(error)
    if status is not None:
        messages = (getattr(cause, "message", None) for cause in _causes(error))
        strerror = cause.strerror if isinstance(cause, OSError) else None
        message = next((message for message in messages if isinstance(message, str)), strerror or text)
        text = f"HTTP {status} {message if not code or code == str(status) else f'{code}: {message}'}"
    text = " ".join(text.split()) or type(cause).__name__
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"


def advice(error: BaseException) -> str:
    """What to do about an error that another attempt would meet again."""
    status, _ = find_http_status(error)
    if is_about_credentials(error):
        return "expected credentials in the environment or a profile, or storage options such as anon=true"
    if status in (400, 401, 403) or isinstance(error, PermissionError):
        return "the server refuses the request, check URL and credentials (they may have expired)"
    if status in (405, 501) or isinstance(error, NotImplementedError):
        return "the server does not support the request; a plain web server, for example, takes no files"
    return "check the URL and the storage options"
