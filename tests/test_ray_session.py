"""Sessions of Ray: what is said of a cluster that cannot be used, and who reaches the private one."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from nfm.pipeline import encode_job, ray_session
from nfm.stages.errors import StageError
from tests.tools.listeners import list_listeners
from tests.tools.ray_cluster import MARK, Cluster, list_processes
from tests.tools.small_run import Run
from tests.tools.stores import content


def connect() -> None:
    """To what RAY_ADDRESS names, and away again."""
    with ray_session.ray_session(lambda _status: None):
        pass


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://127.0.0.1:10001", "an address of Ray Client; expected HOST:PORT of the cluster's head"),
        ("http://127.0.0.1:8265", r"looks like Ray's job server \(ray job submit --address takes it\); expected HOST"),
        ("127.0.0.1", "got RAY_ADDRESS='127.0.0.1'; expected HOST:PORT"),
        ("127.0.0.1:http", "expected HOST:PORT"),
        ("127.0.0.1:99999", "expected HOST:PORT"),
        ("127.0.0.1:6379 10.0.0.1:6379", "expected HOST:PORT"),
        (
            "head.invalid:6379",
            r"where no Ray cluster answers \(.+\); expected HOST:PORT.*, or no RAY_ADDRESS",
        ),
        (" 127.0.0.1:9\n", r"got RAY_ADDRESS=127.0.0.1:9, where no Ray cluster answers \(Connection refused\)"),
    ],
)
def test_an_address_of_no_cluster_is_refused_at_once(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(StageError, match=message) as failure:
        connect()
    assert "\n" not in str(failure.value)


class JobServer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_of_another_kind_is_no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("", 0), JobServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.server_port}")
        with pytest.raises(StageError, match="something answers that is no head of a Ray.*not of its dashboard"):
            connect()
        server.shutdown()


def test_a_host_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections and never answers."""
    monkeypatch.setattr(ray_session, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(StageError, match="no head of a Ray cluster"):
            connect()


def test_an_output_is_not_touched_before_ray_is_there(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(StageError, match="where no Ray cluster answers"):
        encode_job.encode_couplings(run.config.encode, f"{run.samples}/train", run.teacher, f"{tmp_path}/out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argument",
    ["--set=storage.options.s3.secret=hunter22", "storage.options.s3.key=AKIA1234", "s3://key:hunter22@bucket/train"],
)
def test_a_secret_in_the_command_is_not_shown_to_a_cluster(argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nfm", "encode", argument])
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(StageError, match="got a secret in the command, which Ray's job table shows") as failure:
        connect()
    assert "hunter22" not in str(failure.value) and "AKIA" not in str(failure.value)


@pytest.mark.parametrize("argument", ["storage.options.s3.anon=true", "storage.options.s3.endpoint_url=http://a:9"])
def test_an_option_that_is_no_secret_may_stand_there(argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nfm", "encode", "--set", argument])
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(StageError, match="where no Ray cluster answers"):
        connect()


def test_a_submitted_job_warns_of_secrets_that_it_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = {"AWS_SECRET_ACCESS_KEY": "hunter22", "AWS_PROFILE": "team", "RAY_AUTH_MODE": "token"}
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, json.dumps({"runtime_env": {"env_vars": variables}}))
    monkeypatch.setattr(sys, "argv", ["nfm", "encode", "--set", "storage.options.s3.secret=hunter22"])
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(StageError, match="where no Ray cluster answers"):
        connect()
    command, variable = capsys.readouterr().err.splitlines()
    assert command.startswith("warning: the command of this job holds a secret, which Ray's job table shows")
    assert variable.startswith("warning: the runtime environment of this job holds AWS_SECRET_ACCESS_KEY, which")
    assert "hunter22" not in command + variable


@pytest.mark.usefixtures("ray_cluster")
def test_the_private_ray_is_on_the_loopback_interface_alone() -> None:
    pids = {*list_processes(os.environ[MARK]), os.getpid()}
    hosts = {host for host, _port, pid in list_listeners() if pid in pids}
    assert hosts == {"127.0.0.1"}, "of its head, its node, its workers and this driver"


@pytest.mark.usefixtures("ray_cluster")
def test_the_private_ray_answers_nobody_without_its_token() -> None:
    address = ray.get_runtime_context().gcs_address
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.parent.stat().st_mode & 0o777 == 0o700
    assert not ray_session._ask_head("private", address, {})
    assert not ray_session._ask_head("private", address, {"authorization": "Bearer " + "0" * 64})
    assert ray_session._ask_head("private", address, {"authorization": f"Bearer {token.read_text()}"})


@pytest.fixture(scope="module", params=["token", "disabled"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a driver that knows the address of a cluster, with token authentication or without, and has no
    token. NFM_TEST_TOKEN is the token."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"HOME": str(tmp_path_factory.mktemp("home")), "NFM_TEST_TOKEN": "t" * 32}
    head = environment | {"RAY_AUTH_MODE": request.param, "RAY_AUTH_TOKEN": environment["NFM_TEST_TOKEN"]}
    with Cluster(2, environment=head) as cluster:
        yield environment | {"RAY_ADDRESS": cluster.address}


def run_encode(run: Run, out: Path, environment: dict[str, str], *options: str) -> "subprocess.CompletedProcess[str]":
    arguments = ["--samples", f"{run.samples}/train", "--teacher", run.teacher, "--out", str(out), "--draws", "3"]
    command = [sys.executable, "-m", "nfm", "encode", *arguments, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.long
def test_a_cluster_is_used_with_its_token_or_if_the_user_insists(
    cluster: dict[str, str], run: Run, tmp_path: Path
) -> None:
    refused = run_encode(run, tmp_path / "out", cluster)
    assert refused.returncode == 2 and not (tmp_path / "out").exists()
    status, error = refused.stderr.splitlines()
    assert status == f"encode: connecting to the Ray cluster at {cluster['RAY_ADDRESS']}"
    if "without authentication" in error:
        assert "expected one that was started with RAY_AUTH_MODE=token, or --insecure-cluster" in error
        done = run_encode(run, tmp_path / "out", cluster, "--insecure-cluster")
    else:
        assert "a Ray cluster that wants a token, and no token; set RAY_AUTH_TOKEN to the cluster's" in error
        other = run_encode(run, tmp_path / "out", cluster | {"RAY_AUTH_TOKEN": "f" * 32}, "--insecure-cluster")
        assert other.returncode == 2 and "refuses the token of RAY_AUTH_TOKEN" in other.stderr.splitlines()[1]
        done = run_encode(run, tmp_path / "out", cluster | {"RAY_AUTH_TOKEN": cluster["NFM_TEST_TOKEN"]})
    assert done.returncode == 0, done.stderr
    assert content(str(tmp_path / "out")) == content(run.couplings["webdataset"])


@pytest.mark.long
def test_ctrl_c_says_how_to_go_on(run: Run, tmp_path: Path) -> None:
    arguments = ["--samples", f"{run.samples}/train", "--teacher", run.teacher, "--out", str(tmp_path), "--draws", "60"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "nfm", "encode", *arguments, "--workers", "1"], stderr=subprocess.PIPE, text=True
    )
    assert driver.stderr is not None
    assert any("pairs/s now" in line for line in driver.stderr)
    driver.send_signal(signal.SIGINT)
    assert driver.stderr.read().splitlines()[-1] == "interrupted; run the same command again to continue"
    assert driver.wait() == 130


@pytest.mark.long
def test_each_private_ray_has_a_token_of_its_own_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in one process, one after the other, though Ray keeps the token that it read first."""
    monkeypatch.setenv("RAY_ADDRESS", " ")
    before = dict(os.environ)
    tokens = []
    for _ in range(2):
        with ray_session.ray_session(lambda _status: None):
            path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
            tokens.append(path.read_text())
            assert ray.get(ray.put(1)) == 1
            assert ray_session.is_local()
        assert not path.parent.exists() and not ray_session.is_local()
        assert {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")} == {
            name: value for name, value in before.items() if name.startswith("RAY_AUTH")
        }
    assert tokens[0] != tokens[1]
