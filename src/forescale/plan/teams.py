"""Devices that run as one: each its shard of whatever the team runs.

A search over teams is one over devices: a team takes as long as its slowest shard and what the shards
exchange, and a plan of teams is taken apart into one of their devices.

Axes as in :mod:`forescale.plan.line`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import permutations
from math import gcd

import numpy as np

from forescale.core.cluster import Cluster
from forescale.graph.sharding import Sharded, shard_operators, share_units
from forescale.plan.evaluation import Pricing
from forescale.plan.partition_plan import Shard, Stage
from forescale.plan.problem import Array, MicrobatchCosts, PartitionProblem
from forescale.plan.shard_costs import exchange_s_C, exchanges, fractions, part_of, taken
from forescale.plan.workload import Workload

_MOST_TEAMS = 8
"""Larger teams are as good where there are more devices, and there are fewer ways to use them."""
_PARTS_PER_DEVICE = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """Devices, by position in the cluster, and the sizes of their shards; one alone has no shard."""

    devices: tuple[int, ...]
    shards: tuple[Sharded, ...] = ()
    weights: tuple[int, ...] = (1,)


def make_teams(workload: Workload, devices: Sequence[int], most_shards: int) -> Iterator[tuple[Team, ...]]:
    """Ways to put devices together, neighbours in this order; those that are left over are alone.

    Teams of which no operator is worth splitting are left out.
    """
    count = len(devices)
    for size in sorted({*range(2, 5), *(2**k for k in range(3, 10)), count}):
        full = count // size
        if not (2 <= size <= most_shards and 1 <= full <= _MOST_TEAMS):
            continue
        teams = [_team(workload, tuple(devices[k * size : (k + 1) * size])) for k in range(full)]
        if all(team is not None for team in teams):
            alone = [Team(devices=(device,)) for device in devices[full * size :]]
            yield (*(team for team in teams if team is not None), *alone)


def _team(workload: Workload, devices: tuple[int, ...]) -> Team | None:
    graph = workload.problem.graph
    operators, parts = range(len(graph.operators)), len(devices)
    even = shard_operators(graph, operators, 0, (1,) * parts, graph.outputs)
    if not even.slices:
        return None
    weights = _weights(workload, devices, even)
    shards = tuple(shard_operators(graph, operators, k, weights, graph.outputs) for k in range(parts))
    return Team(devices=devices, shards=shards, weights=weights)


def _weights(workload: Workload, devices: Sequence[int], even: Sharded) -> tuple[int, ...]:
    """Sizes of shards that take equally long, with what every shard does whole."""
    units_O = np.ones(workload.loss + 1, dtype=int)
    for origin, units in zip(even.origin_O, even.units_O, strict=True):
        units_O[origin] = units if origin >= 0 else units_O[origin]
    read, on = workload.parameters, list(devices)
    trained_bytes_O = np.bincount(
        read.operator_E, workload.trainable_bytes_I[read.item_E], minlength=workload.loss + 1
    )
    # Of a whole step: the microbatches, and the update of what operators read.
    seconds_DO = workload.counts[0] * (workload.forward_s_CDO + workload.backward_s_CDO)[0][on]
    # Of operators that are split, that of an endless number of shards.
    unsplit_DO = np.pad(taken(workload.problem, (units_O[:-1] == 1) * 1.0)[on], ((0, 0), (0, 1)))
    whole_s_D = (seconds_DO * unsplit_DO).sum(axis=1)
    seconds_DO = (1 - unsplit_DO) * seconds_DO
    seconds_DO = seconds_DO + workload.problem.optimizer_s_per_byte_D[on, None] * trained_bytes_O
    kinds_U = sorted({1, *units_O.tolist()})
    seconds_UD = np.stack([seconds_DO[:, units_O == units].sum(axis=1) for units in kinds_U])
    seconds_UD[0] += whole_s_D

    def slowest_s(sizes: tuple[int, ...]) -> float:
        parts = [np.diff(share_units(units, sizes)) / units for units in kinds_U[1:]]
        return float(
            (seconds_UD[0] + (seconds_UD[1:] * np.reshape(parts, (-1, len(sizes)))).sum(axis=0)).max()
        )

    best = (_PARTS_PER_DEVICE,) * len(devices)
    if (seconds_UD == seconds_UD[:, :1]).all():
        return (1,) * len(devices)
    while (better := min(_moved(best), key=slowest_s)) and slowest_s(better) < slowest_s(best):
        best = better
    return tuple(size // gcd(*best) for size in best)


def _moved(sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The same with some of one shard's size given to another."""
    for giver, taker in permutations(range(len(sizes)), 2):
        for size in range(1, sizes[giver]):
            moved = list(sizes)
            moved[giver], moved[taker] = sizes[giver] - size, sizes[taker] + size
            yield tuple(moved)


def team_problem(workload: Workload, pricing: Pricing, teams: Sequence[Team]) -> PartitionProblem:
    """The same question asked of teams; their names are those of their first devices."""
    problem = workload.problem
    devices = problem.cluster.devices
    firsts = [devices[team.devices[0]] for team in teams]
    capacity_bytes_T = [_capacity_bytes(workload, pricing, team) for team in teams]
    names = {device.name for device in firsts}
    return replace(
        problem,
        unsplit_DO=None,
        cluster=Cluster(
            devices=tuple(
                replace(device, memory_bytes=int(size))
                for device, size in zip(firsts, capacity_bytes_T, strict=True)
            ),
            default_link=problem.cluster.default_link,
            links={ends: link for ends, link in problem.cluster.links.items() if names.issuperset(ends)},
        ),
        costs={
            count: _team_costs(workload, pricing, teams, choice)
            for choice, count in enumerate(workload.counts)
        },
        optimizer_s_per_byte_D=np.array(
            [
                (problem.optimizer_s_per_byte_D[list(team.devices)] * _held(workload, team)).max()
                for team in teams
            ]
        ),
    )


def take_apart(
    problem: PartitionProblem, stages: Sequence[Stage], teams: Sequence[Team]
) -> tuple[Stage, ...]:
    """The stages of a plan of teams on the teams' devices."""
    devices = problem.cluster.devices
    by_name = {devices[team.devices[0]].name: team for team in teams}
    return tuple(
        replace(
            stage,
            device=devices[device].name,
            shard=Shard(index=index, weights=team.weights) if team.shards else None,
        )
        for stage in stages
        for team in [by_name[stage.device]]
        for index, device in enumerate(team.devices)
    )


def _held(workload: Workload, team: Team) -> list[float]:
    """Which part of the trained parameters each device holds."""
    whole = max(float(workload.trainable_bytes_I.sum()), 1.0)
    return [float(part_of(workload, s).trainable_bytes_I.sum()) / whole for s in team.shards] or [1.0]


def _capacity_bytes(workload: Workload, pricing: Pricing, team: Team) -> float:
    """Size of a device that could hold as much of the whole model as the team can of its shards."""
    capacity_bytes_D = pricing.capacity_bytes_D[list(team.devices)]
    ratio = workload.problem.optimizer_state_ratio

    def needed_bytes(work: Workload) -> float:
        state = work.parameter_bytes_I.sum() + (1 + ratio) * work.trainable_bytes_I.sum()
        return float(state + work.buffer_bytes_I.sum() + work.saved_bytes_CI[0].sum())

    whole = needed_bytes(workload)
    parts = [needed_bytes(part_of(workload, shard)) / max(whole, 1.0) for shard in team.shards] or [1.0]
    return float((capacity_bytes_D / parts).min())


def _team_costs(workload: Workload, pricing: Pricing, teams: Sequence[Team], choice: int) -> MicrobatchCosts:
    problem = workload.problem
    costs = problem.costs[workload.counts[choice]]
    found: dict[str, Array] = {}
    for name in (field.name for field in fields(costs)):
        value = getattr(costs, name)
        if name.endswith("_DO"):
            found[name] = np.stack([_slowest(problem, value, team) for team in teams])
        elif name.endswith("_D"):
            found[name] = np.array([value[list(team.devices)].max() for team in teams])
    for row, team in enumerate(teams):
        for exchange in exchanges(workload, team.shards[0]) if team.shards else ():
            spent_s = exchange_s_C(pricing, team.devices, [exchange], len(workload.counts))[choice]
            for name in ("backward_s_DO", "input_s_DO") if exchange.backward else ("forward_s_DO",):
                found[name][row, exchange.operator] += spent_s
    return replace(costs, **found)


def _slowest(problem: PartitionProblem, seconds_DO: Array, team: Team) -> Array:
    if not team.shards:
        return seconds_DO[team.devices[0]]
    spent_s_KO: list[Array] = []
    for device, shard in zip(team.devices, team.shards, strict=True):
        spent_s_KO.append(seconds_DO[device] * taken(problem, fractions(shard, seconds_DO.shape[1]))[device])
    return np.max(spent_s_KO, axis=0)
