from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from chain_model import chain_graph
from forescale.graph.sharding import Slice
from forescale.plan.extents import WHOLE, Extent
from forescale.plan.moves import Holding, gathered, gradient_sums, holdings, moves, owners, transfers
from forescale.plan.partition_plan import PartitionPlan, Prediction, Schedule, Stage

OPERATORS = 8
GRAPH = chain_graph(OPERATORS)
NAME, SIDE = "p0", 256  # a parameter of GRAPH, SIDE x SIDE


@st.composite
def plans(draw: st.DrawFn) -> PartitionPlan:
    devices = draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True))
    cuts = draw(st.permutations(range(1, OPERATORS)))[: len(devices) - 1]
    bounds = [0, *sorted(cuts), OPERATORS]
    return PartitionPlan(
        stages=tuple(
            Stage(device=device, operators=tuple(range(start, end)))
            for device, start, end in zip(devices, bounds[:-1], bounds[1:], strict=True)
        ),
        microbatches=1,
        schedule=Schedule.GPIPE,
        prediction=Prediction(step_s=1.0, stages=()),
    )


@st.composite
def slicings(draw: st.DrawFn, count: int) -> list[Extent]:
    """The parts of so many shards, or the whole for each."""
    if count == 1 or draw(st.booleans()):
        return [WHOLE] * count
    outer, inner = draw(st.sampled_from([(1, 1), (1, 4), (2, 1), (4, 4)]))
    units = SIDE // (outer * inner)
    weights = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    bounds = [units * sum_ // sum(weights) for sum_ in accumulate(weights, initial=0)]
    axis = draw(st.integers(0, 1))
    return [
        Extent.of(Slice(axis=axis, outer=outer, units=units, inner=inner, start=start, stop=stop))
        for start, stop in pairwise(bounds)
    ]


@st.composite
def distributions(draw: st.DrawFn) -> tuple[Holding, ...]:
    """Who holds what of one parameter: replicas of one or more shards, split alike or not."""
    devices = draw(st.lists(st.sampled_from("abcdef"), min_size=1, unique=True))
    found: list[Holding] = []
    while len(found) < len(devices):
        left = devices[len(found) :]
        count = draw(st.integers(1, min(3, len(left))))
        parts = draw(slicings(count))
        replica = len({h.replica for h in found})
        found += [
            Holding(device=device, replica=replica, extent=part)
            for device, part in zip(left, parts, strict=False)
        ]
    return tuple(found)


def mask(extent: Extent) -> npt.NDArray[np.bool_]:
    """Which elements of the parameter are in it."""
    inside = np.ones((SIDE, SIDE), dtype=bool)
    for axis, spans in extent.axes:
        along = np.zeros(SIDE, dtype=bool)
        for start, stop in spans:
            along[start:stop] = True
        inside &= along[:, None] if axis == 0 else along[None, :]
    return inside


def union(extents: Sequence[Extent]) -> npt.NDArray[np.intp]:
    """How many of the extents each element is in."""
    return np.sum([np.zeros((SIDE, SIDE), dtype=int), *map(mask, extents)], axis=0)


@given(plans(), plans())
def test_carrying_out_the_moves_gives_every_holder_what_it_holds(
    before: PartitionPlan, after: PartitionPlan
) -> None:
    held = {(name, h.device) for name, holders in holdings(GRAPH, before).items() for h in holders}
    wanted = {(name, h.device) for name, holders in holdings(GRAPH, after).items() for h in holders}
    changes = moves(GRAPH, before, after)
    assert all((move.name, move.source) in held for move in changes)
    gained = {(move.name, move.target) for move in changes}
    assert len(gained) == len(changes)
    assert gained == wanted - held


@given(plans())
def test_every_parameter_has_an_owner(plan: PartitionPlan) -> None:
    assert all(holders for holders in holdings(GRAPH, plan).values())
    assert set(holdings(GRAPH, plan)) == set(GRAPH.parameters)


@given(distributions(), distributions())
def test_parts_are_sent_once_and_only_what_is_lacked(
    before: tuple[Holding, ...], after: tuple[Holding, ...]
) -> None:
    changes = transfers(GRAPH, {NAME: before}, {NAME: after})
    has = {h.device: mask(h.extent) for h in before}
    assert all((mask(move.extent) <= has[move.source]).all() for move in changes)
    nothing = np.zeros((SIDE, SIDE), dtype=bool)
    for holding in after:
        own = has.get(holding.device, nothing)
        arrived = union([move.extent for move in changes if move.target == holding.device])
        assert (arrived == (mask(holding.extent) & ~own)).all()


@given(distributions())
def test_owners_have_every_element_once(held: tuple[Holding, ...]) -> None:
    assert (union([owner.extent for owner in owners(held)]) == 1).all()
    (first,) = gathered({NAME: held})[NAME]
    assert (first.device, first.extent) == (held[0].device, WHOLE)


@given(distributions())
def test_gradients_of_every_element_are_added_up_once_per_replica(held: tuple[Holding, ...]) -> None:
    sums = gradient_sums({NAME: held})
    replicas = {h.replica for h in held}
    if len(replicas) == 1:
        assert sums == ()
        return
    for holding in held:
        mine = [one for one in sums if holding.device in one.devices]
        assert (union([one.extent for one in mine]) == mask(holding.extent)).all()
        for one in mine:
            adding = [h.replica for h in held if h.device in one.adding]
            assert sorted(adding) == sorted(replicas)
            assert all((mask(one.extent) <= mask(h.extent)).all() for h in held if h.device in one.devices)


@given(distributions(), st.data())
def test_where_a_part_lies_in_what_is_held(held: tuple[Holding, ...], data: st.DataObject) -> None:
    whole = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
    other = data.draw(slicings(2))[0]
    for holding in held:
        if (both := holding.extent.meet(other)) is not None:
            assert (
                taken(taken(whole, holding.extent), both.within(holding.extent)) == taken(whole, both)
            ).all()
            assert taken(whole, both).shape == both.shape(whole.shape)


def taken(values: npt.NDArray[np.intp], extent: Extent) -> npt.NDArray[np.intp]:
    for axis, spans in extent.axes:
        values = np.concatenate([values.take(range(*span), axis) for span in spans], axis)
    return values
