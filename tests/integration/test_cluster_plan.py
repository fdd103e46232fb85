"""``forescale plan FILE.py --cluster``: a task planned for devices that are not here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forescale.cli.main import app

TASK = """
import torch
import forescale as fs

layers = [torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh()) for _ in range(8)]
task = fs.TrainingTask(
    model=torch.nn.Sequential(*layers),
    loss=lambda output, batch: torch.nn.functional.mse_loss(output, batch[1]),
    optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    batches=[(torch.zeros(64, 32), torch.zeros(64, 32))],
)
"""
CLUSTER = """
[devices.gpu]
count = 12
flops_per_s = 1e7
memory_bytes = {memory_bytes}
memory_bandwidth_bytes_per_s = 1e9
[links.net]
bandwidth_bytes_per_s = 1e6
latency_s = 1e-5
[[topology]]
name = "site"
link = "net"
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "task.py"
    path.write_text(TASK)
    return path


def plan(task: Path, *words: str, memory_bytes: int = 10**9) -> tuple[int, str, str]:
    cluster = task.with_name("cluster.toml")
    cluster.write_text(CLUSTER.format(memory_bytes=memory_bytes))
    result = CliRunner().invoke(app, ["plan", str(task), "--cluster", str(cluster), *words])
    return result.exit_code, result.stdout, result.stderr


def test_stages_run_on_the_cluster_s_devices(task: Path) -> None:
    code, stdout, _ = plan(task, "--json")
    assert code == 0
    found = json.loads(stdout)
    names = [stage["device"] for stage in found["stages"]]
    assert len(names) > 1
    assert set(names) <= {f"gpu{number}" for number in range(12)}
    held = {operator for stage in found["stages"] for operator in stage["operators"]}
    assert held == set(range(len(held)))
    assert max(stage["memory_bytes"] for stage in found["stages"]) <= 10**9


def test_what_fits_on_no_device_is_said(task: Path) -> None:
    code, _, stderr = plan(task, memory_bytes=10_000)
    assert code == 3
    assert "gpu" in stderr.splitlines()[-1]


def test_devices_are_those_of_the_file(task: Path) -> None:
    code, _, stderr = plan(task, "--devices", "2")
    assert code == 2
    assert "leave out --devices" in stderr
