"""Storage that fails for a while: an S3 endpoint that answers 500 and 503."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_render import containers

from orchestrator.data import retry
from orchestrator.data.prepare import _with_retries
from orchestrator.data.retry import with_retries
from orchestrator.data.sources import find_files, split_into_pieces
from orchestrator.data.write import PieceWork, prepare_piece
from orchestrator.errors import DataError
from orchestrator.kube.render import render

OUTAGE_S = 7.0
"""Longer than Arrow's own retries."""


class Endpoint:
    """A real S3 server (moto) on the loopback that can be told to fail."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *words: Any) -> None:
                """Say nothing."""

        self.application: Any = DomainDispatcherApplication(create_backend_app)
        self.fails_until = 0.0
        self.refused = 0
        self.server = make_server("127.0.0.1", 0, self.answer, threaded=True, request_handler=Quiet)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        """By turns 500 and 503 while it fails."""
        if time.monotonic() >= self.fails_until:
            return self.application(environ, start)
        self.refused += 1
        start(["500 Internal Server Error", "503 Slow Down"][self.refused % 2], [])
        return [b""]

    def fail(self, seconds: float) -> None:
        """Refuse everything for a while."""
        self.fails_until, self.refused = time.monotonic() + seconds, 0

    def url(self, key: str) -> str:
        """How a job names a file here."""
        where = f"endpoint_override=127.0.0.1:{self.server.server_port}"
        return f"s3://bucket/{key}?scheme=http&region=us-east-1&{where}"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    one = Endpoint()
    yield one
    one.server.shutdown()


@pytest.fixture
def rows(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a file of rows."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    from pyarrow import fs

    where = f"127.0.0.1:{endpoint.server.server_port}"
    s3 = fs.S3FileSystem(
        endpoint_override=where, scheme="http", region="us-east-1", allow_bucket_creation=True
    )
    s3.create_dir("bucket")
    text = "".join(json.dumps(row) + "\n" for row in tiny.labeled(40))
    with s3.open_output_stream("bucket/train.jsonl") as out:
        out.write(text.encode())
    return endpoint.url("train.jsonl")


def test_an_outage_is_waited_out_at_every_step_of_preparing(
    endpoint: Endpoint, rows: str, models: tiny.Tiny, tmp_path: Path
) -> None:
    spec = tiny.job(models.bert, rows, tmp_path)
    endpoint.fail(OUTAGE_S)
    (file,) = find_files(rows, "auto")
    assert endpoint.refused > 0
    (piece,) = split_into_pieces([file])
    work = PieceWork(spec, (piece,), None, ("good", "bad"), str(tmp_path))
    endpoint.fail(OUTAGE_S)
    done = _with_retries(prepare_piece, work)
    assert endpoint.refused > 0
    assert done["rows"] == 40
    local = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.labeled(40))
    assert find_files(str(local), "auto")[0].digest == file.digest


def test_pods_reach_the_store_that_their_manifest_names(
    endpoint: Endpoint,
    rows: str,
    models: tiny.Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`kubernetes.s3` becomes variables of the pods; a job's URLs say nothing of the endpoint then."""
    url = "s3://bucket/train.jsonl"
    store = {
        "endpoint_url": f"http://127.0.0.1:{endpoint.server.server_port}",
        "region": "us-east-1",
    }
    section = {"cluster": "16cpux1", "image": "registry.example/x:1", "s3": store}
    spec = tiny.job(models.bert, url, tmp_path, kubernetes=section)
    (head, *_) = containers(render(spec, cluster_only=True))
    for one in head["env"]:
        if one["name"].startswith("AWS_"):
            monkeypatch.setenv(one["name"], one["value"])
    (file,) = find_files(url, "auto")
    (piece,) = split_into_pieces([file])
    done = _with_retries(
        prepare_piece, PieceWork(spec, (piece,), None, ("good", "bad"), str(tmp_path))
    )
    assert done["rows"] == 40


def test_what_does_not_pass_is_said_at_once_and_an_outage_without_end_in_the_end(
    endpoint: Endpoint, rows: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    with pytest.raises(DataError, match="no such file"):
        find_files(endpoint.url("gone.jsonl"), "auto")
    local = tmp_path / "flaky.jsonl"
    calls = []

    def broken() -> None:
        calls.append(1)
        raise OSError("HTTP status 503")

    with pytest.raises(OSError, match="503"):
        with_retries(str(local), broken)
    assert len(calls) == 1, "a local disk that fails is not S3"
    assert waits == [], "neither is tried again"
    monkeypatch.undo()
    monkeypatch.setattr(retry, "RETRY_S", 1.0)
    endpoint.fail(60)
    with pytest.raises(OSError, match="HTTP status 50"):
        find_files(rows, "auto")
    endpoint.fail(0)
