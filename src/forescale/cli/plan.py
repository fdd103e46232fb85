"""``forescale plan``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forescale.cli import options
from forescale.cli.console import console, print_json, table
from forescale.cli.measurement import measure_task
from forescale.cli.units import percent, seconds, size
from forescale.core.errors import InvalidInput

if TYPE_CHECKING:
    from forescale.graph.model import ModelGraph
    from forescale.plan.partition_plan import PartitionPlan, Stage
    from forescale.plan.problem import PartitionProblem

Svg = Annotated[Path | None, typer.Option(metavar="OUT.svg", help="Draw the plan, too.")]


def plan(
    file: options.TaskReference, devices: options.Devices = None, svg: Svg = None, json: options.Json = False
) -> None:
    """Who would run what: the stages, their predicted time and memory, and the reasons."""
    measured = measure_task(file, devices)
    from forescale.control.planner import Planner

    planner = Planner(measured.costs)
    binding = measured.bindings[0]
    problem, best = planner.problem(binding, {}), planner.best(binding, {})
    if svg is not None:
        _draw(problem, best, svg)
    if json:
        print_json(_as_json(problem, best))
    else:
        _show(problem, best)


def _as_json(problem: PartitionProblem, plan: PartitionPlan) -> dict[str, Any]:
    stages = [
        {
            "device": stage.device,
            "operators": stage.operators,
            "modules": modules(problem.graph, stage),
            "parameters": parameters(problem.graph, stage),
            "recompute": stage.recompute,
            "receives": received_bytes(problem, plan, stage),
            **asdict(predicted),
        }
        for stage, predicted in zip(plan.stages, plan.prediction.stages, strict=True)
    ]
    return {
        "stages": stages,
        "microbatches": plan.microbatches,
        "schedule": plan.schedule,
        "step_s": plan.prediction.step_s,
        "rationale": plan.rationale,
    }


def _show(problem: PartitionProblem, plan: PartitionPlan) -> None:
    names = ("device", "from", "to", ">parameters", ">forward", ">backward", ">busy", ">memory", ">receives")
    shown = table("Stages", *names)
    for stage, predicted in zip(plan.stages, plan.prediction.stages, strict=True):
        paths = modules(problem.graph, stage)
        crossing = received_bytes(problem, plan, stage)
        shown.add_row(
            stage.device,
            paths[0],
            paths[-1],
            f"{parameters(problem.graph, stage):,}",
            seconds(predicted.forward_s),
            seconds(predicted.backward_s),
            percent(predicted.busy_s / plan.prediction.step_s),
            f"{size(predicted.memory_bytes)} of {size(problem.cluster.device(stage.device).memory_bytes)}",
            _received(crossing),
        )
    out = console()
    out.print(shown)
    out.print("Forward, backward and what is received: per microbatch. Busy: of the whole step.")
    out.print(
        f"Predicted step time: {seconds(plan.prediction.step_s)} with {plan.microbatches} microbatches "
        f"({plan.schedule})"
    )
    for reason in plan.rationale:
        out.print(f"- {reason}", markup=False, soft_wrap=True)


def _received(crossing: dict[str, int]) -> str:
    if not crossing:
        return "the batch"
    return f"{len(crossing)} tensor{'s' * (len(crossing) > 1)}, {size(sum(crossing.values()))}"


def modules(graph: ModelGraph, stage: Stage) -> list[str]:
    """Paths of the modules whose operators a stage runs, in the order they begin."""
    return list(dict.fromkeys(graph.operators[index].module_path or "(model)" for index in stage.operators))


def parameters(graph: ModelGraph, stage: Stage) -> int:
    """Numbers in the parameters a stage holds; tied ones count on every stage that holds them."""
    from math import prod

    held = {name for index in stage.operators for name in graph.operators[index].parameters}
    return sum(prod(graph.parameters[name].shape) for name in held)


def received_bytes(problem: PartitionProblem, plan: PartitionPlan, stage: Stage) -> dict[str, int]:
    """Tensors a stage takes from earlier ones, with the bytes of one microbatch."""
    graph, own = problem.graph, set(stage.operators)
    read = dict.fromkeys(name for index in stage.operators for name in graph.operators[index].inputs)
    size_bytes = problem.costs[plan.microbatches].tensor_bytes
    return {n: size_bytes[n] for n in read if graph.tensors[n].producer not in own | {None}}


def _draw(problem: PartitionProblem, plan: PartitionPlan, path: Path) -> None:
    from forescale.plan.drawing import draw_svg

    try:
        path.write_text(draw_svg(problem.graph, plan), encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror}") from error
