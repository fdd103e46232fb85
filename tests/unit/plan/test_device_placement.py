"""The reader of published graphs, and placements of the samples against an independent judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from forescale.cli.main import app
from forescale.core.errors import InvalidInput
from forescale.plan.placement.device_placement import read_device_placement


def node(identifier: int, **changes: Any) -> dict[str, Any]:
    plain = {"id": identifier, "supportedOnFpga": 1, "cpuLatency": 10.0, "fpgaLatency": 1.0}
    return {**plain, "isBackwardNode": 0, "size": 5.0, **changes}


def graph(nodes: list[dict[str, Any]], edges: list[tuple[int, int, float]]) -> str:
    return json.dumps(
        {
            "maxSizePerFPGA": 100.0,
            "maxFPGAs": 2,
            "maxCPUs": 1,
            "nodes": nodes,
            "edges": [{"sourceId": a, "destId": b, "cost": cost} for a, b, cost in edges],
        }
    )


def test_reads_costs_groups_and_devices() -> None:
    nodes = [node(7, colorClass=1), node(3, supportedOnFpga=0), node(9, colorClass=1, isBackwardNode=1)]
    problem = read_device_placement(graph(nodes, [(7, 3, 2.0), (7, 9, 2.0), (3, 9, 4.0)]))
    assert problem.nodes == ("7", "3", "9")
    assert problem.devices == ("acc0", "acc1", "cpu0")
    assert problem.work_KN.tolist() == [[1.0, float("inf"), 1.0], [10.0, 10.0, 10.0]]
    assert [(net.cost, net.nodes) for net in problem.nets] == [(2.0, (0, 1, 2)), (4.0, (1, 2))]
    assert problem.together == ((0, 2),)
    assert problem.backward_N.tolist() == [False, False, True]
    assert problem.kinds[0].memory_bytes == 100.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "not a device-placement graph"),
        ("[]", "not a device-placement graph"),
        ('{"nodes": []}', "not a device-placement graph|has no nodes|lacks"),
        (graph([], []), "the graph has no nodes"),
        (graph([node(1)], [(1, 2, 1.0)]), "edge 1 -> 2 names node 2, which is not there"),
        (graph([node(1), node(2)], [(1, 2, -1.0)]), "the output of node 1 has a negative cost"),
        (graph([node(1), node(2, fpgaLatency=-3)], []), "node 2 has a negative time"),
        (graph([node(1), node(1)], []), "two nodes of the graph have the same id"),
        (graph([node(1), node(2, supportedOnFpga=0, cpuLatency=float("inf"))], []), "can run node 2"),
        (graph([node(1), node(2), node(3)], [(1, 2, 1), (2, 3, 1), (3, 2, 1)]), "a cycle .* node [23]"),
    ],
)
def test_a_wrong_graph_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_device_placement(text)


def test_a_published_example_is_read(tmp_path: Path) -> None:
    """The command prints the assignment by the file's own names."""
    path = tmp_path / "graph.json"
    path.write_text(graph([node(n, fpgaLatency=4.0) for n in (5, 6)], [(5, 6, 1.0)]))
    done = CliRunner().invoke(app, ["plan", str(path), "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["objective"] == 5.0
    assert sorted(answer["assignment"].values()) == ["acc0", "acc1"]
    assert set(answer["assignment"]) == {"5", "6"}
    assert answer["lower_bound"] <= 5.0
