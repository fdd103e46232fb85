"""Joint plans of small graphs against all there are, with their cost worked out another way."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import ceil, inf

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from forescale.core.errors import InfeasiblePlan, InvalidInput
from forescale.plan.joint.cost import cost
from forescale.plan.joint.problem import Edge, JointPlan, JointProblem, JointStage, Option
from forescale.plan.joint.search import plan_joint
from forescale.plan.joint.stage import best_stage

SHAPES = {
    "chain": lambda count: [(n, n + 1) for n in range(count - 1)],
    "diamonds": lambda count: (
        [(n, n + 1) for n in range(0, count - 1, 2)] + [(n, n + 2) for n in range(count - 2)]
    ),
    "apart": lambda count: [(n, n + 2) for n in range(count - 2)],
    "star": lambda count: [(0, n) for n in range(1, count)],
}


@st.composite
def problems(draw: st.DrawFn) -> JointProblem:
    count = draw(st.integers(1, 4))
    ends = SHAPES[draw(st.sampled_from(sorted(SHAPES)))](count)
    figures = st.integers(0, 9).map(float)

    def option(number: int, node: int) -> Option:
        return Option(
            name=f"option {number}",
            work=draw(figures),
            parameter_bytes=draw(figures),
            stored_bytes=draw(figures),
            fixed_bytes=draw(figures),
            received_bytes={a: draw(figures) for a, b in ends if b == node},
            sent_bytes={b: draw(figures) for a, b in ends if a == node},
        )

    degrees = draw(st.sampled_from([(1,), (1, 2)]))
    options = tuple(
        {
            degree: tuple(option(number, node) for number in range(draw(st.integers(1, 3))))
            for degree in degrees
            if degree == 1 or draw(st.booleans())
        }
        for node in range(count)
    )
    return JointProblem(
        nodes=tuple(f"n{node}" for node in range(count)),
        options=options,
        edges=tuple(Edge(source=a, target=b, transfer_bytes=draw(figures)) for a, b in ends),
        devices=draw(st.integers(1, 4)),
        memory_bytes=float(draw(st.integers(5, 80))),
        bandwidth_bytes_per_time=float(draw(st.integers(1, 8))),
        samples=draw(st.sampled_from([1, 2, 4, 6])),
    )


def pipelines(problem: JointProblem) -> Iterator[tuple[JointStage, ...]]:
    """All plans whose stages are in order, fitting or not."""
    nodes = range(len(problem.nodes))

    def grown(left: frozenset[int], devices: int, samples: int) -> Iterator[tuple[JointStage, ...]]:
        if not left:
            yield ()
            return
        for picked in product((False, True), repeat=len(left)):
            stage = tuple(node for node, taken in zip(sorted(left), picked, strict=True) if taken)
            open_ends = (e for e in problem.edges if e.target in stage and e.source in left)
            if not stage or any(edge.source not in stage for edge in open_ends):
                continue
            for d, t in product(range(1, samples + 1), (1, 2)):
                if problem.samples % d or d * t > devices:
                    continue
                for rest in grown(left - set(stage), devices - d * t, samples - d):
                    counts = (range(len(problem.options[n].get(t, ()))) for n in stage)
                    for options in product(*counts):
                        yield (
                            JointStage(nodes=stage, replicas=d, tensor_degree=t, options=options),
                            *rest,
                        )

    yield from grown(frozenset(nodes), problem.devices, problem.samples)


def time_and_memory(problem: JointProblem, stages: tuple[JointStage, ...]) -> tuple[float, float]:
    """Longest load and largest memory."""
    loads: list[float] = []
    memory: list[float] = []
    for number, stage in enumerate(stages):
        in_flight = ceil(sum(later.replicas for later in stages[number:]) / stage.replicas)
        load = total = 0.0
        for node, which in zip(stage.nodes, stage.options, strict=True):
            option = problem.options[node][stage.tensor_degree][which]
            total += option.stored_bytes * in_flight + option.fixed_bytes
            moved = sum(
                edge.transfer_bytes + option.received_bytes[edge.source]
                for edge in problem.edges
                if edge.target == node and edge.source not in stage.nodes
            ) + sum(
                edge.transfer_bytes + option.sent_bytes[edge.target]
                for edge in problem.edges
                if edge.source == node and edge.target not in stage.nodes
            )
            sync = 4 * (stage.replicas - 1) * option.parameter_bytes / stage.replicas / problem.samples
            load += (moved * 2 / stage.replicas + sync) / problem.bandwidth_bytes_per_time
            load += option.work / stage.replicas
        loads.append(load)
        memory.append(total)
    return max(loads), max(memory)


@settings(max_examples=80, deadline=None)
@given(problem=problems())
def test_a_plan_is_the_best_of_all(problem: JointProblem) -> None:
    figures = [time_and_memory(problem, stages) for stages in pipelines(problem)]
    assume(figures)
    best = min((time for time, memory in figures if memory <= problem.memory_bytes), default=inf)
    if best == inf:
        with pytest.raises(InfeasiblePlan) as raised:
            plan_joint(problem)
        least = min(memory for _, memory in figures)
        assert raised.value.short_bytes == ceil(least - problem.memory_bytes)
        return
    answer = plan_joint(problem)
    time, memory = time_and_memory(problem, answer.plan.stages)
    assert answer.objective == pytest.approx(time)
    assert max(answer.memory_bytes) == memory <= problem.memory_bytes
    assert sum(stage.devices for stage in answer.plan.stages) <= problem.devices
    assert answer.objective == pytest.approx(best)
    assert answer.lower_bound == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(problem=problems(), data=st.data())
def test_cost_is_that_of_the_model(problem: JointProblem, data: st.DataObject) -> None:
    every = list(pipelines(problem))
    assume(every)
    stages = data.draw(st.sampled_from(every))
    figures = cost(problem, JointPlan(stages=stages))
    time, memory = time_and_memory(problem, stages)
    assert figures.objective == pytest.approx(time)
    assert max(figures.memory_bytes) == memory


def test_options_that_need_more_devices_together_are_refused() -> None:
    plain = {"parameter_bytes": 0.0, "stored_bytes": 1.0, "fixed_bytes": 0.0}
    first = Option(name="whole", work=1.0, received_bytes={}, sent_bytes={1: 0.0}, **plain)
    second = Option(name="split", work=1.0, received_bytes={0: 0.0}, sent_bytes={}, **plain)
    problem = JointProblem(
        nodes=("a", "b"),
        options=({1: (first,)}, {2: (second,)}),
        edges=(Edge(source=0, target=1, transfer_bytes=1.0),),
        devices=2,
        memory_bytes=10.0,
        bandwidth_bytes_per_time=1.0,
        samples=4,
    )
    with pytest.raises(InvalidInput, match="need more than 2 devices together"):
        plan_joint(problem)


@settings(max_examples=40, deadline=None)
@given(
    figures=st.lists(
        st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=3),
        min_size=1,
        max_size=6,
    ),
    memory_bytes=st.integers(1, 120),
)
def test_options_of_a_stage_are_the_best_that_fit(
    figures: list[list[tuple[int, int]]], memory_bytes: int
) -> None:
    options = tuple(
        {
            1: tuple(
                Option(
                    name=str(number),
                    work=float(time),
                    parameter_bytes=0.0,
                    stored_bytes=float(stored),
                    fixed_bytes=0.0,
                    received_bytes={},
                    sent_bytes={},
                )
                for number, (time, stored) in enumerate(given_options)
            )
        }
        for given_options in figures
    )
    problem = JointProblem(
        nodes=tuple(str(node) for node in range(len(figures))),
        options=options,
        edges=(),
        devices=1,
        memory_bytes=float(memory_bytes),
        bandwidth_bytes_per_time=1.0,
        samples=1,
    )
    times = [
        sum(time for time, _ in choice)
        for choice in product(*figures)
        if sum(stored for _, stored in choice) <= memory_bytes
    ]
    found = best_stage(problem, range(len(figures)), tensor_degree=1, replicas=1, in_flight=1)
    assert (found.load if found else None) == min(times, default=None)
    assert found is None or found.proven
