"""The data plane outlives its controller, and the controller its data plane."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from forescale.api.client import Client
from forescale.core.errors import PeerGone, ServerFailed
from forescale.engine.serve import adoption
from forescale.engine.serve.run_folder import sweep
from serving_processes import (
    Model,
    Server,
    all_end,
    described,
    make_models,
    refused,
    requests_all_the_time,
)

ONE_DEVICE = ("--devices", "1")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state folder with a path longer than a socket's may be; no data plane is left in it."""
    folder = tmp_path / ("long" * 30)
    yield folder
    if (folder / "plane").exists() and psutil.pid_exists(pid := read_life(folder)["pid"]):
        psutil.Process(pid).kill()


def read_life(state: Path) -> dict[str, Any]:
    return json.loads((state / "plane").read_bytes())


def deploy(server: Server, model: Model) -> None:
    with Client(server.url) as client:
        client.add_model("digits", model.file)
        client.deploy("digits", 1)
        for _ in client.wait("digits", timeout_s=60):
            pass


def test_a_killed_controller_is_not_missed_and_a_killed_data_plane_is_replaced(
    models: list[Model], state: Path
) -> None:
    words = (*ONE_DEVICE, "--gateways", "2")
    first = Server(state, *words)
    deploy(first, models[0])
    plane = first.plane()
    with Client(first.url) as client:
        (replica,) = client.deployments()[0]["replicas"]
    with requests_all_the_time(first.url, models[0].inputs) as wait_for_more:
        wait_for_more()
        first.kill()
        wait_for_more()
        away = httpx.get(f"{first.url}/api/v1/models")
        assert (away.status_code, away.headers["retry-after"]) == (503, "1")
        assert "controller is away" in away.json()["error"]
        first.process_of(replica).kill()  # a spare takes its place
        wait_for_more()
        second = Server(state, *words)
        wait_for_more()
        assert (second.url, second.plane()) == (first.url, plane)
        with Client(second.url) as client:
            for _ in client.wait("digits", timeout_s=30):
                pass
            (kept,) = client.deployments()[0]["replicas"]
            assert (kept["name"], kept["attempts"]) == (replica["name"], 1)
            client.add_model("digits", models[1].file)
            client.deploy("digits", 2)
            for _ in client.wait("digits", timeout_s=60):
                pass
            kinds = [event["kind"] for event in client.events()]
            assert kinds.count("replica_lost") == 1
            assert models[1].is_what(client)
    commands = [" ".join(described(child)["cmdline"] or ()) for child in second.children()]
    assert sum("engine.serve.reader " in command for command in commands) == 2
    before = second.children()
    plane.kill()
    all_end(before)
    with Client(second.url) as client:
        # Nothing listens for a moment.
        with httpx.Client(transport=httpx.HTTPTransport(retries=10)) as patient:
            while patient.get(f"{second.url}/v2/models/digits/ready").status_code != 200:
                pass
        assert models[1].is_what(client)
        assert "data_plane_lost" in [event["kind"] for event in client.events()]
    assert second.end(signal.SIGINT) == (0, "all requests answered, all replicas ended")


def test_without_a_controller_the_lease_ends_and_nothing_is_left(models: list[Model], state: Path) -> None:
    server = Server(state, *ONE_DEVICE, "--lease-s", "1")
    deploy(server, models[0])
    left = server.children()
    assert len(left) > 1
    server.kill()
    all_end(left)
    assert not Path(read_life(state)["run"]).exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


def test_what_a_data_plane_dies_of_at_its_start_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adoption, "_PROGRAM", "raise SystemExit('error: there are no such devices')")
    plane = adoption.DataPlane(tmp_path, adoption.PlaneOptions(port=0))
    with pytest.raises(ServerFailed, match=r"plane\.log says: there are no such devices"):
        asyncio.run(plane.open())
    assert not plane.run.exists()


def test_a_data_plane_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "_PROGRAM", "import signal; signal.pause()")
    monkeypatch.setattr(adoption, "_ANSWER_S", 0.1)
    plane = adoption.DataPlane(tmp_path, adoption.PlaneOptions(port=0))
    with pytest.raises(PeerGone, match="did not answer and was killed"):
        asyncio.run(plane.exchange())
    assert not psutil.pid_exists(read_life(tmp_path)["pid"])
    asyncio.run(plane.end())


def test_what_cannot_be_adopted_is_refused_and_goes_on(state: Path) -> None:
    server = Server(state, *ONE_DEVICE)
    server.kill()
    plane = server.plane()
    assert os.getpgid(plane.pid) == plane.pid  # Ctrl-C does not reach it
    plane.send_signal(signal.SIGHUP)  # the terminal is closed
    line = refused("serve", "--state", state, "--port", "0", "--devices", "2")
    assert f"was started with devices 1, not 2; end it with: kill {plane.pid}" in line
    life = read_life(state)
    sweep(Path(life["run"]).parent)  # as every server does when it starts
    (state / "plane").write_text(json.dumps({**life, "version": "0.0.1"}))
    line = refused("serve", "--state", state, "--port", "0", *ONE_DEVICE)
    assert "of forescale 0.0.1, not" in line
    assert httpx.get(f"{server.url}/v2/health/live").status_code == 200
    assert Path(life["run"]).exists()
    left = server.children()
    plane.terminate()
    all_end(left)
