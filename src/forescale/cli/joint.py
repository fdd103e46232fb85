"""``forescale plan GRAPH.json --format piper``: stages, replicas, splits and recomputation together."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from forescale.cli.console import console, print_json, table
from forescale.cli.units import percent, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forescale.plan.joint.problem import JointProblem, JointStage
    from forescale.plan.joint.search import JointAnswer


def plan_jointly(
    text: str,
    *,
    devices: int | None,
    memory_bytes: float | None,
    json: bool,
    bandwidth_bytes_per_time: float | None = None,
) -> None:
    """Reads a graph, plans it and shows the result.

    Args:
        devices: how many there are; like the other limits, what the graph says unless given.
    """
    from forescale.plan.joint.piper import read_piper
    from forescale.plan.joint.search import plan_joint

    problem = read_piper(text)
    given = {
        "devices": devices,
        "memory_bytes": memory_bytes,
        "bandwidth_bytes_per_time": bandwidth_bytes_per_time,
    }
    problem = replace(problem, **{name: value for name, value in given.items() if value is not None})
    started_s = time.perf_counter()
    answer = plan_joint(problem)
    elapsed_s = time.perf_counter() - started_s
    if json:
        print_json(_as_json(problem, answer, elapsed_s))
    else:
        _show(problem, answer, elapsed_s)


def _as_json(problem: JointProblem, answer: JointAnswer, elapsed_s: float) -> dict[str, Any]:
    stages = answer.plan.stages
    return {
        "objective": answer.objective,
        "lower_bound": answer.lower_bound,
        "gap": answer.gap,
        "feasible": True,
        "stages": [
            {
                "nodes": [problem.nodes[node] for node in stage.nodes],
                "data_parallel_degree": stage.replicas,
                "tensor_parallel_degree": stage.tensor_degree,
                "devices": stage.devices,
                "options": {
                    problem.nodes[node]: name
                    for node, name in zip(stage.nodes, _option_names(problem, stage), strict=True)
                },
            }
            for stage in stages
        ],
        "assignment": {
            problem.nodes[node]: number for number, stage in enumerate(stages) for node in stage.nodes
        },
        "loads": list(answer.loads),
        "memory_bytes": list(answer.memory_bytes),
        "elapsed_s": elapsed_s,
        "rationale": _reasons(problem, answer),
    }


def _show(problem: JointProblem, answer: JointAnswer, elapsed_s: float) -> None:
    columns = ("stage", ">devices", "replicas x split", ">nodes", "options", ">transfers", ">load", ">memory")
    shown = table("Pipeline", *columns)
    rows = zip(answer.plan.stages, answer.transfers, answer.loads, answer.memory_bytes, strict=True)
    for number, (stage, transfers, load, memory_bytes) in enumerate(rows):
        shown.add_row(
            str(number),
            str(stage.devices),
            f"{stage.replicas} x {stage.tensor_degree}",
            str(len(stage.nodes)),
            _counted(_option_names(problem, stage)),
            f"{transfers:.3g}",
            f"{load:.5g}",
            size(memory_bytes),
        )
    out = console()
    out.print(shown)
    out.print(
        f"Time per sample: {answer.objective:.6g}, in the graph's unit of time. No plan is below "
        f"{answer.lower_bound:.6g}: at most {percent(answer.gap)} could be gained."
    )
    for reason in _reasons(problem, answer):
        out.print(reason, markup=False)
    out.print(f"Found in {elapsed_s:.2f} s.")


def _option_names(problem: JointProblem, stage: JointStage) -> list[str]:
    return [
        problem.options[node][stage.tensor_degree][option].name
        for node, option in zip(stage.nodes, stage.options, strict=True)
    ]


def _counted(names: Sequence[str]) -> str:
    """``vanilla 5, activation recomp 2``."""
    return ", ".join(f"{name} {names.count(name)}" for name in dict.fromkeys(names))


def _reasons(problem: JointProblem, answer: JointAnswer) -> list[str]:
    """Which stage sets the pace and what of it is transfers, and how full memory and devices are."""
    slowest = answer.loads.index(answer.objective)
    transfers = answer.transfers[slowest] / answer.objective if answer.objective else 0.0
    fullest = answer.memory_bytes.index(max(answer.memory_bytes))
    used = sum(stage.devices for stage in answer.plan.stages)
    return [
        f"Stage {slowest} has the longest load; {percent(transfers)} of it are transfers.",
        f"Stage {fullest} uses most memory: {percent(answer.memory_bytes[fullest] / problem.memory_bytes)} "
        f"of a device's {size(problem.memory_bytes)}. {used} of {problem.devices} devices are used.",
    ]
