"""The whole way: a model's file, a server with real replica processes, requests, failures and the end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from forescale.api.client import Client
from forescale.core.clock import SystemClock
from forescale.core.errors import BadRequest, NotServed, ServerFailed
from forescale.engine.serve.formats import Order, format_named
from forescale.registry.artifacts import ArtifactStore
from forescale.registry.records import DeploymentSpec
from forescale.registry.registry import Registry
from serving_processes import Model, Server, command, make_models, refused, requests_all_the_time


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It serves ``digits`` once the first test has deployed it."""
    server = Server(tmp_path_factory.mktemp("server") / "state", "--devices", "1")
    yield server
    assert server.end(signal.SIGTERM)[0] == 0


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    return make_models(tmp_path_factory.mktemp("models"))


def test_a_file_is_added_deployed_and_answers(server: Server, client: Client, models: list[Model]) -> None:
    model, inputs = models[0], models[0].inputs
    assert "digits@1: pt2" in command(server.url, "models", "add", "digits", model.file)
    with pytest.raises(NotServed):
        client.infer("digits", {"input": inputs})
    assert "digits@1 serves at" in command(server.url, "deploy", "digits@1", "--wait")
    tensor = {"name": "input", "datatype": "FP32", "shape": inputs.shape, "data": inputs.tolist()}
    answer = httpx.post(f"{server.url}/v2/models/digits/infer", json={"inputs": [tensor]}).json()
    assert (answer["model_name"], answer["model_version"]) == ("digits", "1")
    (output,) = answer["outputs"]
    np.testing.assert_allclose(np.reshape(output["data"], output["shape"]), model.outputs, rtol=1e-5)
    assert model.is_what(client)
    with pytest.raises(BadRequest, match="takes FP32"):
        client.infer("digits", {"input": inputs.astype(np.float64)})
    assert "digits@1" in command(server.url, "status")


def measured(server: Server) -> dict[str, Any]:
    """The deployment, as soon as it is known what a replica can do."""
    deployment: dict[str, Any] = {"change": -1, "scaling": {"capacity_per_s": None}}
    while not deployment["scaling"]["capacity_per_s"]:
        query = {"after": deployment["change"], "timeout_s": 0.2}
        deployment = httpx.get(f"{server.url}/api/v1/deployments/digits", params=query).json()
    return deployment


def test_a_second_server_is_refused_in_one_line(server: Server, tmp_path: Path) -> None:
    assert "in use by another server" in refused("serve", "--state", server.state, "--port", "0")
    port = str(httpx.URL(server.url).port)
    assert "cannot listen on" in refused("serve", "--state", tmp_path / "other", "--port", port)


def test_no_request_is_lost_with_a_replica_or_a_version(
    server: Server, client: Client, models: list[Model]
) -> None:
    with requests_all_the_time(server.url, models[0].inputs) as wait_for_more:
        wait_for_more()
        (replica,) = client.deployments()[0]["replicas"]
        server.process_of(replica).kill()
        wait_for_more()
        command(server.url, "models", "add", "digits", models[1].file)
        command(server.url, "deploy", "digits@2", "--wait")
        wait_for_more()
    assert models[1].is_what(client)
    assert [event["kind"] for event in client.events()].count("replica_lost") == 1


def test_a_damaged_file_is_said_and_the_version_that_serves_stays(
    server: Server, client: Client, models: list[Model]
) -> None:
    first, _ = client.model("digits")["versions"]
    (kept,) = (server.state / "artifacts").glob(f"*/{first['sha256']}")
    kept.chmod(0o644)
    with kept.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    client.deploy("digits", 1)
    with pytest.raises(ServerFailed, match=r"digits@1 cannot be served: artifact .* is damaged"):
        for _ in client.wait("digits", timeout_s=30):
            pass
    assert models[1].is_what(client)


def test_what_is_deployed_is_served_when_a_server_starts_and_ctrl_c_ends_everything(
    models: list[Model], tmp_path: Path
) -> None:
    store = ArtifactStore(str(tmp_path / "artifacts"))
    registry = Registry(f"sqlite:///{tmp_path}/registry.db", store, SystemClock())
    signature = format_named("pt2").inspect(Order(path=models[0].file, options={}))
    registry.add_version("digits", models[0].file, format="pt2", signature=signature, created_by="ada")
    registry.deploy(DeploymentSpec(model="digits", number=1, max_replicas=2), by="ada")
    registry.close()
    server = Server(tmp_path, "--devices", "1")
    with Client(server.url) as client:
        for _ in client.wait("digits", timeout_s=30):
            pass
        assert models[0].is_what(client)
        assert measured(server)["requests"]["ok"] == 1
    assert server.end(signal.SIGTERM)[0] == 0
    server = Server(tmp_path, "--devices", "1")
    with Client(server.url) as client:
        for _ in client.wait("digits", timeout_s=30):
            pass
        assert measured(server)["requests"]["ok"] == 0, "it was before"
        command(server.url, "undeploy", "digits")
        assert "nothing is deployed" in command(server.url, "status")
    assert server.end(signal.SIGINT) == (0, "all requests answered, all replicas ended")
