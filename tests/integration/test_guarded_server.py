"""A server with a pool file, tokens, an access log and traces, in processes of its own."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from fake_replicas import DOUBLING
from forescale.api.client import Client
from forescale.cli.main import app
from forescale.core.clock import SystemClock
from forescale.core.errors import InvalidInput
from forescale.registry.artifacts import ArtifactStore
from forescale.registry.registry import Registry
from serving_processes import Server

TOKEN = "correct-horse-battery"


@pytest.fixture
def collected() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """URL of a collector of traces, and what it is sent."""
    came: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", came
        server.shutdown()
        thread.join()


def test_everything_at_once(tmp_path: Path, collected: tuple[str, list[tuple[str, bytes]]]) -> None:
    collector, traces = collected
    (tmp_path / "tokens").write_text(TOKEN)
    pool = tmp_path / "pool.toml"
    pool.write_text(
        f"""
        devices = 1
        token-file = "{tmp_path}/tokens"
        access-log = "{tmp_path}/access.log"
        traces = "{collector}"
        allow-host = ["models.example"]

        [deployments.digits]
        version = 1
        min = 0
        """
    )
    state = tmp_path / "state"
    left = state / "artifacts" / "ab" / ("ab" * 32)
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of a version that never was")
    registry = Registry(
        f"sqlite:///{state}/registry.db", ArtifactStore(str(state / "artifacts")), SystemClock()
    )
    registry.add_version("digits", pool, format="pt2", signature=DOUBLING, created_by="ada")
    registry.close()

    server = Server(state, "--config", str(pool))
    assert not left.exists()
    refused = CliRunner().invoke(app, ["status", "--url", server.url])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "FORESCALE_TOKEN" in refused.stderr
    with Client(server.url, token="wrong" * 5) as client, pytest.raises(InvalidInput, match="needs a token"):
        client.undeploy("digits")
    known = {"FORESCALE_TOKEN": TOKEN}
    shown = CliRunner().invoke(app, ["status", "--json", "--url", server.url], env=known)
    assert [found["model"] for found in json.loads(shown.stdout)["deployments"]] == ["digits"]
    with httpx.Client(base_url=server.url) as plain:
        assert "/v2/models/{model}/infer" in plain.get("/openapi.json").json()["paths"]
        assert plain.get("/v2/models/digits").status_code == 200, "requests to models need no token"
        assert plain.get("/v2", headers={"host": "models.example:80"}).status_code == 200
        for path in ("/v2", "/api/v1/models", "/openapi.json"):
            answer = plain.get(path, headers={"host": "evil.example", "authorization": f"Bearer {TOKEN}"})
            assert answer.status_code == 421
    assert server.end(signal.SIGTERM)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "access.log").read_text().splitlines()]
    answered = {("/api/v1/deployments", 401), ("/api/v1/deployments", 200), ("/openapi.json", 421)}
    assert answered <= {(line["path"], line["status"]) for line in lines}
    assert {path for path, _ in traces} == {"/v1/traces"}
    assert any(b"GET /v2/models/{model}" in sent for _, sent in traces)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--access-log", "no/such/folder/log"), "cannot write"),
        (("--traces", "collector:4318"), "not the URL of a collector"),
        (("--token-file", "absent"), "cannot read absent"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(
    tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    result = CliRunner().invoke(app, ["serve", "--state", str(tmp_path / "state"), "--port", "0", *words])
    assert result.exit_code == 2
    assert told in result.stderr
    assert not (tmp_path / "state" / "plane").exists()
