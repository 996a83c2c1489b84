"""Sessions of Ray: a cluster that the user names in RAY_ADDRESS, or a private Ray on this machine.

Whoever reaches a Ray without authentication can run code in it. The private one therefore wants a token that only this
user can read, and listens on the loopback interface alone; a cluster that wants no token is refused unless the user
says otherwise. A cluster is asked first, with a deadline of seconds, since Ray itself tries for many minutes.
"""

import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from nfm.stages.errors import ResumableError, StageError
from nfm.stages.progress import print_line
from nfm.storage_specs.storage.text import redact

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage statistics to Ray's makers
os.environ.setdefault("RAY_worker_niceness", "0")  # run workers of a cluster started here at normal priority
# When one task ends the job, Ray would print the errors of the others, which nobody fetches any more.
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
import ray
from ray._common.tls_utils import load_certs_from_env
from ray._private import ray_constants, services
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # its stub leaves both out
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]  # likewise
from ray.exceptions import RayError

ANSWER_SECONDS = 5.0  # within which a cluster's head must answer
LOCAL_OBJECT_STORE_BYTES = 80 * 2**20  # the least that Ray accepts; only a few numbers per unit pass through it
# The longest folder below which Ray's sockets still have names that the system takes (104 bytes on macOS).
MAX_TEMPORARY_FOLDER = 20
HEAD_METHOD = "/ray.rpc.NodeInfoGcsService/CheckAlive"  # which every head of Ray answers
EXPECTED = "expected HOST:PORT of the cluster's head, not of its dashboard, as ray start prints it, or auto"
ADDRESS = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+):(?P<port>[0-9]{1,5})")
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")  # in the order in which Ray looks at them

_is_local = False  # whether the session in progress is a private Ray


class ClusterLostError(ResumableError):
    """The Ray cluster went away; the same command continues on another."""

    skips_cleanup = True


@contextmanager
def ray_session(announce: Callable[[str], None], insecure_cluster: bool = False) -> Iterator[None]:
    """Connect to Ray for the duration of the block: to the cluster that RAY_ADDRESS names, or to a private one that is
    started on this machine. Inside another session this does nothing.

    `announce` is called with a line of text before the connection, which takes some seconds. Raises StageError if no
    cluster answers at RAY_ADDRESS within some seconds, if it does not take the token, or if it takes anybody's command
    and `insecure_cluster` is False.
    """
    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS", "").strip() in ("", "local"):
        announce("starting Ray on this machine")
        with local_ray():
            yield
    else:
        with _named_cluster(announce, insecure_cluster):
            yield


def is_local() -> bool:
    """Whether the session in progress is a private Ray on this machine, which no node will join."""
    return _is_local


@contextmanager
def local_ray(num_cpus: int | None = None) -> Iterator[None]:
    """Start a private Ray on this machine for the duration of the block: its files lie in a folder that only this user
    can enter, it wants a random token, and all of its ports are on the loopback interface.

    `num_cpus` is how many cores it gives to workers; None: all.
    """
    global _is_local
    base = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(base) > MAX_TEMPORARY_FOLDER:
        base = "/tmp"  # noqa: S108  (what is made there is private)
    folder = Path(tempfile.mkdtemp(prefix="nfm-", dir=base))  # of mode 0700
    try:
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_AUTH_TOKEN": None,  # it would come first
            ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
        }
        with _environment(environment), _single_machine(), _disconnected_at_end():
            _connect(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                _temp_dir=str(folder / "ray"),  # Ray opens this one to everybody
            )
            _is_local = True
            yield
    finally:
        _is_local = False
        shutil.rmtree(folder, ignore_errors=True)  # what a dying process still writes there is of no use


@contextmanager
def _named_cluster(announce: Callable[[str], None], insecure_cluster: bool) -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS names. See `ray_session`."""
    name = os.environ["RAY_ADDRESS"].strip()
    announce(f"connecting to the Ray cluster at {name}")
    _check_secrets()
    address = _find_head(name)
    environment: dict[str, str | None] = {}
    if _ask_head(name, address, {}):
        if not _uses_tls():
            _check_insecure(name, insecure_cluster)
    else:
        _check_token(name, address)
        environment["RAY_AUTH_MODE"] = "token"  # in this mode alone Ray sends the token
    with _environment(environment), _disconnected_at_end():
        try:
            _connect(address=address)
        except (ValueError, ConnectionError, RuntimeError, RayError) as error:
            reason = " ".join(f"{error} {error.__cause__ or ''}".split())
            raise StageError(f"got RAY_ADDRESS={name}, a Ray cluster that cannot be joined: {reason}") from error
        yield


def _connect(**arguments: Any) -> None:
    """Call ray.init with the authentication that the environment says now, and keep the handler of SIGTERM."""
    _read_authentication()
    sigterm_handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **arguments)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, sigterm_handler)  # Ray replaces it


def _read_authentication() -> None:
    """Make Ray read its settings and its token again: it keeps those of the time when it was imported."""
    RayConfig.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _disconnected_at_end() -> Iterator[None]:
    """Disconnects from Ray after the block, but not from a cluster that was lost: that would wait for its answer."""
    cluster_lost = False
    try:
        yield
    except ClusterLostError:
        cluster_lost = True
        raise
    finally:
        if not cluster_lost:
            ray.shutdown()


@contextmanager
def _environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Sets environment variables for the duration of the block; None: unsets them."""
    before = {name: os.environ.get(name) for name in variables}

    def change(variables: Mapping[str, str | None]) -> None:
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    change(variables)
    try:
        yield
    finally:
        change(before)


@contextmanager
def _single_machine() -> Iterator[None]:
    """Ray's own mode for a machine that joins no cluster, in which it binds its ports to the loopback interface. It is
    the default on macOS; elsewhere Ray reads a variable for it when it is imported, which is over by now."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _find_head(name: str) -> str:
    """HOST:PORT that Ray dials if the user named the cluster so. Raises StageError."""
    if name.startswith("ray://"):
        raise StageError(f"got RAY_ADDRESS={name}, an address of Ray Client; {EXPECTED}")
    if "://" in name:
        raise StageError(
            f"got RAY_ADDRESS={name}, which looks like Ray's job server (ray job submit --address takes it); {EXPECTED}"
        )
    address = ADDRESS.fullmatch(name)
    if name != "auto" and (address is None or not 0 < int(address["port"]) < 1 << 16):
        raise StageError(f"got RAY_ADDRESS={name!r}; {EXPECTED}")
    try:
        with _environment({"RAY_ADDRESS": name}):
            return str(services.canonicalize_bootstrap_address(name))
    except ConnectionError as error:
        raise StageError(
            f"got RAY_ADDRESS={name}, but no Ray cluster runs on this machine; start one with ray start, "
            "or name the HOST:PORT of another's head"
        ) from error


def _ask_head(name: str, address: str, headers: Mapping[str, str]) -> bool:
    """Whether the head at `address` answers a request with these headers; if not, it wants a token, or another one.

    Raises StageError if no head of a Ray cluster answers within ANSWER_SECONDS.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise StageError(
            f"got RAY_ADDRESS={name}, where no Ray cluster answers ({error.strerror or error}); {EXPECTED}, "
            "or no RAY_ADDRESS to use this machine alone"
        ) from error
    with _open_channel(address) as channel:
        try:
            channel.unary_unary(HEAD_METHOD)(b"", timeout=ANSWER_SECONDS, metadata=tuple(headers.items()))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise StageError(
                f"got RAY_ADDRESS={name}, where something answers that is no head of a Ray cluster, or wants TLS "
                f"(RAY_USE_TLS); {EXPECTED}"
            ) from error
    return True


def _open_channel(address: str) -> grpc.Channel:
    options = [("grpc.enable_http_proxy", 0)]  # as Ray does
    if not _uses_tls():
        return grpc.insecure_channel(address, options)
    try:
        certificate, key, authority = load_certs_from_env()
    except (RuntimeError, OSError) as error:
        raise StageError(f"got RAY_USE_TLS, but no certificates: {error}") from error
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, key, certificate), options)


def _uses_tls() -> bool:
    """Whether Ray is to use TLS, where both sides show certificates: nobody without one reaches such a cluster."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _check_token(name: str, address: str) -> None:
    """Raises StageError if there is no token that the head at `address` takes."""
    _read_authentication()
    wish = "set RAY_AUTH_TOKEN to the cluster's, which ray get-auth-token prints on its head"
    try:
        headers = AuthenticationTokenLoader.instance().get_token_for_http_header(ignore_auth_mode=True)
    except (RuntimeError, RayError) as error:
        raise StageError(f"got a token of Ray that cannot be read: {error}; {wish}") from error
    if not headers:
        raise StageError(f"got RAY_ADDRESS={name}, a Ray cluster that wants a token, and no token; {wish}")
    if not _ask_head(name, address, headers):
        source = next((variable for variable in TOKEN_VARIABLES if os.environ.get(variable)), "~/.ray/auth_token")
        raise StageError(f"got RAY_ADDRESS={name}, a Ray cluster that refuses the token of {source}; {wish}")


def _check_insecure(name: str, insecure_cluster: bool) -> None:
    """Raises StageError for a cluster without authentication that the user did not allow. A job that was submitted to
    it runs there already: a warning."""
    risk = "whoever reaches it can run code in it, and use what its workers may read and write"
    if _is_submitted():
        print_line(f"warning: this Ray cluster has no authentication: {risk}; start it with RAY_AUTH_MODE=token")
    elif not insecure_cluster:
        raise StageError(
            f"got RAY_ADDRESS={name}, a Ray cluster without authentication: {risk}; expected one that was started with "
            "RAY_AUTH_MODE=token, or --insecure-cluster if nobody else reaches it"
        )


def _check_secrets() -> None:
    """Raises StageError if the command holds a secret: Ray's job table shows the command of every driver to everyone in
    the cluster. Of a job that was submitted, it has shown that already, and the runtime environment: a warning."""
    advice = "give secrets by the environment of the nodes, a profile of the storage's own, or a file for --preset"
    shown = "which Ray's job table shows to everyone in the cluster"
    holds_secret = any(redact(argument) != argument for argument in sys.argv)
    if not _is_submitted():
        if holds_secret:
            raise StageError(f"got a secret in the command, {shown}; {advice}")
        return
    if holds_secret:
        print_line(f"warning: the command of this job holds a secret, {shown}; {advice}")
    runtime_environment = json.loads(os.environ[RAY_JOB_CONFIG_JSON_ENV_VAR]).get("runtime_env") or {}
    for name, value in (runtime_environment.get("env_vars") or {}).items():
        variable = f"?{name}={value}"  # as in the query of a URL
        if name != "RAY_AUTH_MODE" and redact(variable) != variable:
            print_line(f"warning: the runtime environment of this job holds {name}, {shown}; {advice}")


def _is_submitted() -> bool:
    """Whether this process is a job that was submitted to Ray's job server."""
    return RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ
