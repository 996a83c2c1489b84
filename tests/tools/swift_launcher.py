"""OpenStack Swift with its S3 API on 127.0.0.1, for `object_store.py`: four servers that live as long as this process.

A script of its own, run by the interpreter of Swift's environment. Arguments: a folder, which keeps configuration, logs
and data, and the ports of proxy, account, container and object server. When these answer, one JSON line names their
process ids; then they serve until standard input is closed, which the death of whoever started this does too.
"""

import ctypes
import json
import os
import pwd
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from http.client import HTTPConnection
from pathlib import Path
from time import monotonic, sleep
from typing import Any

WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

SERVERS = ("proxy", "account", "container", "object")
PATIENCE = 900.0  # seconds; an idle machine needs about five, a busy one many times that
PR_SET_PDEATHSIG = 1

SWIFT_CONF = """\
[swift-hash]
swift_hash_path_prefix = test
swift_hash_path_suffix = test
[storage-policy:0]
name = one
default = yes
"""

# log_udp_*: without them Swift looks for a syslog; nothing listens there, and the logs that count go to standard error.
COMMON = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
devices = {folder}/srv
mount_check = false
log_level = WARNING
log_udp_host = 127.0.0.1
log_udp_port = 9
disable_fallocate = true
fallocate_reserve = 0
db_preallocation = off
"""

# error_suppression_*: one slow answer of a busy machine must not take the only replica out of service.
# [filter:cache] is `cache_filter` below. Large chunks, no rate limit and the page cache are for benchmarks.
PIPELINES = {
    "proxy": """\
client_timeout = 300
max_clients = 256
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats s3api tempauth copy slo dlo
    versioned_writes symlink proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
conn_timeout = 120
node_timeout = 120
recoverable_node_timeout = 120
error_suppression_interval = 0
error_suppression_limit = 1000000
object_chunk_size = 1048576
client_chunk_size = 1048576
[filter:cache]
paste.filter_factory = swift_launcher:cache_filter
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
dns_compliant_bucket_names = true
allowable_clock_skew = 900
max_upload_part_num = 10000
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = SECRET .admin
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
max_manifest_segments = 10000
max_manifest_size = 67108864
rate_limit_after_segment = 1000000
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:dlo]
use = egg:swift#dlo
[filter:symlink]
use = egg:swift#symlink
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_object_versioning = true
""",
    "account": """\
[pipeline:main]
pipeline = account-server
[app:account-server]
use = egg:swift#account
""",
    "container": """\
[pipeline:main]
pipeline = container-server
[app:container-server]
use = egg:swift#container
conn_timeout = 120
node_timeout = 120
""",
    "object": """\
[pipeline:main]
pipeline = object-server
[app:object-server]
use = egg:swift#object
conn_timeout = 120
node_timeout = 120
container_update_timeout = 120
keep_cache_size = 5368709120
keep_cache_private = true
disk_chunk_size = 1048576
network_chunk_size = 1048576
""",
}


class LocalCache:
    """What the proxy uses of Swift's memcached client: without it, each request first looks up account and bucket."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[str, float]] = {}

    def get(self, key: str, raise_on_error: bool = False) -> Any:
        value, expires = self._entries.get(key, ("null", 0.0))
        return json.loads(value) if expires > monotonic() else None

    def set(self, key: str, value: object, time: float = 0, raise_on_error: bool = False) -> None:
        self._entries[key] = (json.dumps(value), monotonic() + time if time else float("inf"))

    def delete(self, key: str) -> None:
        self._entries.pop(key, None)


def cache_filter(global_conf: dict[str, str], **local_conf: str) -> Callable[[WsgiApp], WsgiApp]:
    """The paste factory that the proxy's configuration names."""
    cache = LocalCache()

    def add_cache(app: WsgiApp) -> WsgiApp:
        def with_cache(env: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            env["swift.cache"] = cache
            return app(env, start_response)

        return with_cache

    return add_cache


def configure(folder: Path, ports: dict[str, int]) -> None:
    """Everything but the data is written anew at each start, since it depends on nothing but the arguments."""
    from swift.common.ring import RingBuilder  # type: ignore[import-not-found]  # only Swift's environment has it

    (folder / "srv" / "d1").mkdir(parents=True, exist_ok=True)
    (folder / "swift.conf").write_text(SWIFT_CONF)
    user = pwd.getpwuid(os.getuid()).pw_name
    for name, port in ports.items():
        common = COMMON.format(port=port, user=user, folder=folder)
        pipeline = PIPELINES[name].replace("SECRET", os.environ["OBJECT_STORE_SECRET"])
        (folder / f"{name}-server.conf").write_text(common + pipeline)
    for name in SERVERS[1:]:
        ring = RingBuilder(4, 1, 0)  # 2⁴ partitions, one replica
        ring.add_dev(
            {"id": 0, "region": 1, "zone": 1, "ip": "127.0.0.1", "port": ports[name], "device": "d1", "weight": 1.0}
        )
        ring.rebalance()
        ring.get_ring().save(f"{folder}/{name}.ring.gz")


def spawn(name: str, folder: Path) -> subprocess.Popen[bytes]:
    """A server that the kernel kills when this process dies, in whatever way."""
    launcher = os.getpid()
    libc = ctypes.CDLL(None)

    def die_with_launcher() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it died before the line above
            os._exit(1)

    tools_folder = Path(__file__).resolve().parent  # where the proxy finds `cache_filter`
    script = Path(sys.executable).parent / f"swift-{name}-server"
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, script, folder / f"{name}-server.conf", "-v"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=die_with_launcher,
            env={**os.environ, "PYTHONPATH": str(tools_folder)},
        )


def wait_for(server: subprocess.Popen[bytes], port: int, log: Path, deadline: float) -> None:
    """Until it answers HTTP; that it listens says little, Swift does so before it loads its application."""
    while True:
        connection = HTTPConnection("127.0.0.1", port, timeout=max(1.0, deadline - monotonic()))
        try:
            connection.request("GET", "/healthcheck")
            connection.getresponse()  # the storage servers know no such path, but say so
            return
        except OSError:
            if server.poll() is not None or monotonic() > deadline:
                raise SystemExit(f"{log} ends with:\n{log.read_text()[-2000:]}") from None
            sleep(0.05)
        finally:
            connection.close()


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    ports = dict(zip(SERVERS, map(int, sys.argv[2:]), strict=True))
    configure(folder, ports)
    servers = {name: spawn(name, folder) for name in SERVERS}
    deadline = monotonic() + PATIENCE
    for name, server in servers.items():
        wait_for(server, ports[name], folder / f"{name}.log", deadline)
    pids = [server.pid for server in servers.values()]
    print(json.dumps(pids), flush=True)
    # Part of a store is no store: the end of any server is the end of all.
    select.select([sys.stdin, *map(os.pidfd_open, pids)], [], [])


if __name__ == "__main__":
    main()
