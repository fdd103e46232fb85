from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chain_model import chain_graph
from forescale.plan.moves import holders, moves
from forescale.plan.partition_plan import PartitionPlan, Prediction, Schedule, Stage

OPERATORS = 8
GRAPH = chain_graph(OPERATORS)


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


@given(plans(), plans())
def test_carrying_out_the_moves_gives_every_holder_what_it_holds(
    before: PartitionPlan, after: PartitionPlan
) -> None:
    held = {(name, device) for name, devices in holders(GRAPH, before).items() for device in devices}
    wanted = {(name, device) for name, devices in holders(GRAPH, after).items() for device in devices}
    changes = moves(GRAPH, before, after)
    assert all((move.name, move.source) in held for move in changes)
    gained = {(move.name, move.target) for move in changes}
    assert len(gained) == len(changes)
    assert gained == wanted - held


@given(plans())
def test_every_parameter_has_an_owner(plan: PartitionPlan) -> None:
    assert all(devices for devices in holders(GRAPH, plan).values())
    assert set(holders(GRAPH, plan)) == set(GRAPH.parameters)
