"""The reader of Piper's graphs, and plans of small ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from forescale.cli.main import app
from forescale.core.errors import InfeasiblePlan, InvalidInput
from forescale.plan.joint.cost import cost
from forescale.plan.joint.piper import read_piper
from forescale.plan.joint.problem import JointPlan, JointStage
from forescale.plan.joint.search import plan_joint

ENDS = [(7, 3), (3, 9), (7, 9)]


def option(node: int, ends: list[tuple[int, int]], **changes: Any) -> dict[str, Any]:
    return {
        "id": "vanilla",
        "timePerSample": 6.0,
        "parameterSize": 30.0,
        "memoryUsageA": 4.0,
        "memoryUsageB": 1.0,
        "syncTimeFw": {str(a): 1.0 for a, b in ends if b == node},
        "syncTimeBw": {str(b): 2.0 for a, b in ends if a == node},
        **changes,
    }


def small(node: int, ends: list[tuple[int, int]] = ENDS) -> dict[str, Any]:
    return option(node, ends, id="activation recomp", timePerSample=8.0, memoryUsageA=1.0, memoryUsageB=3.0)


def graph(ends: list[tuple[int, int]] = ENDS, ids: Iterable[int] = (7, 3, 9), **changes: Any) -> str:
    content = {
        "maxDevices": 3,
        "maxMemoryPerDevice": 100.0,
        "bandwidth": 10.0,
        "mbsInBatch": 6,
        "nodes": [{"id": node, "TMPCs": {"1": [option(node, ends), small(node, ends)]}} for node in ids],
        "edges": [{"sourceId": a, "destId": b, "communicationCost": 4.0} for a, b in ends],
    }
    return json.dumps({**content, **changes})


def with_option(changes: dict[str, Any]) -> str:
    """A graph of one node whose only option is changed."""
    return graph([], (), nodes=[{"id": 5, "TMPCs": {"1": [option(5, [], **changes)]}}])


def test_reads_options_edges_and_limits() -> None:
    problem = read_piper(graph())
    assert problem.nodes == ("7", "3", "9")
    assert (problem.devices, problem.memory_bytes, problem.samples) == (3, 100.0, 6)
    assert [(edge.source, edge.target) for edge in problem.edges] == [(0, 1), (1, 2), (0, 2)]
    vanilla, recomputed = problem.options[1][1]
    assert (vanilla.name, vanilla.work, vanilla.parameter_bytes) == ("vanilla", 6.0, 30.0)
    assert (recomputed.stored_bytes, recomputed.fixed_bytes) == (1.0, 3.0)
    assert (vanilla.received_bytes, vanilla.sent_bytes) == ({0: 1.0}, {2: 2.0})
    assert problem.replicas == (1, 2, 3)


def test_cost_of_a_given_plan() -> None:
    problem = read_piper(graph())
    stages = (
        JointStage(nodes=(0, 1), replicas=2, tensor_degree=1, options=(0, 1)),
        JointStage(nodes=(2,), replicas=1, tensor_degree=1, options=(0,)),
    )
    figures = cost(problem, JointPlan(stages=stages))
    # Two edges leave: 2 · (4 + 2 + 4 + 2) bytes shared by two; 4 · ½ · 60 bytes of parameters over 6 samples.
    assert figures.transfers == pytest.approx(((12 + 20) / 10, 2 * (4 + 1 + 4 + 1) / 10))
    assert figures.loads == pytest.approx((7 + 3.2, 6 + 2))
    # Three replicas from the first stage on, two of them its own: two samples in flight.
    assert figures.memory_bytes == (2 * 4 + 1 + 2 * 1 + 3, 5)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([((0,), 1), ((1,), 1)], "every node"),
        ([((0, 2), 1), ((1,), 1)], "earlier stage"),
        ([((0, 1, 2), 4)], "divide the samples"),
        ([((0, 1), 2), ((2,), 2)], "more devices"),
    ],
)
def test_what_is_no_plan_has_no_cost(stages: list[tuple[tuple[int, ...], int]], message: str) -> None:
    plan = JointPlan(
        stages=tuple(
            JointStage(nodes=nodes, replicas=replicas, tensor_degree=1, options=(0,) * len(nodes))
            for nodes, replicas in stages
        )
    )
    with pytest.raises(ValueError, match=message):
        cost(read_piper(graph()), plan)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "not a Piper graph"),
        ("[]", "not a Piper graph"),
        ('{"nodes": []}', "lacks 'edges'"),
        (graph([], ()), "the graph has no nodes"),
        (graph([(7, 4)]), "the edge 7 → 4 names node 4, which is not there"),
        (graph([(7, 3), (7, 3)]), "two edges join the same nodes"),
        (graph([(7, 3), (3, 9), (9, 3)]), "a cycle .* node [39]"),
        (graph([], (7, 7)), "two nodes of the graph have the same id"),
        (graph(maxDevices=0), "number of devices must be above zero"),
        (graph(bandwidth=-1.0), "bandwidth must be above zero"),
        (graph(mbsInBatch=0), "microbatches in a batch must be above zero"),
        (with_option({"timePerSample": -1.0}), "'vanilla' of node 5 has a negative or infinite time"),
        (with_option({"memoryUsageB": float("nan")}), "node 5 has a negative or infinite memory"),
        (with_option({"timePerSample": None}), "not a Piper graph"),
        (with_option({"syncTimeFw": {"8": 1.0}}), "syncTimeFw of option 'vanilla' of node 5"),
        (graph([], (), nodes=[{"id": 5, "TMPCs": {"1": []}}]), "node 5 has no option"),
        (graph([], (), nodes=[{"id": 5, "TMPCs": {"1": [{"id": "x"}]}}]), "node 5 lacks 'timePerSample'"),
        (graph([], (), nodes=[{"id": 5, "TMPCs": {"4": [option(5, [])]}}]), "for 4 devices and more"),
    ],
)
def test_a_wrong_graph_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as raised:
        plan_joint(read_piper(text))
    assert "\n" not in str(raised.value)


def test_recomputation_makes_a_plan_fit() -> None:
    roomy = plan_joint(read_piper(graph()))
    assert {which for stage in roomy.plan.stages for which in stage.options} == {0}
    tight = plan_joint(read_piper(graph(maxMemoryPerDevice=8.0)))
    assert tight.objective > roomy.objective
    assert 1 in tight.plan.stages[0].options
    assert max(tight.memory_bytes) <= 8.0


def test_what_cannot_fit_is_named_with_the_bytes_missing() -> None:
    # Recomputed, each of the three nodes needs 1 + 3 bytes.
    with pytest.raises(InfeasiblePlan, match="with 12 bytes on each there is a plan") as raised:
        plan_joint(read_piper(graph(maxDevices=1, maxMemoryPerDevice=10.0)))
    assert raised.value.short_bytes == 2


def test_the_same_from_any_seed_where_all_cuts_are_known() -> None:
    problem = read_piper(graph(maxMemoryPerDevice=9.0))
    assert len({plan_joint(problem, seed=seed).objective for seed in range(3)}) == 1


def test_a_wide_graph_gets_a_plan_without_all_its_cuts() -> None:
    """Twenty nodes without an order have a million downsets; as all are alike, any order will do."""
    limits = {"maxDevices": 4, "maxMemoryPerDevice": 40.0, "mbsInBatch": 1920}
    wide = plan_joint(read_piper(graph([], range(20), **limits)))
    chain = json.loads(graph([(node, node + 1) for node in range(19)], range(20), **limits))
    for edge in chain["edges"]:
        edge["communicationCost"] = 0.0
    for given in (given for node in chain["nodes"] for given in node["TMPCs"]["1"]):
        given["syncTimeFw"] = dict.fromkeys(given["syncTimeFw"], 0.0)
        given["syncTimeBw"] = dict.fromkeys(given["syncTimeBw"], 0.0)
    best = plan_joint(read_piper(json.dumps(chain)))
    assert wide.objective == best.objective == pytest.approx(best.lower_bound)
    assert wide.lower_bound < wide.objective


def test_the_command_shows_stages(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    path.write_text(graph())

    def run(*words: str) -> Result:
        return CliRunner().invoke(app, ["plan", str(path), *words])

    answer = json.loads(run("--devices", "2", "--memory", "14B", "--json").stdout)
    assert answer["feasible"]
    assert answer["assignment"] == {
        node: number for number, stage in enumerate(answer["stages"]) for node in stage["nodes"]
    }
    assert sum(stage["devices"] for stage in answer["stages"]) <= 2
    assert max(answer["loads"]) == answer["objective"] >= answer["lower_bound"]
    shown = run("--devices", "2", "--memory", "14B").stdout
    assert f"Time per sample: {answer['objective']:.6g}" in shown
    infeasible = run("--devices", "1", "--memory", "5B", "--json")
    assert infeasible.exit_code == 3
    assert json.loads(infeasible.stdout) == {
        "feasible": False,
        "missing_bytes": 7,
        "reason": "no plan fits: a device is short of 7 bytes; with 12 bytes on each there is a plan",
    }
