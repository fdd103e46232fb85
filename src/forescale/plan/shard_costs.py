"""What the shards of a stage cost: each its part of the work and of the memory, and what they exchange.

The shards of a replica meet wherever they exchange tensors, so all take as long as the slowest. Sums and
gathers go directly from each to each: of a sum every shard adds up one part and sends it to the others
(Patarasuk and Yuan, *Bandwidth Optimal All-reduce Algorithms*, 2009, without their ring).

Axes as in :mod:`forescale.plan.line`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from forescale.graph.model import ModelGraph
from forescale.graph.sharding import Sharded
from forescale.graph.size import evaluate, tensor_bytes
from forescale.plan.evaluation import Pricing
from forescale.plan.line import Line, Spans, Splits
from forescale.plan.partition_plan import Stage, StagePrediction, replica_groups, replicas
from forescale.plan.problem import Array, PartitionProblem
from forescale.plan.schedule import Layout
from forescale.plan.sharded import sharded
from forescale.plan.workload import Workload, kept_storages


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Shards give each other their parts of a tensor, or sum it up.

    Attributes:
        operator: of the whole graph, beside which it happens.
        backward: whether it happens in the backward.
        bytes_C: size of the whole tensor.
    """

    operator: int
    backward: bool
    sums: bool
    bytes_C: Array

    @property
    def turns(self) -> int:
        """Messages from each to each, if more than two; two exchange all they have of a sum at once."""
        return 2 if self.sums else 1


def exchanges(workload: Workload, shard: Sharded) -> Iterator[Exchange]:
    """What a shard exchanges with the others for one microbatch."""
    known = [origin for origin in shard.origin_O if origin >= 0]
    before = known[0]
    for operator, origin in zip(shard.graph.operators, shard.origin_O, strict=True):
        before = origin if origin >= 0 else before
        _, _, kind = operator.target.partition("collective:")
        if kind in ("spread", "total", "gather"):  # parts are taken of what needs no gradient
            ((name, what),) = operator.args[0].items()
            size_C = _size_bytes_C(workload, name, what.partition("@")[0])
            yield Exchange(operator=before, backward=kind == "spread", sums=kind != "gather", bytes_C=size_C)


def _size_bytes_C(workload: Workload, kind: str, name: str) -> Array:
    problem = workload.problem
    if kind == "tensor":
        return np.array([float(problem.costs[count].tensor_bytes[name]) for count in workload.counts])
    parameter = problem.graph.parameters[name]
    return np.full(len(workload.counts), float(evaluate(tensor_bytes(parameter.shape, parameter.dtype), {})))


def exchange_s_C(pricing: Pricing, devices: Sequence[int], made: Sequence[Exchange], counts: int) -> Array:
    """Seconds that shards on these devices spend on exchanges, for every microbatch count."""
    parts = len(devices)
    turns = sum(exchange.turns if parts > 2 else 1 for exchange in made)
    bytes_C = np.sum([(2 if e.sums else 1) * e.bytes_C / parts for e in made] or [np.zeros(counts)], axis=0)
    pairs = np.ix_(devices, devices)
    others = ~np.eye(parts, dtype=bool)
    # As for gradients: only a link beside the devices does both ways at once.
    each_C = turns * pricing.latency_s_DD[pairs] + bytes_C[:, None, None] * pricing.unit_s_DD[pairs]
    spent_s_C = (each_C * (1 + pricing.occupies_DD[pairs]) * others).sum(axis=2).max(axis=1)
    return spent_s_C + turns * pricing.delay_s_DD[pairs].max()


def fractions(shard: Sharded, operators: int) -> Array:
    """Which part of each operator's work a shard does, shape (O,)."""
    fraction_O = np.ones(operators)
    for origin, fraction in zip(shard.origin_O, shard.fraction_O, strict=True):
        if origin >= 0:
            fraction_O[origin] = fraction
    return fraction_O


def taken(problem: PartitionProblem, fraction_O: Array) -> Array:
    """Which part of each operator's seconds such fractions of its work take, shape (D, O)."""
    if problem.unsplit_DO is None:
        return np.broadcast_to(fraction_O, (len(problem.cluster.devices), len(fraction_O)))
    return problem.unsplit_DO + (1 - problem.unsplit_DO) * fraction_O


def part_of(workload: Workload, shard: Sharded) -> Workload:
    """The costs with a shard's part of its operators' work, their parameters and what they save."""
    graph = workload.problem.graph
    fraction_O = fractions(shard, workload.loss)
    with_loss_O = np.append(fraction_O, 1.0)
    fraction_R = [_saved_fraction(graph, index, shard, fraction_O) for index in kept_storages(graph)]
    held = {name: (part.stop - part.start) / part.units for name, part in shard.slices.items()}
    parameters_I = np.array([held.get(name, 1.0) for name in graph.parameters])
    taken_DO = np.pad(taken(workload.problem, fraction_O), ((0, 0), (0, 1)), constant_values=1.0)
    scaled = {
        field.name: getattr(workload, field.name) * (taken_DO if field.name.endswith("_CDO") else with_loss_O)
        for field in fields(workload)
        if field.name.endswith(("_CDO", "_CO"))
    }
    return replace(
        workload,
        **scaled,
        saved_bytes_CI=workload.saved_bytes_CI * np.array([*fraction_R, 1.0]),
        parameter_bytes_I=workload.parameter_bytes_I * parameters_I,
        trainable_bytes_I=workload.trainable_bytes_I * parameters_I,
        buffer_bytes_I=workload.buffer_bytes_I * np.array([held.get(name, 1.0) for name in graph.buffers]),
    )


def _saved_fraction(graph: ModelGraph, storage: int, shard: Sharded, fraction_O: Array) -> float:
    saved = graph.saved[storage]
    tensor = graph.tensors.get(saved.name)
    if tensor is None or tensor.producer is None:
        return float(fraction_O[min(saved.operators)])
    parted = f"{saved.name}@part" in shard.graph.tensors and saved.name not in shard.graph.tensors
    return float(fraction_O[tensor.producer]) if parted else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedSplits:
    """A split in which some stages are shards.

    Attributes:
        splits: its costs, the shards of a replica taking as long as the slowest, exchanges included.
        own: the costs of every stage without the others.
        exchange_s_PS: seconds of a microbatch's exchanges (P = forward, backward).
    """

    splits: Splits
    own: Spans
    exchange_s_PS: Array


def share_work(
    pricing: Pricing, line: Line, splits: Splits, stages: Sequence[Stage], devices: Sequence[int], choice: int
) -> ShardedSplits:
    """The costs of the only candidate in ``splits`` where its stages are the shards that they say.

    Args:
        stages: one position on the line for each group; ``devices``: their positions on axis D.
        choice: position of the microbatch count on axis C.
    """
    workload, graph = line.workload, line.workload.problem.graph
    shards = [sharded(graph, stage) for stage in stages]
    position_O = line.position_O[:-1].tolist()
    lines = [Line(part_of(workload, s), position_O, line.length) if s else line for s in shards]
    places = Layout.of(stages, 1).positions_S
    bounds_BN = splits.bounds_BN
    spans = [lines[s].spans(bounds_BN[place], bounds_BN[place + 1]) for s, place in enumerate(places)]
    own = joined(spans)
    together = joined(spans)
    exchange_s_PS = np.zeros((2, len(stages)))
    first = 0
    for replica in (r for group in replica_groups(stages) for r in replicas(group)):
        team = list(range(first, first + len(replica)))
        first += len(replica)
        if (shard := shards[team[0]]) is None:
            continue
        on = [devices[stage] for stage in team]
        for name in (f.name for f in fields(Spans) if f.name.endswith("_CDK")):
            seconds_CDK = getattr(together, name)
            seconds_CDK[:, on, team] = seconds_CDK[:, on, team].max(axis=1, keepdims=True)
        made = list(exchanges(workload, shard))
        for backward, *taking in (
            (False, together.forward_s_CDK),
            (True, together.backward_s_CDK, together.input_s_CDK),
        ):
            kind = [exchange for exchange in made if exchange.backward == backward]
            spent_s_C = exchange_s_C(pricing, on, kind, len(workload.counts))
            for seconds_CDK in taking:
                seconds_CDK[:, on, team] += spent_s_C[:, None]
            exchange_s_PS[int(backward), team] = spent_s_C[choice]
    sends_S1 = np.array([stage.shard is None or stage.shard.index == 0 for stage in stages])[:, None, None]
    return ShardedSplits(
        splits=replace(
            splits,
            spans=together,
            bytes_CSSN=splits.bytes_CSSN * sends_S1,
            messages_SSN=splits.messages_SSN * sends_S1,
            summed_bytes_SSN=_summed_bytes(splits, stages, places, own.trainable_bytes_K),
        ),
        own=own,
        exchange_s_PS=exchange_s_PS,
    )


def _summed_bytes(
    splits: Splits, stages: Sequence[Stage], places: Sequence[int], trainable_bytes_K: Array
) -> Array:
    """Gradients that stages sum: of replicas, each shard with those that have the same part."""
    summed_bytes_SSN = splits.summed_bytes_SSN.copy()
    for a, (one, place) in enumerate(zip(stages, places, strict=True)):
        for b, (other, at) in enumerate(zip(stages, places, strict=True)):
            if place == at and a != b and one.shard is not None and other.shard is not None:
                alike = one.shard.index == other.shard.index
                part = trainable_bytes_K[a] / max(splits.spans.trainable_bytes_K[a], 1)
                summed_bytes_SSN[a, b] *= alike * part * len(one.shard.weights)  # as many times fewer holders
    return summed_bytes_SSN


def own_prediction(
    found: ShardedSplits, predicted: StagePrediction, stage: Stage, place: tuple[int, int, int], runs: int
) -> StagePrediction:
    """What a stage itself does: without waiting for the other shards, and exchanges apart.

    Args:
        place: the stage's position on axes C, D and K; ``runs``: the microbatches it runs.
    """
    own, together = found.own, found.splits.spans
    forward_s = float((own.forward_s_CDK - together.forward_s_CDK)[place])
    backward_s = float((own.backward_s_CDK - together.backward_s_CDK)[place]) + stage.recompute * forward_s
    exchange_s = found.exchange_s_PS[:, place[2]].tolist()
    return replace(
        predicted,
        forward_s=predicted.forward_s + forward_s,
        backward_s=predicted.backward_s + backward_s,
        transfer_s=predicted.transfer_s + runs * (exchange_s[0] * (1 + stage.recompute) + exchange_s[1]),
        busy_s=predicted.busy_s + runs * (forward_s + backward_s),
    )


def joined(spans: Sequence[Spans]) -> Spans:
    """One after the other along axis K."""
    return Spans(
        **{f.name: np.concatenate([getattr(s, f.name) for s in spans], axis=-1) for f in fields(Spans)}
    )
