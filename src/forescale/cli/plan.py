"""``forescale plan``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forescale.cli import options, placement
from forescale.cli.console import console, print_json, table
from forescale.cli.measurement import measure_task
from forescale.cli.output import check_writable, write_text
from forescale.cli.units import percent, seconds, size
from forescale.core.errors import InvalidInput

if TYPE_CHECKING:
    from forescale.graph.model import ModelGraph
    from forescale.plan.partition_plan import PartitionPlan, Stage
    from forescale.plan.problem import PartitionProblem

Svg = Annotated[Path | None, typer.Option(metavar="OUT.svg", help="Also draw the plan to this file.")]


Reference = Annotated[
    str,
    typer.Argument(
        metavar="FILE.py[:TASK]|GRAPH.json",
        help="Python file and the name of a forescale.TrainingTask in it, or a cost graph in the format of "
        "Tarnawski et al., NeurIPS 2020.",
    ),
]
Contiguous = Annotated[
    bool,
    typer.Option(
        "--contiguous/--free", help="Of a graph: whether each device holds an interval, or any nodes."
    ),
]


def plan(
    file: Reference,
    devices: options.Devices = None,
    contiguous: Contiguous = True,
    svg: Svg = None,
    json: options.Json = False,
) -> None:
    """Who would run what: the stages, their predicted time and memory, and the reasons."""
    if file.endswith(placement.SUFFIX):
        if svg is not None:
            raise InvalidInput("--svg draws plans of models; a graph is printed as a table, or with --json")
        placement.place_graph(Path(file), accelerators=devices, contiguous=contiguous, json=json)
        return
    if not contiguous:
        raise InvalidInput("--free is for graphs; a model's stages are contiguous")
    if svg is not None:
        check_writable(svg)
    measured = measure_task(file, devices)
    from forescale.control.planner import Planner
    from forescale.plan.drawing import draw_svg

    planner = Planner(measured.costs)
    binding = measured.bindings[0]
    problem, best = planner.problem(binding, {}), planner.best(binding, {})
    if svg is not None:
        write_text(svg, draw_svg(problem.graph, best))
    peaks_bytes = measured.costs.peak_bytes(best, binding)
    if json:
        print_json(_as_json(problem, best, peaks_bytes))
    else:
        _show(problem, best, peaks_bytes)


def _as_json(problem: PartitionProblem, plan: PartitionPlan, peaks_bytes: Sequence[int]) -> dict[str, Any]:
    from forescale.plan.replicas import microbatch_counts

    stages = [
        {
            "device": stage.device,
            "operators": stage.operators,
            "modules": modules(problem.graph, stage),
            "parameters": parameters(problem.graph, stage),
            "recompute": stage.recompute,
            "microbatches": count,
            "receives": received_bytes(problem, plan, stage),
            **asdict(predicted),
            "peak_memory_bytes": peak_bytes,
            "device_memory_bytes": problem.cluster.device(stage.device).memory_bytes,
        }
        for stage, predicted, peak_bytes, count in zip(
            plan.stages, plan.prediction.stages, peaks_bytes, microbatch_counts(plan), strict=True
        )
    ]
    return {
        "stages": stages,
        "microbatches": plan.microbatches,
        "schedule": plan.schedule,
        "step_s": plan.prediction.step_s,
        "rationale": plan.rationale,
    }


def _show(problem: PartitionProblem, plan: PartitionPlan, peaks_bytes: Sequence[int]) -> None:
    costs = (">forward", ">backward", ">busy", ">peak memory", ">receives")
    shown = table("Stages", "device", "from", "to", ">parameters", *costs)
    for stage, predicted, peak_bytes in zip(plan.stages, plan.prediction.stages, peaks_bytes, strict=True):
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
            f"{size(peak_bytes)} of {size(problem.cluster.device(stage.device).memory_bytes)}",
            _received(crossing),
        )
    out = console()
    out.print(shown)
    out.print("Forward, backward and what is received: per microbatch. Busy: of the whole step.")
    out.print("Peak memory: parameters, gradients, optimiser state and activations, of what the device has.")
    out.print(f"Predicted step time: {seconds(plan.prediction.step_s)} with {microbatches(plan)}")
    for reason in plan.rationale:
        out.print(f"- {reason}", markup=False, soft_wrap=True)


def _received(crossing: dict[str, int]) -> str:
    if not crossing:
        return "the batch"
    return f"{len(crossing)} tensor{'s' * (len(crossing) > 1)}, {size(sum(crossing.values()))}"


def microbatches(plan: PartitionPlan) -> str:
    """How many, and in which order they run: ``8 microbatches (eager 1F1B)``; of replicas how many each."""
    from forescale.plan.partition_plan import replica_groups
    from forescale.plan.wording import SCHEDULE_NAMES, spell_microbatches

    groups = replica_groups(plan.stages)
    if len(groups) < len(plan.stages) and len(groups) > 1:
        return f"microbatches: {spell_microbatches(plan)} ({SCHEDULE_NAMES[plan.schedule]})"
    if len(groups) < len(plan.stages):  # of one stage there is one order
        return f"{len(plan.stages)} replicas, microbatches {spell_microbatches(plan)}"

    if plan.microbatches == 1:
        return "1 microbatch"
    return f"{plan.microbatches} microbatches ({SCHEDULE_NAMES[plan.schedule]})"


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
