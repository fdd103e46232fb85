"""Says in words why a plan is as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from forescale.graph.model import ModelGraph, Parameter
from forescale.graph.size import evaluate, tensor_bytes
from forescale.plan.evaluation import INFEASIBLE
from forescale.plan.partition_plan import (
    PartitionPlan,
    Schedule,
    Stage,
    pipeline_positions,
    replica_groups,
    replicas,
    shards_with,
)
from forescale.plan.problem import PartitionProblem
from forescale.plan.replicas import microbatch_counts
from forescale.plan.search import Candidate
from forescale.plan.sharded import sharded
from forescale.plan.wording import SCHEDULE_NAMES, spell_bytes, spell_count, spell_places, spell_time


def explain(
    problem: PartitionProblem,
    plan: PartitionPlan,
    candidates: Sequence[Candidate],
    even_step_s: float | None,
    split: PartitionPlan | None = None,
) -> PartitionPlan:
    """The plan with its reasons.

    Args:
        candidates: the best found of every number of stages, microbatch count and schedule.
        even_step_s: the same pipeline's predicted step when every stage has as many operators.
        split: the best plan in which devices split operators, which may be the plan itself.
    """
    sentences = [
        _bottleneck(plan),
        *_replicas(problem, plan),
        *_shards(problem, plan),
        *_turns(plan),
        *_cuts(problem, plan),
        _microbatch_count(problem, plan, candidates),
        *_alternatives(plan, candidates, even_step_s, split),
        *_recomputation(plan),
        *_gradients_apart(problem, plan),
    ]
    return replace(plan, rationale=tuple(sentences))


def _bottleneck(plan: PartitionPlan) -> str:
    own_s: dict[str, list[float]] = {}
    for stage, predicted in zip(plan.stages, plan.prediction.stages, strict=True):
        own_s.setdefault(stage.device, []).append(predicted.busy_s)
    busy_s, place = max((sum(stages_s), place) for place, stages_s in enumerate(own_s.values()))
    step_s, device = plan.prediction.step_s, plan.stages[place].device
    where = f"stage {place} on {device}" if len(own_s[device]) == 1 else device
    share = f"{_ratio(busy_s, step_s):.0%}"
    return f"A step is predicted to take {spell_time(step_s)}; {where} is the bottleneck, busy {share} of it."


def _replicas(problem: PartitionProblem, plan: PartitionPlan) -> list[str]:
    """Of every stage that several devices hold, how they share the microbatches and what that costs."""
    graph, groups, sentences = problem.graph, replica_groups(plan.stages), list[str]()
    for group in groups:
        teams = replicas(group)
        if len(teams) == 1:
            continue
        held = {p for o in group[0].operators for p in graph.operators[o].parameters}
        trained = [p for name in held if (p := graph.parameters[name]).trainable]
        size_bytes = sum(evaluate(tensor_bytes(p.shape, p.dtype), {}) for p in trained)
        counts = [microbatch_counts(plan)[plan.stages.index(team[0])] for team in teams]
        what = "the whole model" if len(groups) == 1 else f"stage {plan.stages.index(group[0])}"
        places = ", ".join(" + ".join(stage.device for stage in team) for team in teams)
        sentences.append(
            f"{len(teams)} replicas of {what}, on {places}, share the "
            f"microbatches {' + '.join(map(str, counts))}; at the end of a step they sum their gradients of "
            f"{spell_bytes(size_bytes)}."
        )
    return sentences


def _shards(problem: PartitionProblem, plan: PartitionPlan) -> list[str]:
    """Of every stage that several devices split between them, what each has of it and what that costs."""
    graph, sentences = problem.graph, list[str]()
    for stage, predicted in zip(plan.stages, plan.prediction.stages, strict=True):
        if (shard := sharded(graph, stage)) is None or stage.shard is None or stage.shard.index:
            continue
        team = shards_with(plan.stages, plan.stages.index(stage))
        split = sum(fraction < 1 for fraction in shard.fraction_O)
        whole = sum(evaluate(tensor_bytes(p.shape, p.dtype), {}) for p in _parameters(graph, stage))
        held = [
            sum(evaluate(tensor_bytes(p.shape, p.dtype), {}) for p in part.graph.parameters.values()) / whole
            for member in team
            if (part := sharded(graph, member))
        ]
        sentences.append(
            f"{' + '.join(member.device for member in team)} split {split} of {len(stage.operators)} "
            f"operators between them, {' : '.join(map(str, stage.shard.weights))}, and hold "
            f"{' + '.join(f'{part:.0%}' for part in held)} of the parameters; what they exchange takes "
            f"{spell_time(predicted.transfer_s)} of a step."
        )
    return sentences


def _parameters(graph: ModelGraph, stage: Stage) -> list[Parameter]:
    return [graph.parameters[n] for n in {n for o in stage.operators for n in graph.operators[o].parameters}]


def _turns(plan: PartitionPlan) -> list[str]:
    devices = list(dict.fromkeys(stage.device for stage in plan.stages))
    chunks = len(plan.stages) // len(devices)
    if chunks == 1:
        return []
    return [
        f"{' and '.join(devices)} take turns with {chunks} stages each, so that filling and draining take a "
        "smaller part of the step."
    ]


def _cuts(problem: PartitionProblem, plan: PartitionPlan) -> list[str]:
    operators, sentences = problem.graph.operators, list[str]()
    for index, (stage, following) in enumerate(zip(plan.stages[:-1], plan.stages[1:], strict=True)):
        if stage.operators == following.operators:  # replicas
            continue
        last, first = operators[stage.operators[-1]], operators[following.operators[0]]
        names = _sent(problem, plan, index)
        size_bytes = sum(problem.costs[plan.microbatches].tensor_bytes[name] for name in names)
        link = problem.cluster.link(stage.device, following.device)
        seconds = len(names) * link.latency_s + size_bytes / link.bandwidth_bytes_per_s
        how = "which both devices spend on it" if link.occupies_device else "beside the computation"
        leaves = "leaves" if len(names) == 1 else "leave"
        count, size = spell_count(len(names), "tensor"), spell_bytes(size_bytes)
        sentences.append(
            f"Stage {index} ends in {_place(last.module_path)} ({last.name}), stage {index + 1} begins in "
            f"{_place(first.module_path)} ({first.name}). Per microbatch {count} of {size} "
            f"{leaves} stage {index}, about {spell_time(seconds)} {how}, and their gradients come back."
        )
    return sentences


def _sent(problem: PartitionProblem, plan: PartitionPlan, stage: int) -> list[str]:
    """Tensors that leave a stage."""
    own = set(plan.stages[stage].operators)
    graph = problem.graph
    return [
        name
        for index in plan.stages[stage].operators
        for name in graph.operators[index].outputs
        if name is not None and (name in graph.outputs or not own.issuperset(graph.tensors[name].consumers))
    ]


def _microbatch_count(problem: PartitionProblem, plan: PartitionPlan, candidates: Sequence[Candidate]) -> str:
    chosen = f"{plan.microbatches} microbatches ({SCHEDULE_NAMES[plan.schedule]})"
    if plan.microbatches == 1:
        chosen = "1 microbatch"
    best: dict[int, float] = {}
    for candidate in candidates:
        count = candidate.mode.microbatches
        best[count] = min(candidate.score, best.get(count, candidate.score))
    others = [f"{_outcome(best[n])} with {n}" for n in sorted(problem.costs) if n != plan.microbatches]
    if not others or any(stage.shard for stage in plan.stages):
        return f"The batch is run as {chosen}{'' if others else ', the only choice given'}."
    return f"The batch is run as {chosen}; with other counts: {', '.join(others)}."


def _alternatives(
    plan: PartitionPlan,
    candidates: Sequence[Candidate],
    even_step_s: float | None,
    split: PartitionPlan | None,
) -> list[str]:
    step_s = plan.prediction.step_s
    found: dict[str, float] = {}
    for candidate in candidates:
        kind = _kind(candidate.mode.layout.positions_S, candidate.mode.layout.chunks)
        found[kind] = min(candidate.score, found.get(kind, candidate.score))
    chunks = len(plan.stages) // len({stage.device for stage in plan.stages})
    chosen = _kind(pipeline_positions(plan.stages), chunks) if plan is not split else ""
    tried = [f"{kind}: {_outcome(score)}" for kind, score in found.items() if kind != chosen]
    if split is not None and plan is not split:
        tried.append(f"operators split, {spell_places(split)}: {spell_time(split.prediction.step_s)}")
    if even_step_s is not None:
        times = _ratio(even_step_s, step_s)
        tried.append(f"as many operators on every stage: {_outcome(even_step_s)} ({times:.2f} times)")
    return [f"Alternatives: {'; '.join(tried)}."] if tried else []


def _recomputation(plan: PartitionPlan) -> list[str]:
    recomputing = [f"stage {index}" for index, stage in enumerate(plan.stages) if stage.recompute]
    return [f"To fit in memory, {' and '.join(recomputing)} runs its forward again."] if recomputing else []


def _gradients_apart(problem: PartitionProblem, plan: PartitionPlan) -> list[str]:
    if plan.schedule is not Schedule.ZERO_BUBBLE:
        return []
    costs, shares = problem.costs[plan.microbatches], list[str]()
    names = [device.name for device in problem.cluster.devices]
    for stage, predicted in zip(plan.stages, plan.prediction.stages, strict=True):
        apart_s = float(costs.weight_s_DO[names.index(stage.device), list(stage.operators)].sum())
        shares.append(f"{_ratio(apart_s, predicted.backward_s):.0%}")
    return [
        f"Of the backwards, {' + '.join(shares)} are gradients of parameters, which are computed when the "
        "next stage has nothing to hand over yet."
    ]


def _kind(positions: Sequence[int], chunks: int) -> str:
    """What a plan is in few words; replicas have equal positions."""
    if chunks > 1:
        return f"{chunks} stages on each of {len(positions) // chunks} devices"
    if len(positions) == 1:
        return "one device alone"
    if positions[-1] == 0:
        return f"{len(positions)} replicas"
    stages = f"{positions[-1] + 1} stages"
    return stages if len(set(positions)) == len(positions) else f"{stages} with replicas"


def _outcome(score: float) -> str:
    return spell_time(score) if score < INFEASIBLE else "does not fit in memory"


def _ratio(part: float, whole: float) -> float:
    """Of times; 1 if a step of a model that costs nothing takes none."""
    return part / whole if whole else 1.0


def _place(module_path: str) -> str:
    return f"`{module_path}`" if module_path else "the model itself"
