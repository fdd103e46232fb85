"""A replica under load gets the cores that are idle and gives them back, without a failed request."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from forescale.api.client import Client
from forescale.profile.cores import allowed_cores
from serving_processes import FEATURES, Server, command, requests_all_the_time

TOKENS, WIDTH = 384, 256


class Wide(nn.Module):
    """Many milliseconds a row on one core, so that four clients keep it busy."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Linear(FEATURES, TOKENS * WIDTH)
        self.layers = nn.Sequential(nn.Linear(WIDTH, 8 * WIDTH), nn.ReLU(), nn.Linear(8 * WIDTH, WIDTH))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as it is asked
        return self.layers(self.spread(input).reshape(-1, TOKENS, WIDTH)).mean(1)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "state", "--devices", "1")
    yield server
    assert server.end(signal.SIGTERM)[0] == 0


def test_threads_follow_the_load_on_whatever_cores_there_are(server: Server, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = torch.export.export(Wide().eval(), (torch.zeros(1, FEATURES),))
    torch.export.save(program, tmp_path / "m.pt2")
    cores = len(allowed_cores())
    limits = "--max-batch", "1", "--latency-ms", "4000"
    with Client(server.url) as client:

        def threads() -> int:
            (replica,) = client.deployments()[0]["replicas"]
            return replica["threads"]

        def changes() -> list[tuple[int, int]]:
            scaled = [event["detail"] for event in client.events() if event["kind"] == "scaled"]
            steps = [(detail["threads_from"], detail["threads"]) for detail in scaled]
            return [(before, after) for before, after in steps if before != after]

        command(server.url, "models", "add", "digits", tmp_path / "m.pt2")
        command(server.url, "deploy", "digits@1", *limits, "--wait")
        process = client.deployments()[0]["replicas"][0]["process"]
        with requests_all_the_time(server.url, np.ones((1, FEATURES), np.float32)) as wait_for_more:
            wait_for_more()
            while cores > 1 and not changes():
                wait_for_more()
            assert changes()[:1] == ([(1, 2)] if cores > 1 else [])
            command(server.url, "deploy", "digits@1", *limits, "--threads", "1")
            while threads() != 1:
                wait_for_more()
        assert client.deployments()[0]["replicas"][0]["process"] == process
        assert "threads" in command(server.url, "status")
