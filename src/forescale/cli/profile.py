"""``forescale profile``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from forescale.cli import options
from forescale.cli.console import console, print_json, table
from forescale.cli.measurement import MeasuredTask, measure_task
from forescale.cli.units import percent, seconds, si, size

if TYPE_CHECKING:
    from forescale.plan.partition_plan import PartitionPlan, Prediction
    from forescale.profile.batches import BatchStatistics
    from forescale.profile.hardware import Suggestion
    from forescale.profile.summary import Bottleneck, ModuleCost

_SHOWN_MODULES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """One whole batch on the first device alone.

    Attributes:
        parameters: numbers in them, tied ones once.
        seconds_s: forward and backward, loss included.
        peak_memory_bytes: with gradients and optimiser state.
    """

    operators: int
    parameters: int
    parameter_bytes: int
    forward_flops: float
    backward_flops: float
    forward_bytes: float
    backward_bytes: float
    seconds_s: float
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpcomingBatch:
    """What a batch is predicted to cost under the plan; in ``devices`` order of its stages."""

    number: int
    binding: Mapping[str, int]
    step_s: float
    compute_s: tuple[float, ...]
    peak_memory_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Findings:
    totals: Totals
    modules: tuple[ModuleCost, ...]
    bottleneck: Bottleneck
    hardware: Suggestion
    batches: BatchStatistics
    plan: PartitionPlan
    upcoming: tuple[UpcomingBatch, ...]


def profile(file: options.TaskReference, devices: options.Devices = None, json: options.Json = False) -> None:
    """What a model costs: totals, the costliest modules, the bottleneck, the hardware it suggests.

    Also what the batches that come first are predicted to cost each device.
    """
    findings = _find(measure_task(file, devices))
    if json:
        print_json(_as_json(findings))
    else:
        _show(findings)


def _find(measured: MeasuredTask) -> _Findings:
    from forescale.control.planner import Planner
    from forescale.plan.partition import predict
    from forescale.plan.partition_plan import PartitionPlan, Schedule, Stage
    from forescale.profile.batches import batch_statistics, find_pad_id
    from forescale.profile.hardware import suggest_hardware
    from forescale.profile.summary import costliest_modules, find_bottleneck

    costs, binding, task = measured.costs, measured.bindings[0], measured.task
    model, device = costs.profile, costs.cluster.devices[0]
    planner = Planner(costs)
    everything = Stage(device=device.name, operators=tuple(range(len(model.graph.operators))))
    schedule = Schedule.ONE_F_ONE_B
    alone = PartitionPlan(
        stages=(everything,),
        microbatches=1,
        schedule=schedule,
        prediction=predict(planner.problem(binding, {}), (everything,), 1, schedule),
    )
    (needed_bytes,) = costs.peak_bytes(alone, binding)
    plan = planner.best(binding, {})
    return _Findings(
        totals=_totals(measured, alone.prediction, needed_bytes),
        modules=costliest_modules(model, binding, device),
        bottleneck=find_bottleneck(model, binding, device, needed_bytes=needed_bytes),
        hardware=suggest_hardware(
            model.work(binding),
            needed_bytes=needed_bytes,
            step_s=plan.prediction.step_s,
            half=task.autocast is not None,
        ),
        batches=batch_statistics(task.batches, limit=len(measured.bindings), pad_id=find_pad_id(task.model)),
        plan=plan,
        upcoming=tuple(
            UpcomingBatch(
                number=number,
                binding=binding,
                step_s=planner.prediction(plan, binding, {}).step_s,
                compute_s=planner.compute_s(plan, binding, {}),
                peak_memory_bytes=costs.peak_bytes(plan, binding),
            )
            for number, binding in enumerate(measured.bindings)
        ),
    )


def _totals(measured: MeasuredTask, alone: Prediction, peak_bytes: int) -> Totals:
    from math import prod

    from forescale.graph.size import evaluate, tensor_bytes

    model, binding = measured.costs.profile, measured.bindings[0]
    work, parameters = model.work(binding), model.graph.parameters.values()
    return Totals(
        operators=len(model.graph.operators),
        parameters=sum(prod(parameter.shape) for parameter in parameters),
        parameter_bytes=sum(int(evaluate(tensor_bytes(p.shape, p.dtype), {})) for p in parameters),
        forward_flops=float(work.forward_flops_O.sum()),
        backward_flops=float(work.backward_flops_O.sum()),
        forward_bytes=float(work.forward_bytes_O.sum()),
        backward_bytes=float(work.backward_bytes_O.sum()),
        seconds_s=alone.stages[0].forward_s + alone.stages[0].backward_s,
        peak_memory_bytes=peak_bytes,
    )


def _as_json(findings: _Findings) -> dict[str, Any]:
    chosen = findings.hardware.chosen
    return {
        "totals": asdict(findings.totals),
        "modules": [asdict(module) for module in findings.modules],
        "bottleneck": asdict(findings.bottleneck),
        "hardware": {
            "chosen": chosen.hardware.name if chosen else None,
            "reason": findings.hardware.reason,
            "candidates": [asdict(candidate) for candidate in findings.hardware.candidates],
        },
        "batches": asdict(findings.batches),
        "devices": [stage.device for stage in findings.plan.stages],
        "upcoming": [asdict(batch) for batch in findings.upcoming],
    }


def _show(findings: _Findings) -> None:
    out = console()
    _show_totals(findings.totals)
    _show_modules(findings.modules)
    out.print(f"Bottleneck: {findings.bottleneck.limit} ({findings.bottleneck.reason})")
    out.print(f"Hardware: {findings.hardware.reason}\n")
    _show_batches(findings.batches)
    _show_upcoming(findings)


def _show_totals(totals: Totals) -> None:
    shown = table("One batch on one device", "", ">")
    shown.add_row("operators", f"{totals.operators:,}")
    shown.add_row("parameters", f"{totals.parameters:,} ({size(totals.parameter_bytes)})")
    shown.add_row("forward", f"{si(totals.forward_flops, 'FLOP')}, {size(totals.forward_bytes)} moved")
    shown.add_row("backward", f"{si(totals.backward_flops, 'FLOP')}, {size(totals.backward_bytes)} moved")
    shown.add_row("forward and backward", seconds(totals.seconds_s))
    shown.add_row("peak memory, optimiser included", size(totals.peak_memory_bytes))
    console().print(shown)


def _show_modules(found: Sequence[ModuleCost]) -> None:
    title = f"Costliest of {len(found)} modules"
    shown = table(title, "module", ">own time", ">forward", ">backward", ">work", ">parameters")
    for module in found[:_SHOWN_MODULES]:
        shown.add_row(
            module.path or "(model)",
            percent(module.fraction),
            seconds(module.forward_s),
            seconds(module.backward_s),
            si(module.flops, "FLOP"),
            size(module.parameter_bytes),
        )
    console().print(shown)


def _show_batches(found: BatchStatistics) -> None:
    padding = "unknown" if found.padded_fraction is None else percent(found.padded_fraction)
    shown = table(f"Batches that come first: {found.batches}", "part", "dtype", "smallest", "largest")
    for part in found.parts:
        shown.add_row(part.name, part.dtype, _shape(part.smallest), _shape(part.largest))
    console().print(shown)
    console().print(
        f"In all: {found.rows:,} rows, {found.tokens:,} tokens, {size(found.size_bytes)}, padding {padding}\n"
    )


def _shape(sizes: Sequence[int]) -> str:
    return " × ".join(map(str, sizes)) or "one number"


def _show_upcoming(findings: _Findings) -> None:
    """Neighbours that are predicted to cost the same share a row."""
    places = [stage.device for stage in findings.plan.stages]
    figures = [f">{figure} on {place}" for place in places for figure in ("compute", "peak memory")]
    shown = table("What each is predicted to take under the best plan", "batches", ">step", *figures)
    runs: list[list[UpcomingBatch]] = []
    for batch in findings.upcoming:
        if runs and runs[-1][0].binding == batch.binding:
            runs[-1].append(batch)
        else:
            runs.append([batch])
    for run in runs:
        first, last = run[0], run[-1]
        numbers = str(first.number) if first is last else f"{first.number} to {last.number}"
        cells = [
            cell
            for compute_s, peak_bytes in zip(first.compute_s, first.peak_memory_bytes, strict=True)
            for cell in (seconds(compute_s), size(peak_bytes))
        ]
        shown.add_row(numbers, seconds(first.step_s), *cells)
    console().print(shown)
