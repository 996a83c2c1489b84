"""The S3 server that other tests rely on: what it stores, refuses and keeps when killed."""

import errno
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import pytest

from tests.tools.object_store import ObjectStore


def test_objects_are_read_back_whole_and_in_ranges(object_store: ObjectStore) -> None:
    bucket = object_store.bucket("round-trip")
    fs = fsspec.filesystem("s3", **object_store.options)
    data = os.urandom(100_000)
    fs.pipe_file(f"{bucket}/a/b", data)
    assert fs.cat_file(f"{bucket}/a/b") == data
    assert fs.cat_file(f"{bucket}/a/b", start=1_000, end=2_000) == data[1_000:2_000]
    assert fs.cat_file(f"{bucket}/a/b", start=-10) == data[-10:]
    assert fs.find(bucket) == ["round-trip/a/b"]
    assert object_store.bucket("round-trip") == bucket
    with pytest.raises(FileNotFoundError):
        fs.cat_file(f"{bucket}/a/c")


def test_acknowledged_objects_survive_a_kill(object_store: ObjectStore) -> None:
    bucket = object_store.bucket("survival")
    fs = fsspec.filesystem("s3", **object_store.options)
    data = {f"survival/{i}": os.urandom(10_000) for i in range(5)}
    for path, content in data.items():
        fs.pipe_file(path, content)
    object_store.kill()
    address = urlsplit(object_store.endpoint)
    with socket.socket() as client:
        assert client.connect_ex((address.hostname, address.port)) == errno.ECONNREFUSED
    object_store.start()
    assert fs.cat(list(data)) == data
    assert fs.find(bucket, refresh=True) == sorted(data)


def test_a_wrong_secret_is_refused(object_store: ObjectStore) -> None:
    bucket = object_store.bucket("secrets")
    fs = fsspec.filesystem("s3", **{**object_store.options, "secret": "wrong"})
    with pytest.raises(PermissionError):
        fs.pipe_file(f"{bucket}/a", b"a")
    with pytest.raises(PermissionError):
        fs.ls(bucket)


def test_a_file_system_without_xattrs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "setxattr", unsupported)
    with pytest.raises(RuntimeError, match="no user extended attributes"):
        ObjectStore(tmp_path).start()
