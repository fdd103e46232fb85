"""Small models share a process: it is killed under load, and one of them crashes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from forescale.api.client import Client
from forescale.core.errors import RequestFailed, ServerFailed
from serving_processes import Model, Server, make_models, requests_all_the_time

POINTS = [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
SIGNATURE = {"inputs": POINTS, "outputs": [{**POINTS[0], "name": "y"}]}
GOOD = ("digits", "one", "two")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    server = Server(tmp_path / "state", "--devices", "1", "--factory", "rogue_models:rogue")
    yield server
    server.end(signal.SIGINT)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return make_models(tmp_path)[0]


def processes(client: Client) -> dict[str, str]:
    """Where each model's replica is that serves, of those that have one."""
    return {
        found["model"]: replica["process"]
        for found in client.deployments()
        for replica in found["replicas"]
        if replica["state"] == "serving" and len(found["replicas"]) == 1
    }


def until_they_share(client: Client, names: tuple[str, ...], *, before: str = "") -> str:
    """Until they are in one process, another one than before."""
    while True:
        where = processes(client)
        (home, *others) = {where.get(name, "") for name in names}
        if not others and home not in {"", before}:
            return home
        Event().wait(0.05)  # each look takes time from what is looked at


def test_a_house_is_killed_and_a_guest_crashes(server: Server, model: Model, tmp_path: Path) -> None:
    maker = tmp_path / "rogue.json"
    maker.write_text("{}")
    with Client(server.url) as client:
        for name in GOOD:
            client.add_model(name, model.file)
            client.deploy(name, 1, latency_ms=5000)
        client.add_model(
            "rogue", maker, format="factory", options={"factory": "rogue_models:rogue"}, signature=SIGNATURE
        )
        client.deploy("rogue", 1, latency_ms=5000)
        everybody = (*GOOD, "rogue")
        for name in everybody:
            for _ in client.wait(name, timeout_s=60):
                pass
        rows = np.zeros((1, 2), np.float32)
        client.infer("rogue", {"x": rows})
        for name in GOOD:
            client.infer(name, {"input": model.inputs})
        with requests_all_the_time(server.url, model.inputs[:1], 0.02) as wait_for_more:
            home = until_they_share(client, everybody)
            wait_for_more()
            server.process_of({"process": home}).kill()
            wait_for_more()
            again = until_they_share(client, everybody, before=home)
            with pytest.raises((RequestFailed, ServerFailed)):
                client.infer("rogue", {"x": rows + 4})  # it is tried three times
            wait_for_more()
            last = until_they_share(client, GOOD, before=again)
            with pytest.raises((RequestFailed, ServerFailed)):
                client.infer("rogue", {"x": rows + 4})
            wait_for_more()
            assert until_they_share(client, GOOD) == last, "it takes nobody with it any more"
        assert processes(client).get("rogue") != last
