"""A server in processes of its own, models for it, and requests that must not fail."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import nn
from typer.testing import CliRunner

from forescale.api.client import Client
from forescale.cli.main import app

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

    def __init__(self, state: Path, *words: str) -> None:
        self.state = state
        self.process = subprocess.Popen(
            [sys.executable, "-m", "forescale", "serve", "--state", str(state), "--port", "0", *words],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        said: list[str] = []
        while not (found := re.search(r"serving on (\S+)", "".join(said))):
            said.append(self.process.stderr.readline())
            assert said[-1], said
        self.url = found[1]

    def plane(self) -> psutil.Process:
        return psutil.Process(json.loads((self.state / "plane").read_bytes())["pid"])

    def children(self) -> list[psutil.Process]:
        """The data plane and its replicas."""
        plane = self.plane()
        return [plane, *plane.children(recursive=True)]

    def kill(self) -> None:
        """Kill the controller; the data plane goes on."""
        self.process.kill()
        self.process.communicate(timeout=20)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Exit code, and what it said last; nothing is left."""
        children = self.children()
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=20)
        all_end(children)
        return self.process.returncode, said.splitlines()[-1] if said else ""

    def process_of(self, replica: dict[str, str]) -> psutil.Process:
        return next(child for child in self.children() if described(child)["name"] == replica["process"])


def described(process: psutil.Process) -> dict[str, Any]:
    """Its name and command line; nothing if it has ended, as what a fork leaves behind does at once."""
    try:
        return process.as_dict(["name", "cmdline"])
    except psutil.NoSuchProcess:
        return {"name": "", "cmdline": []}


def all_end(processes: list[psutil.Process]) -> None:
    _, left = psutil.wait_procs(processes, timeout=20)
    assert left == []


def make_models(folder: Path) -> list[Model]:
    """Two versions."""
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
def requests_all_the_time(
    url: str, rows: np.ndarray, pause_s: float = 0.002
) -> Generator[Callable[[], None]]:
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
                ended.wait(pause_s)  # the cores are for the processes that start

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
