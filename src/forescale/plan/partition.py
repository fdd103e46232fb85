"""Splits a model over devices so that a training step is predicted to be shortest.

plan = partition(problem)
predict(problem, plan.stages, plan.microbatches, plan.schedule)  # the same, for any split
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from forescale.core.errors import InfeasiblePlan, InvalidInput
from forescale.plan.evaluation import INFEASIBLE, Evaluation, Mode, Pricing, by_device, evaluate
from forescale.plan.line import Line, cut
from forescale.plan.order import Atoms, gather_atoms, linear_orders
from forescale.plan.partition_plan import (
    PartitionPlan,
    Prediction,
    Schedule,
    Stage,
    StagePrediction,
    pipeline_positions,
)
from forescale.plan.problem import PartitionProblem
from forescale.plan.rationale import explain
from forescale.plan.replicas import check_replicas, check_turns
from forescale.plan.schedule import Layout
from forescale.plan.search import MOST_CHUNKS, Candidate, Search, choose
from forescale.plan.shard_costs import own_prediction, share_work
from forescale.plan.teams import make_teams, take_apart, team_problem
from forescale.plan.workload import Workload, tabulate

_FAR_FROM = 1.2
_WORTH_SPLITTING = 0.97
"""Shards meet dozens of times in a step, and each time all wait for what delays one of them."""


def partition(
    problem: PartitionProblem,
    *,
    devices_order: Sequence[str] | None = None,
    max_stages: int | None = None,
    max_replicas: int | None = None,
    max_shards: int | None = None,
    max_chunks: int | None = None,
    schedule: Schedule | None = None,
) -> PartitionPlan:
    """The split, devices, microbatch count and schedule with the shortest predicted step.

    Stages are intervals of several topological orders; a device without a stage stays idle if that is
    faster. A stage recomputes its forward only if it does not fit otherwise. Devices that each hold the whole
    model and share the microbatches (replicas) are considered too, unless its forward changes buffers.

    Args:
        devices_order: names of devices; stages follow this order, and devices not in it are left out.
        max_stages: at most this many stages, replicas included.
        max_replicas: at most this many devices hold the same stage; 1 asks for a pipeline.
        max_shards: at most this many devices split operators between them; 1 keeps operators whole.
        max_chunks: at most this many stages of one device, which take turns then (default: 4).
        schedule: fixes the schedule; all are tried otherwise.

    Raises:
        InfeasiblePlan: nothing fits the devices' memory, even with recomputation.
        InvalidInput: more devices than operators, or an unknown device.
    """
    workload = tabulate(problem)
    atoms = gather_atoms(problem.graph)
    order = None if devices_order is None else _positions(problem, devices_order)
    if order is not None and len(set(order)) < len(order):
        raise InvalidInput("a device is named twice in the order of devices")
    usable = len(problem.cluster.devices) if order is None else len(order)
    most_stages = usable if max_stages is None else min(max_stages, usable)
    _check_request(problem, atoms, most_stages)
    orders = linear_orders(problem.graph, atoms, problem.costs[workload.counts[0]].tensor_bytes)
    search = Search(
        workload=workload,
        pricing=Pricing.of(problem),
        lines=[_lay_out(workload, atoms, atom_order) for atom_order in orders],
        schedules=_schedules(problem) if schedule is None else (schedule,),
        order=order,
    )
    most_replicas = most_stages if max_replicas is None else min(max_replicas, most_stages)
    candidates = search.run(most_stages, most_replicas, MOST_CHUNKS if max_chunks is None else max_chunks)
    best = choose(candidates)
    most_shards = most_stages if max_shards is None else min(max_shards, most_stages)
    most_shards = most_shards if problem.shardable else 1
    split = _best_in_shards(search, most_stages, most_replicas, most_shards, best.score)
    if split is not None and split.prediction.step_s < best.score * _WORTH_SPLITTING:
        return explain(problem, split, candidates, None, split)
    evaluation = _evaluate(search, best)
    if best.score >= INFEASIBLE:
        raise _infeasible(search, best, evaluation)
    plan = PartitionPlan(
        stages=_stages(search, best, evaluation),
        microbatches=best.mode.microbatches,
        schedule=best.mode.schedule,
        prediction=_prediction(evaluation),
    )
    return explain(problem, plan, candidates, _even_step_s(search, best), split)


def _best_in_shards(
    search: Search, most_stages: int, most_replicas: int, most_shards: int, score: float
) -> PartitionPlan | None:
    """The best plan in which teams of devices split operators between them, None if there is none that fits.

    Args:
        score: of the best plan without; what is predicted to be far from it is not looked at closely.
    """
    workload, pricing, problem = search.workload, search.pricing, search.workload.problem
    slowness_D = (workload.forward_s_CDO + workload.backward_s_CDO)[0].sum(axis=1)
    devices = np.argsort(slowness_D, kind="stable").tolist() if search.order is None else list(search.order)
    found: list[PartitionPlan] = []
    for teams in make_teams(workload, devices[:most_stages], most_shards):
        asked = team_problem(workload, pricing, teams)
        work = tabulate(asked)
        lines = [Line(work, line.position_O[:-1].tolist(), line.length) for line in search.lines]
        order = None if search.order is None else tuple(range(len(teams)))
        within = Search(
            workload=work, pricing=Pricing.of(asked), lines=lines, schedules=search.schedules, order=order
        )
        alike = len({team.weights for team in teams}) == 1
        best = choose(within.run(len(teams), min(most_replicas, len(teams)) if alike else 1, 1))
        if best.score > score * _FAR_FROM:
            continue
        stages = take_apart(problem, _stages(within, best, _evaluate(within, best)), teams)
        plan = _fitting(problem, stages, best.mode)
        if plan is not None and any(stage.shard for stage in plan.stages):
            found.append(plan)
    return min(found, key=lambda plan: plan.prediction.step_s, default=None)


def _fitting(problem: PartitionProblem, stages: Sequence[Stage], mode: Mode) -> PartitionPlan | None:
    """The plan with these stages, which recompute if they do not fit otherwise; None if that is no help."""
    again = tuple(replace(stage, recompute=True) for stage in stages)
    for tried in dict.fromkeys((tuple(stages), again)):
        prediction = predict(problem, tried, mode.microbatches, mode.schedule)
        if all(
            predicted.memory_bytes <= problem.cluster.device(stage.device).memory_bytes
            for stage, predicted in zip(tried, prediction.stages, strict=True)
        ):
            return PartitionPlan(
                stages=tried, microbatches=mode.microbatches, schedule=mode.schedule, prediction=prediction
            )
    return None


def predict(
    problem: PartitionProblem, stages: Sequence[Stage], microbatches: int, schedule: Schedule
) -> Prediction:
    """What a step of any given split is predicted to take; stages recompute as they say.

    Raises:
        InvalidInput: not a split of this graph over this cluster, or an unknown microbatch count.
    """
    workload = tabulate(problem)
    devices = _positions(problem, [stage.device for stage in stages])
    check_replicas(problem.graph, stages)
    check_turns(stages, schedule)
    layout = Layout.of(stages, microbatches)
    if microbatches not in workload.counts:
        known = ", ".join(map(str, workload.counts))
        raise InvalidInput(f"no costs are known for {microbatches} microbatches, only for {known}")
    stage_of = _stage_of(problem, stages)
    length, pricing = layout.positions_S[-1] + 1, Pricing.of(problem)
    line, choice = Line(workload, stage_of, length), workload.counts.index(microbatches)
    splits = cut([line], [np.array([*range(length), length + 1])[:, None]], layout.positions_S)
    mode = Mode(choice=choice, layout=layout, schedule=schedule)
    devices_S1, recompute_S1 = np.array(devices)[:, None], np.array([s.recompute for s in stages])[:, None]
    if not any(stage.shard for stage in stages):
        return _prediction(evaluate(pricing, splits, devices_S1, mode, recompute_S1))
    found = share_work(pricing, line, splits, stages, devices, choice)
    prediction = _prediction(evaluate(pricing, found.splits, devices_S1, mode, recompute_S1))
    own = [
        own_prediction(found, predicted, stage, (choice, device, index), len(layout.runs_S[index]))
        for index, (predicted, stage, device) in enumerate(
            zip(prediction.stages, stages, devices, strict=True)
        )
    ]
    return replace(prediction, stages=tuple(own))


def _positions(problem: PartitionProblem, names: Sequence[str]) -> tuple[int, ...]:
    known = [device.name for device in problem.cluster.devices]
    if unknown := [name for name in names if name not in known]:
        raise InvalidInput(f"unknown device {unknown[0]!r}; the cluster has {', '.join(known)}")
    return tuple(known.index(name) for name in names)


def _check_request(problem: PartitionProblem, atoms: Atoms, most_stages: int) -> None:
    if most_stages < 1 or not problem.costs:
        raise InvalidInput("a plan needs at least one device, one stage and one microbatch count")
    if most_stages > len(atoms.members):
        raise InvalidInput(
            f"{most_stages} devices are more than the {len(atoms.members)} operators that can be on devices "
            f"of their own; ask for at most {len(atoms.members)}"
        )


def _stage_of(problem: PartitionProblem, stages: Sequence[Stage]) -> list[int]:
    """The place in the pipeline of every operator, checked to be a split."""
    placed = dict(zip(pipeline_positions(stages), stages, strict=True))  # one of each stage's replicas
    stage_of = {operator: place for place, stage in placed.items() for operator in stage.operators}
    count = len(problem.graph.operators)
    if sum(len(stage.operators) for stage in placed.values()) != count or stage_of.keys() != set(
        range(count)
    ):
        raise InvalidInput(f"the stages must hold each of the graph's {count} operators exactly once")
    if not all(stage.operators for stage in stages):
        raise InvalidInput("a stage without operators; leave it out")
    for operator, predecessors in enumerate(problem.graph.predecessors):
        if any(stage_of[predecessor] > stage_of[operator] for predecessor in predecessors):
            name = problem.graph.operators[operator].name
            raise InvalidInput(f"operator {name} would need a tensor from a later stage")
    return [stage_of[operator] for operator in range(count)]


def _schedules(problem: PartitionProblem) -> tuple[Schedule, ...]:
    """All, but zero-bubble only if gradients of parameters can be computed apart."""
    split = any(costs.weight_s_DO.any() for costs in problem.costs.values())
    return tuple(schedule for schedule in Schedule if split or schedule is not Schedule.ZERO_BUBBLE)


def _lay_out(workload: Workload, atoms: Atoms, order: Sequence[int]) -> Line:
    position = {atom: index for index, atom in enumerate(order)}
    return Line(workload, [position[atom] for atom in atoms.atom_of], len(order))


def _evaluate(search: Search, candidate: Candidate) -> Evaluation:
    bounds_B1, positions_S = np.array(candidate.bounds)[:, None], candidate.mode.layout.positions_S
    splits = cut([search.lines[candidate.line]], [bounds_B1], positions_S)
    return evaluate(search.pricing, splits, np.array(candidate.devices)[:, None], candidate.mode)


def _even_step_s(search: Search, best: Candidate) -> float | None:
    """Seconds of the same pipeline cut into equal numbers of operators, None if that does not fit."""
    stages = len(best.bounds) - 1
    if stages == 1:
        return None
    line = search.lines[best.line]
    counts = np.searchsorted(np.sort(line.position_O[:-1]), np.arange(line.length))
    shares = np.arange(1, stages) / stages
    cuts = np.searchsorted(counts, shares * (len(line.position_O) - 1)).clip(1, line.length - 1)
    bounds = np.array([0, *cuts.tolist(), line.length + 1])
    if (np.diff(bounds) < 1).any():
        return None
    splits = cut([line], [bounds[:, None]], best.mode.layout.positions_S)
    score = float(evaluate(search.pricing, splits, np.array(best.devices)[:, None], best.mode).score_N[0])
    return score if score < INFEASIBLE else None


def _stages(search: Search, candidate: Candidate, evaluation: Evaluation) -> tuple[Stage, ...]:
    devices = search.pricing.problem.cluster.devices
    position_O = search.lines[candidate.line].position_O[:-1]
    place_O = np.searchsorted(np.array(candidate.bounds[1:-1]), position_O, side="right")
    layout = candidate.mode.layout
    return tuple(
        Stage(
            device=devices[device].name,
            operators=tuple(np.flatnonzero(place_O == place).tolist()),
            recompute=bool(evaluation.recompute_SN[stage, 0]),
            share=len(layout.runs_S[stage]) if layout.positions_S.count(place) > 1 else 1,
        )
        for stage, (device, place) in enumerate(zip(candidate.devices, layout.positions_S, strict=True))
    )


def _prediction(evaluation: Evaluation) -> Prediction:
    """Of the only candidate."""
    times = evaluation.times
    return Prediction(
        step_s=float(evaluation.step_s_N[0]),
        stages=tuple(
            StagePrediction(
                forward_s=float(times.forward_s_SN[stage, 0]),
                backward_s=float(times.backward_s_SN[stage, 0] + times.weight_s_SN[stage, 0]),
                transfer_s=float(evaluation.transfer_s_SN[stage, 0]),
                optimizer_s=float(times.optimizer_s_SN[stage, 0]),
                busy_s=float(evaluation.busy_s_SN[stage, 0]),
                memory_bytes=round(float(evaluation.memory_bytes_SN[stage, 0])),
            )
            for stage in range(len(times.forward_s_SN))
        ),
    )


def _infeasible(search: Search, best: Candidate, evaluation: Evaluation) -> InfeasiblePlan:
    """The error for the split that misses the fewest bytes."""
    stage = int(evaluation.excess_bytes_SN[:, 0].argmax())
    device = search.pricing.problem.cluster.devices[best.devices[stage]]
    capacity_S = search.pricing.capacity_bytes_D[list(best.devices)]
    chunks = best.mode.layout.chunks
    fixed_S = by_device(evaluation.footprint.fixed_bytes_K, chunks)
    memory_S = by_device(evaluation.memory_bytes_SN[:, 0], chunks)
    share = float(((capacity_S - fixed_S) / (memory_S - fixed_S).clip(1)).min())
    needed_bytes = int(np.ceil(memory_S[stage]))
    ways = [f"{needed_bytes:,} bytes on {device.name}"]
    if share >= 0.01:
        ways.append(f"batches of at most {int(share * 100)}% of these rows")
    else:
        ways.append("more devices (parameters, gradients and optimiser state alone do not fit)")
    recomputing = ", with recomputation" if evaluation.recompute_SN.any() else ""
    how = f"{len(best.devices)} stages, {best.mode.microbatches} microbatches{recomputing}"
    return InfeasiblePlan(
        short_bytes=needed_bytes - device.memory_bytes,
        device=device.name,
        fits=f"{' or '.join(ways)} would fit ({how})",
    )
