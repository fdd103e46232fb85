"""``forescale plan GRAPH``: what it prints, and what it says of wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from forescale.cli.main import app
from forescale.cli.units import parse_size
from forescale.core.errors import InvalidInput

PIPEDREAM = """\
node1 -- Input -- forward_compute_time=0, backward_compute_time=0, activation_size=8, parameter_size=0
node2 -- Linear -- forward_compute_time=2, backward_compute_time=4, activation_size=8, parameter_size=4
node3 -- Linear -- forward_compute_time=2, backward_compute_time=4, activation_size=8, parameter_size=4
\tnode1 -- node2
\tnode2 -- node3
"""
CLUSTER = """\
[devices.gpu]
count = 2
profile = "h100"

[links.slow]
bandwidth_bytes_per_s = 1e9
latency_s = 0.0

[[topology]]
name = "node"
link = "slow"
"""


def chain(length: int = 6, *, memory_bytes: float = 100.0) -> str:
    nodes = [
        {
            "id": i,
            "supportedOnFpga": 1,
            "cpuLatency": 20.0,
            "fpgaLatency": 2.0,
            "isBackwardNode": 0,
            "size": 10.0,
        }
        for i in range(length)
    ]
    edges = [{"sourceId": i, "destId": i + 1, "cost": 1.0} for i in range(length - 1)]
    limits = {"maxFPGAs": 2, "maxCPUs": 0, "maxSizePerFPGA": memory_bytes}
    return json.dumps({**limits, "nodes": nodes, "edges": edges})


PIPER = json.dumps(
    {
        "maxDevices": 2,
        "maxMemoryPerDevice": 100.0,
        "bandwidth": 10.0,
        "mbsInBatch": 4,
        "nodes": [
            {
                "id": i,
                "TMPCs": {
                    "1": [
                        {
                            "id": "vanilla",
                            "timePerSample": 2.0,
                            "parameterSize": 1.0,
                            "memoryUsageA": 1.0,
                            "memoryUsageB": 1.0,
                            "syncTimeFw": {str(i - 1): 0.0} if i else {},
                            "syncTimeBw": {str(i + 1): 0.0} if i < 3 else {},
                        }
                    ]
                },
            }
            for i in range(4)
        ],
        "edges": [{"sourceId": i, "destId": i + 1, "communicationCost": 1.0} for i in range(3)],
    }
)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "graph.json"
    path.write_text(chain())
    return path


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["plan", *(str(word) for word in words)])


def plan(*words: str | Path) -> dict[str, Any]:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def error(*words: str | Path, exit_code: int = 2) -> str:
    result = run(*words)
    assert result.exit_code == exit_code
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_devices_with_their_loads(graph: Path) -> None:
    found = plan(graph)
    assert found["assignment"] == {**dict.fromkeys("012", "acc0"), **dict.fromkeys("345", "acc1")}
    assert found["loads"] == {"acc0": 7.0, "acc1": 7.0}
    assert found["objective"] == 7.0
    assert found["memory_bytes"] == {"acc0": 30.0, "acc1": 30.0}


def test_table_names_the_bottleneck_and_what_would_help(graph: Path) -> None:
    shown = run(graph).stdout
    assert "Longest load: 7.000 (contiguous)" in shown
    assert "has the longest load; 14% of it are transfers" in shown
    helping = shown.split("What would help most")[1]
    assert "one more acc" in helping
    assert "links 2 times as fast" in helping
    assert "more memory" not in helping


def test_certificate(graph: Path) -> None:
    pytest.importorskip("highspy")
    assert plan(graph, "--certify")["proven_optimal"]
    assert "No placement is shorter: proven." in run(graph, "--certify").stdout


def test_beside_others_and_the_users_own(graph: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({str(i): f"acc{i % 2}" for i in range(6)}))
    rows = {row["name"]: row for row in plan(graph, "--compare", "--own", own)["compared"]}
    assert rows["Forescale"]["ratio"] == 1.0
    assert rows["your own"]["objective"] == 11.0
    assert {"even split", "greedy (accelerate)", "PipeDream"} < rows.keys()
    assert "your own" in run(graph, "--compare", "--own", own).stdout


def test_picture(graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "placement.svg"
    assert run(graph, "--svg", out).exit_code == 0
    assert ElementTree.parse(out).getroot().tag.endswith("svg")


def test_number_and_memory_of_devices_replace_the_graphs(graph: Path) -> None:
    assert set(plan(graph, "--devices", "3")["loads"]) == {"acc0", "acc1", "acc2"}
    assert "need 10 bytes on one device" in error(graph, "--memory", "5B", exit_code=3)
    assert max(plan(graph, "--devices", "4", "--memory", "20B")["memory_bytes"].values()) <= 20


def test_nothing_fits(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    path.write_text(chain(memory_bytes=25.0))
    result = run(path, "--json")
    assert result.exit_code == 3
    said = json.loads(result.stdout)
    assert said["feasible"] is False
    assert said["missing_bytes"] == 10


def test_pipedream_on_a_cluster(tmp_path: Path) -> None:
    path, cluster = tmp_path / "graph.txt", tmp_path / "cluster.toml"
    path.write_text(PIPEDREAM)
    cluster.write_text(CLUSTER)
    assert plan(path, "--cluster", cluster)["objective"] == pytest.approx(6.0, rel=1e-3)
    assert "in ms" in run(path, "--cluster", cluster).stdout
    assert "give a cluster file or their number" in error(path)


def test_links_that_differ_cost_by_who_exchanges(tmp_path: Path) -> None:
    graph, cluster = tmp_path / "graph.txt", tmp_path / "cluster.toml"
    graph.write_text(PIPEDREAM.replace("activation_size=8", "activation_size=1e9"))
    levels = '[[topology]]\nname = "node"\nsize = 2\nlink = "nvlink-4"\n'
    levels += '[[topology]]\nname = "rack"\nlink = "slow"\n'
    devices, _, _ = CLUSTER.partition("[[topology]]")
    cluster.write_text(devices.replace("count = 2", "count = 4") + levels)
    found = plan(graph, "--cluster", cluster)
    assert found["objective"] == pytest.approx(6 + 2e3 / 450, rel=1e-3)
    assert set(found["assignment"].values()) <= {"gpu0", "gpu1"}
    assert "2 levels of links" in error(graph, "--cluster", cluster, "--certify")


def test_latency_is_of_one_sample(graph: Path, tmp_path: Path) -> None:
    found = plan(graph, "--objective", "latency")
    assert found["minimised"] == "latency"
    assert found["objective"] == found["lower_bound"] == 12.0  # a chain, on one device
    assert found["starts"] == {str(node): 2.0 * node for node in range(6)}
    assert plan(graph)["minimised"] == "longest load"
    apart = plan(graph, "--objective", "latency", "--memory", "30B")
    assert (apart["objective"], sum(apart["loads"].values())) == (13.0, 12.0)
    shown = run(graph, "--objective", "latency", "--compare", "--svg", tmp_path / "out.svg").stdout
    assert "Latency: 12.000 (contiguous)" in shown
    assert "What would help" not in shown
    assert "Latency: 12.000" in (tmp_path / "out.svg").read_text()


def test_piper_plans_stages(tmp_path: Path) -> None:
    path = tmp_path / "piper.json"
    path.write_text(PIPER)
    assert plan(path)["objective"] == pytest.approx(4.2, rel=0.1)
    assert plan(path, "--devices", "1")["objective"] == 8.0
    assert error(path, "--devices", "1", "--memory", "3B", exit_code=3)
    assert "--free is not for Piper's graphs" in error(path, "--free")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--time-limit-s", "3"], "--certify"),
        (["--own", "x.json"], "--compare"),
        (["--objective", "speed"], "throughput or latency"),
        (["--objective", "latency", "--certify"], "no certificate of a latency"),
        (["--format", "onnx"], "device-placement, pipedream, piper, model"),
        (["--memory", "much"], "4GB"),
        (["--batch", "s0"], "NAME=VALUE"),
        (["--bandwidth", "3"], "Piper"),
        (["--compare", "--own", "missing.json"], "missing.json"),
        (["--cluster", "missing.toml"], "missing.toml"),
    ],
)
def test_options_that_do_not_go_together(graph: Path, words: list[str], said: str) -> None:
    assert said in error(graph, *words)


def test_tasks_have_no_options_of_graphs() -> None:
    assert "--certify is for graphs" in error("train_me.py", "--certify")


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("4GB", 4e9), ("1.5 GiB", 1.5 * 2**30), ("4000", 4000.0), ("4e9", 4e9), ("2kB", 2e3)],
)
def test_sizes(text: str, size_bytes: float) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "4XB", "1.2.3GB", "0", "1e999"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_size(text)
