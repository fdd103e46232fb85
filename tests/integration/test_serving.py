"""The whole way: a model's file, a server with real replica processes, requests, failures and the end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import psutil
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from forescale.api.client import Client
from forescale.cli.main import app
from forescale.core.clock import SystemClock
from forescale.core.errors import BadRequest, NotServed, ServerFailed
from forescale.engine.serve.formats import Order, format_named
from forescale.registry.artifacts import ArtifactStore
from forescale.registry.records import DeploymentSpec
from forescale.registry.registry import Registry

FEATURES, CLASSES = 16, 4


class Model(NamedTuple):
    file: Path
    inputs: np.ndarray
    outputs: np.ndarray

    def is_what(self, client: Client) -> bool:
        """Whether this is what answers."""
        return np.allclose(client.infer("digits", {"input": self.inputs})["output"], self.outputs, rtol=1e-5)


class Server:
    """``forescale serve`` in a process of its own."""

    def __init__(self, state: Path) -> None:
        words = ["--state", str(state), "--port", "0", "--devices", "1"]
        self.state = state
        self.process = subprocess.Popen(
            [sys.executable, "-m", "forescale", "serve", *words], stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        found = re.search(r"http://\S+", self.process.stderr.readline())
        assert found is not None
        self.url = found[0]

    def children(self) -> list[psutil.Process]:
        """The data plane and its replicas."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Exit code, and what it said last."""
        children = self.children()
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=20)
        _, left = psutil.wait_procs(children, timeout=5)
        assert left == []
        return self.process.returncode, said.splitlines()[-1] if said else ""

    def process_of(self, replica: dict[str, str]) -> psutil.Process:
        return next(child for child in self.children() if child.cmdline()[-1] == replica["process"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It serves ``digits`` once the first test has deployed it."""
    server = Server(tmp_path_factory.mktemp("server") / "state")
    yield server
    assert server.end(signal.SIGTERM)[0] == 0


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    """Two versions."""
    folder = tmp_path_factory.mktemp("models")
    inputs = torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(0))
    rows = torch.export.Dim("rows", min=1, max=1024)
    made: list[Model] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(FEATURES, CLASSES), nn.Softmax(dim=1)).eval()
        program = torch.export.export(network, (torch.zeros(2, FEATURES),), dynamic_shapes=({0: rows},))
        torch.export.save(program, folder / f"{seed}.pt2")
        with torch.no_grad():
            made.append(Model(folder / f"{seed}.pt2", inputs.numpy(), network(inputs).numpy()))
    return made


def command(url: str, *words: str | Path) -> str:
    result = CliRunner().invoke(app, [*map(str, words), "--url", url])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words: str | Path) -> str:
    """The one line that says why."""
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@contextmanager
def requests_all_the_time(url: str, rows: np.ndarray) -> Generator[Callable[[], None]]:
    """Requests of four clients while the block runs; none may fail. Calling waits for many more answers."""
    ended, failures, answers = threading.Event(), list[Exception](), threading.Semaphore(0)

    def ask() -> None:
        with Client(url) as client:
            while not ended.is_set():
                try:
                    client.infer("digits", {"input": rows})
                except Exception as error:  # noqa: BLE001 - what it was is the test's result
                    failures.append(error)
                    ended.set()
                answers.release()
                ended.wait(0.002)  # the cores are for the processes that start

    def wait_for_more() -> None:
        for _ in range(100):
            assert answers.acquire(timeout=20)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield wait_for_more
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert failures == []


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
    registry.deploy(DeploymentSpec(model="digits", number=1), by="ada")
    registry.close()
    server = Server(tmp_path)
    with Client(server.url) as client:
        for _ in client.wait("digits", timeout_s=30):
            pass
        assert models[0].is_what(client)
        command(server.url, "undeploy", "digits")
        assert "nothing is deployed" in command(server.url, "status")
    assert server.end(signal.SIGINT) == (0, "all requests answered, all replicas ended")
