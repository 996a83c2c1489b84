"""What reaches a person: texts from outside on one line, without what steers a terminal, and without secrets."""

import ast
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from nfm.pipeline.errors import ConfigError
from nfm.pipeline.output import echo, guard_output
from nfm.pipeline.presets import preset_text
from nfm.stages.errors import StageError
from nfm.storage_specs.storage import files
from nfm.storage_specs.storage.errors import MAX_LINE, OutageError, StoreError
from nfm.storage_specs.storage.files import Root
from nfm.storage_specs.storage.text import (
    HIDDEN,
    hide_options,
    hide_url,
    printable,
    redact,
    shown,
    shown_options,
)
from tests.tools.object_store import ObjectStore
from tests.tools.small_run import SMALL, Nfm
from tests.tools.store_cases import Case, write_case

ROOT = Path(__file__).parent.parent
ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\u2066\udcff\x00\x7f"
FORGED = f"name{ESCAPES}\nerror: all good\r\u2028error: all good"


def is_safe(text: str) -> bool:
    """Whether no line steers a terminal or looks like one of ours."""
    lines = text.split("\n")
    return all(line.isprintable() and not line.startswith("error: all good") for line in lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("é 😀 \\n", "é 😀 \\n"),
        ("a\tb\r\nc\u2028d\x85e\u3000f", "a b  c d e f"),
        ("\x1b[31m\x9b0m", r"\u001b[31m\u009b0m"),
        ("\u202ec\u2066\ufeff\U000e0001", r"\u202ec\u2066\ufeff\U000e0001"),
        (os.fsdecode(b"\xff.png"), r"\udcff.png"),
    ],
)
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == printable(expected) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://KEY:SECRET@bucket/a@v1: no", "s3://***@bucket/a@v1: no"),
        ("s3://KEY:SEC/RE+T@bucket/a", "s3://***@bucket/a"),
        ("'ftp://user:SEC@RET@host/a'", "'ftp://***@host/a'"),
        ("zip://a.zip::https://SECRET@host/b", "zip://a.zip::https://***@host/b"),
        ("https://h/a?x=1&X-Amz-Credential=SECRET&X-Amz-Signature=SECRET&y=2", None),
        ("https://h/a?sv=1&sig=SECRET%3D&se=2 and https://h?token=SECRET", None),
        ("s3://KEY:" + "SECRET" * 1000 + "@bucket", "s3://***@bucket"),
        ("redis://:SECRET@host:1/0 and s3://KEY:SECRET@bucket.", "redis://***@host:1/0 and s3://***@bucket."),
        ("URL('https://h/a?AWSAccessKeyId=SECRET&Signature=SECRET')", None),
        ("storage.options.s3.secret=SECRET storage.options.s3.endpoint_url=http://h", None),
        ("storage.options.http.headers.Authorization=SECRET", None),
        ("storage.options.ftp.password=12345678", "storage.options.ftp.password=***"),
    ],
)
def test_secrets_are_hidden(text: str, expected: str | None) -> None:
    result = redact(text)
    assert result == (expected or text.replace("SECRET%3D", "***").replace("SECRET", "***"))
    assert "SEC" not in result and "RET" not in result
    assert redact(result) == result


@pytest.mark.parametrize(
    "text",
    [
        "http://host:8000/store@v1",
        "http://[::1]:8000/store@v1 s3://bucket@v1",
        "s3://bucket/store@paper: got 3, expected section.key=value",
        "abfs://container@account.dfs.core.windows.net/a",
        "https://example.org/images?id=3&page=2",
        "storage.options.s3.endpoint_url=http://h:9000 anon=true",
        "storage.options.s3.anon=true storage.options.s3.client_kwargs.retries=3",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert shown(text) == text


def test_values_are_hidden_wherever_they_stand() -> None:
    hide_url("s3://HIDDENKEY:hidden-of-url@bucket")
    hide_url("https://h/?token=hidden%2Fencoded")
    hide_options({"key": "hidden-of-option", "client_kwargs": {"auth": ["hidden-in-list"], "pin": 123}, "anon": True})
    text = "HIDDENKEY hidden-of-url hidden-of-option hidden-in-list hidden%2Fencoded hidden/encoded 123 True"
    assert redact(text) == "*** *** *** *** *** *** 123 True"


def test_shown_options() -> None:
    options = {"anon": True, "retries": 3, "password": 5, "region": "r", "other": "t", "h": {"a": ["t", 1]}, "n": None}
    assert shown_options(options) == {
        "anon": True, "retries": 3, "password": "***", "region": "r", "other": "***", "h": {"a": ["***", 1]}, "n": None,
    }  # fmt: skip


def test_redaction_of_a_long_text_is_fast() -> None:
    assert redact("://a:" * 200_000 + " @").startswith("://a:")
    assert HIDDEN in redact("://a:" * 200_000 + "@")
    assert redact("?" * 500_000 + "=")


def test_errors_are_shown() -> None:
    for kind in (StoreError, OutageError, StageError, ConfigError):
        assert str(kind(f"s3://k:SECRET@b: {FORGED}")) == shown(f"s3://***@b: {FORGED}")
        assert len(str(kind("a" * 10 * MAX_LINE))) == MAX_LINE + 1
    assert str(pickle.loads(pickle.dumps(ConfigError("two:", "a\nb")))) == "two:\n  a b"


def printed_texts(path: Path) -> list[str]:
    """The code of what a file prints, but for what runs as a program of its own."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    programs = [node for node in tree.body if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)]
    ignored = {id(inner) for node in programs for inner in ast.walk(node)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and id(node) not in ignored]
    names = ("print", "click.echo", "click.secho", "tqdm.write", "sys.stdout.write", "sys.stderr.write")
    return [ast.unparse(text) for node in calls if ast.unparse(node.func) in names for text in node.args]


@pytest.mark.parametrize("folder", ["nfm", "models", "pipeline", "stages", "storage_specs"])
def test_everything_that_is_printed_is_shown(folder: str) -> None:
    pattern = "*.py" if folder == "nfm" else "**/*.py"
    for path in sorted((ROOT / folder).glob(pattern)):
        for text in printed_texts(path):
            assert text.startswith(("shown(", "json.dumps(", "'")), f"{path}: {text}; print it with echo or print_line"


def test_names_in_a_store_stay_in_their_line(call: Nfm, tmp_path: Path) -> None:
    name = FORGED.replace("\udcff", "")  # no JSON document has it
    case = Case(latents="float16", noise_stored=False, class_names=(name, "b", "c"), teacher=name, decoder=name)
    url = str(tmp_path / "store")
    write_case(tmp_path / "store", case)
    for command in (
        ("info", url),
        ("verify", url),
        ("tag", url, "a"),
        ("convert", url, f"{url}-z", "--layout", "zarr"),
    ):
        code, out, err = call("store", *command)
        assert (code, is_safe(out), is_safe(err)) == (0, True, True), out + err
    assert r"name\u001b[2J" in call("store", "info", url)[1]


@pytest.mark.parametrize("change", ["key", "value", "kind"])
def test_documents_do_not_reach_a_terminal(call: Nfm, tmp_path: Path, change: str) -> None:
    write_case(tmp_path, Case())
    document = json.loads((tmp_path / "dataset.json").read_text())
    name = FORGED.replace("\udcff", "")
    if change == "key":
        document["spec"][name] = 1
    elif change == "value":
        document["schema_version"] = name
    else:
        document["spec"]["coupling"]["kind"] = name
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    code, out, err = call("store", "info", str(tmp_path))
    assert (code, out) == (2, "")
    assert is_safe(err) and len(err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [("info",), ("verify",), ("repair",), ("info", "--plot"), ("info", "more")])
def test_paths_are_escaped(call: Nfm, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    command, *more = arguments
    code, out, err = call("store", command, f"{tmp_path}/{FORGED}".replace("\0", ""), *more)
    assert code == 2 and is_safe(out) and is_safe(err), err


def test_names_of_files_are_escaped(call: Nfm, tmp_path: Path) -> None:
    """Also those that are no UTF-8, in a folder to write to and as the folder itself."""
    url = str(tmp_path / "store")
    write_case(tmp_path / "store", Case(samples=True))
    out = tmp_path / os.fsdecode(b"out\xff\x1b\nerror: all good")
    code, stdout, err = call("store", "copy", url, str(out))
    assert (code, is_safe(stdout), is_safe(err)) == (0, True, True)
    assert r"out\udcff\u001b error: all good: " in stdout
    other = tmp_path / "other"
    other.mkdir()
    (other / os.fsdecode(b"a\xff\x1b\nerror: all good")).write_bytes(b"")
    code, stdout, err = call("store", "copy", url, str(other))
    assert code == 2 and is_safe(err) and r"holds a\udcff\u001b error: all good;" in err


def test_tracebacks_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise KeyError(f"s3://k:SECRET@b {FORGED}")
    except KeyError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    err = capsys.readouterr().err
    assert "Traceback" in err and "KeyError" in err and "SECRET" not in err and is_safe(err)


def test_an_encoding_without_a_character_shows_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    guard_output()
    echo("η = 0.3, \udcff")
    sys.stdout.flush()
    assert written.getvalue() == rb"\u03b7 = 0.3, \udcff" + b"\n"


SECRET = "marked-secret-7f3a"
URLS = [
    f"http://user:{SECRET}@127.0.0.1:1/store",
    f"http://{SECRET}@127.0.0.1:1/store",
    f"http://127.0.0.1:1/store?X-Amz-Credential=a&X-Amz-Signature={SECRET}",
    f"s3://KEY:{SECRET}@bucket/store",
    f"ftp://user:{SECRET}@127.0.0.1:1/store",
    f"nonsense://user:{SECRET}@host/store",
    f"zip://a::http://user:{SECRET}@127.0.0.1:1/store.zip",
]


@pytest.mark.parametrize("url", URLS)
def test_no_message_holds_the_secret_of_a_url(
    call: Nfm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setattr(files, "RETRY_SECONDS", 0.15)
    write_case(tmp_path / "store", Case())
    for arguments in (
        ("store", "info", url),
        ("store", "copy", f"{tmp_path}/store", url),
        ("sample", url, "--out", f"{tmp_path}/a.png"),
        ("train-student", "--couplings", url, "--out", url),
        ("encode", "--samples", url, "--teacher", url, "--out", url),
        ("prepare", "--preset", url, "--out", url),
        ("store", "info", url, url),
        ("evaluate", "--samples", url, "--couplings", url, "--teacher", url, "--student", url, "--out", url),
    ):
        code, out, err = call(*arguments)
        assert code in (2, 75), err
        assert SECRET not in out + err
        assert "Traceback" not in err


@pytest.mark.parametrize(
    "option",
    [
        f"s3.secret={SECRET}",
        f"s3.no_such_option={SECRET}",
        f"s3.client_kwargs={SECRET}",
        f"s3.client_kwargs.no_such_option={SECRET}",
        f"s3.config_kwargs.no_such_option={SECRET}",
        f"s3.endpoint_url={SECRET}",
        f"http.no_such_option={SECRET}",
        f"http.client_kwargs.headers={SECRET}",
        f"http.encoded={SECRET}",
    ],
)
def test_options_that_do_not_fit(call: Nfm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    """One line, which does not have the value."""
    monkeypatch.setattr(files, "RETRY_SECONDS", 0.15)
    monkeypatch.setattr("fsspec.config.conf", {})
    url = f"{option.partition('.')[0]}://127.0.0.1:1/store"
    code, out, err = call("store", "info", url, "--set", f"storage.options.{option}")
    assert code in (2, 75), err
    assert SECRET not in out + err
    assert "Traceback" not in err


def test_options_of_a_root_are_hidden_in_its_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsspec.config.conf", {"s3": {"token": "set-by-the-environment"}})
    with pytest.raises(StoreError) as error:
        Root("s3://bucket/a", {"no_such_option": 1, "secret": SECRET}).exists("b")
    assert SECRET not in str(error.value)
    assert redact(f"a {SECRET} b set-by-the-environment") == "a *** b ***"


def test_a_source_with_a_secret_is_not_published(call: Nfm, tmp_path: Path) -> None:
    write_case(tmp_path, Case())
    before = (tmp_path / "dataset.json").read_bytes()
    code, _, err = call("store", "annotate", str(tmp_path), "--source-url", f"https://h/a?token={SECRET}")
    assert code == 2 and "expected a URL without password" in err and SECRET not in err
    assert (tmp_path / "dataset.json").read_bytes() == before


def find_secret(folder: Path) -> list[str]:
    """The files below a folder that have the secret in their name or bytes."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in paths if SECRET in path.name or SECRET.encode() in path.read_bytes()]


def keep_files(folder: Path, kept: Path, ended: threading.Event) -> None:
    """Until `ended`, give every file below a folder a second name in `kept`, so that it outlives its deletion."""
    while not ended.wait(0.1):
        for path in folder.rglob("*"):
            with suppress(OSError):  # it is there already, or no file, or gone
                os.link(path, kept / str(path.relative_to(folder)).replace("/", "|"), follow_symlinks=False)


@pytest.mark.long
def test_nothing_that_is_written_holds_a_secret() -> None:
    """All stages on a store behind a secret: what they print, their stores, checkpoints and reports, the cache, and the
    files of the Ray that they start, which are deleted in the end."""
    with tempfile.TemporaryDirectory(prefix="nfm", dir="/tmp") as name:  # short: Ray has sockets below it
        folder = Path(name)
        for part in ("tmp", "kept"):
            (folder / part).mkdir()
        ended = threading.Event()
        keeper = threading.Thread(target=keep_files, args=(folder / "tmp", folder / "kept", ended))
        keeper.start()
        environment = os.environ | {"TMPDIR": f"{folder}/tmp", "NFM_CACHE": f"{folder}/cache"}
        with ObjectStore(folder / "objects", SECRET) as storage:
            values = {option: json.dumps(value) for option, value in storage.options.items()}
            lines = ["[storage.options.s3]", *(f"{option} = {value}" for option, value in values.items())]
            (folder / "mine.toml").write_text("\n".join([preset_text("digits"), *lines]), encoding="utf-8")
            preset = ["--preset", f"{folder}/mine.toml", *(part for setting in SMALL for part in ("--set", setting))]
            options = [part for item in values.items() for part in ("--set", f"storage.options.s3.{'='.join(item)}")]
            bucket = storage.bucket("secrets")
            couplings = f"{bucket}/demo/couplings-zarr"
            printed = b""
            for code, arguments in (
                (0, ["demo", *preset, "--out", f"{bucket}/demo"]),
                (0, ["demo", *preset, "--dry-run"]),
                (0, ["config", *preset]),
                (0, ["store", "info", couplings, *options]),
                (0, ["store", "copy", couplings, f"{folder}/copy", *options]),
                (2, ["store", "copy", f"{bucket}/demo/student-nfm", f"{folder}/copy", *options]),
            ):
                command = [sys.executable, "-m", "nfm", *arguments]
                process = subprocess.run(command, env=environment, capture_output=True, check=False)
                printed += process.stdout + process.stderr
                assert process.returncode == code, process.stderr
        ended.set()
        keeper.join()
        assert SECRET.encode() not in printed
        (folder / "mine.toml").unlink()
        assert any("raylet.out" in path.name for path in (folder / "kept").iterdir())
        assert any((folder / "cache").iterdir())
        assert find_secret(folder) == [f"{folder}/objects/proxy-server.conf"]
