"""``forescale plan``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forescale.cli import options, placement
from forescale.cli.console import console, print_json, table
from forescale.cli.measurement import measure_task, rate_task_file
from forescale.cli.output import check_writable, write_text
from forescale.cli.units import parse_size, percent, seconds, size
from forescale.core.errors import InvalidInput

if TYPE_CHECKING:
    from forescale.graph.model import ModelGraph
    from forescale.plan.partition_plan import PartitionPlan, Stage
    from forescale.plan.problem import PartitionProblem

Reference = Annotated[
    str,
    typer.Argument(
        metavar="FILE.py[:TASK]|GRAPH",
        help="Python file and the name of a forescale.TrainingTask in it, or a graph whose costs are given.",
    ),
]
Svg = Annotated[Path | None, typer.Option(metavar="OUT.svg", help="Also draw the plan to this file.")]
_GRAPHS = "Graphs"
GraphFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="device-placement, pipedream, piper or model; by default found out.",
        rich_help_panel=_GRAPHS,
    ),
]
Cluster = Annotated[
    Path | None,
    typer.Option(metavar="FILE.toml", help="Devices and links to plan for."),
]
Memory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory of each accelerator, as 4GB.", rich_help_panel=_GRAPHS),
]
Bandwidth = Annotated[
    float | None,
    typer.Option(
        min=0.0, metavar="B", help="Of a Piper graph: bytes per its unit of time.", rich_help_panel=_GRAPHS
    ),
]
Batch = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Of a captured model: the batch's sizes; repeatable.",
        rich_help_panel=_GRAPHS,
    ),
]
Contiguous = Annotated[
    bool,
    typer.Option(
        "--contiguous/--free",
        help="Whether each device holds an interval, or any nodes.",
        rich_help_panel=_GRAPHS,
    ),
]
Objective = Annotated[
    str,
    typer.Option(
        metavar="OBJECTIVE",
        help="throughput: the shortest longest load; latency: one sample through the graph.",
        rich_help_panel=_GRAPHS,
    ),
]
Certify = Annotated[
    bool,
    typer.Option("--certify", help="Prove how good it is, or find a better one.", rich_help_panel=_GRAPHS),
]
TimeLimit = Annotated[
    float | None,
    typer.Option(metavar="T", help="Longest time for --certify. Default: 30.", rich_help_panel=_GRAPHS),
]
Compare = Annotated[
    bool,
    typer.Option("--compare", help="Beside what other planners would do.", rich_help_panel=_GRAPHS),
]
Own = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.json",
        help="With --compare: your own placement, node to device, or what --json printed.",
        rich_help_panel=_GRAPHS,
    ),
]


def plan(  # noqa: PLR0913, PLR0917 - typer takes the options from the signature
    file: Reference,
    devices: options.Devices = None,
    svg: Svg = None,
    graph_format: GraphFormat = None,
    cluster: Cluster = None,
    memory: Memory = None,
    bandwidth: Bandwidth = None,
    batch: Batch = None,
    contiguous: Contiguous = True,
    objective: Objective = placement.THROUGHPUT,
    certify: Certify = False,
    time_limit_s: TimeLimit = None,
    compare: Compare = False,
    own: Own = None,
    json: options.Json = False,
) -> None:
    """Who would run what: the stages or devices, their predicted time and memory, and the reasons."""
    request = placement.GraphRequest(
        path=Path(file),
        graph_format=graph_format,
        cluster=cluster,
        devices=devices,
        memory_bytes=parse_size(memory) if memory is not None else None,
        bandwidth_bytes_per_time=bandwidth,
        batch=_sizes(batch or []),
        contiguous=contiguous,
        objective=objective,
        certify=certify,
        time_limit_s=time_limit_s,
        compare=compare,
        own=own,
        svg=svg,
        json=json,
    )
    if Path(file.partition(":")[0]).suffix != ".py":
        placement.place_graph(request)
        return
    if given := [option for option in request.graph_options if option != "--cluster"]:
        raise InvalidInput(f"{given[0]} is for graphs; a task is planned by its own batches, on this machine")
    if cluster is not None and devices is not None:
        raise InvalidInput("--cluster says which devices there are; leave out --devices")
    if svg is not None:
        check_writable(svg)
    if cluster is None:
        measured = measure_task(file, devices)
    else:
        measured = rate_task_file(file, placement.read_cluster_file(cluster))
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


def _sizes(given: Sequence[str]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for text in given:
        name, _, value = text.partition("=")
        if not name or not value.isdecimal():
            raise InvalidInput(f"--batch {text} is not NAME=VALUE with a whole number")
        sizes[name] = int(value)
    return sizes


def _as_json(problem: PartitionProblem, plan: PartitionPlan, peaks_bytes: Sequence[int]) -> dict[str, Any]:
    from forescale.plan.replicas import microbatch_counts

    stages = [
        {
            "device": stage.device,
            "operators": stage.operators,
            "modules": modules(problem.graph, stage),
            "parameters": parameters(problem.graph, stage),
            "recompute": stage.recompute,
            "shard": asdict(stage.shard) if stage.shard else None,
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
        part = f" (shard {stage.shard.index + 1} of {len(stage.shard.weights)})" if stage.shard else ""
        shown.add_row(
            stage.device + part,
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
    from forescale.plan.partition_plan import replica_groups, replicas
    from forescale.plan.wording import SCHEDULE_NAMES, spell_microbatches

    groups = [replicas(group) for group in replica_groups(plan.stages)]
    most = max(map(len, groups))
    if most > 1 and len(groups) > 1:
        return f"microbatches: {spell_microbatches(plan)} ({SCHEDULE_NAMES[plan.schedule]})"
    if most > 1:  # of one stage there is one order
        return f"{most} replicas, microbatches {spell_microbatches(plan)}"

    if plan.microbatches == 1:
        return "1 microbatch"
    return f"{plan.microbatches} microbatches ({SCHEDULE_NAMES[plan.schedule]})"


def modules(graph: ModelGraph, stage: Stage) -> list[str]:
    """Paths of the modules whose operators a stage runs, in the order they begin."""
    return list(dict.fromkeys(graph.operators[index].module_path or "(model)" for index in stage.operators))


def parameters(graph: ModelGraph, stage: Stage) -> int:
    """Numbers in the parameters a stage holds; tied ones count on every stage that holds them."""
    from math import prod

    from forescale.plan.sharded import sharded

    shard = sharded(graph, stage)
    if shard is not None:
        return sum(prod(parameter.shape) for parameter in shard.graph.parameters.values())
    held = {name for index in stage.operators for name in graph.operators[index].parameters}
    return sum(prod(graph.parameters[name].shape) for name in held)


def received_bytes(problem: PartitionProblem, plan: PartitionPlan, stage: Stage) -> dict[str, int]:
    """Tensors a stage takes from earlier ones, with the bytes of one microbatch."""
    graph, own = problem.graph, set(stage.operators)
    read = dict.fromkeys(name for index in stage.operators for name in graph.operators[index].inputs)
    size_bytes = problem.costs[plan.microbatches].tensor_bytes
    return {n: size_bytes[n] for n in read if graph.tensors[n].producer not in own | {None}}
