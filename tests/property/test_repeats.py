"""Repeated blocks of random strings and graphs against the plainest search."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.graph.model import ModelGraph
from forescale.graph.repeats import disjoint, equal_operators, repetitions, runs
from unit.plan.graphs import GraphBuilder

relaxed = settings(max_examples=60, deadline=None)


def plain_runs(code: list[int]) -> set[tuple[int, int, int]]:
    """All stretches that a period cannot be extended over, at least two long, of no smaller period."""
    found: dict[tuple[int, int], int] = {}
    for period in range(1, len(code) // 2 + 1):
        start = 0
        for stop in range(len(code) - period + 1):
            if stop == len(code) - period or code[stop] != code[stop + period]:
                if stop - start >= period:
                    found.setdefault((start, stop + period), period)
                start = stop + 1
    return {(start, period, stop - start) for (start, stop), period in found.items()}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=24))
def test_all_runs_of_a_string_are_found(code: list[int]) -> None:
    assert runs(np.array(code, dtype=np.int64)) == plain_runs(code)


@st.composite
def blocks(draw) -> list[tuple[int, list[int], bool]]:
    """Operators of a block: size, distances to what they read, whether they have a parameter."""
    size = draw(st.integers(1, 5))
    return [
        (
            draw(st.integers(1, 2)),
            draw(st.lists(st.integers(1, 4), min_size=1, max_size=2, unique=True)),
            draw(st.booleans()),
        )
        for _ in range(size)
    ]


def built(rows: list[tuple[int, list[int], bool]]) -> ModelGraph:
    builder = GraphBuilder()
    names = ["x"]
    for index, (elements, distances, has_parameter) in enumerate(rows):
        inputs = dict.fromkeys(names[max(len(names) - distance, 0)] for distance in distances)
        parameters = [builder.parameter(f"p{index}", 4)] if has_parameter else []
        names.append(builder.add(f"op{index}", *inputs, elements=elements, parameters=parameters))
    return builder.build([names[-1]], {"x": 7})


@relaxed
@given(blocks(), blocks(), blocks(), st.integers(2, 4))
def test_a_planted_repetition_is_found(before, block, after, count: int) -> None:
    far = [(1, [1], False)] * 4  # what a block reads is no further away
    strange = -(-len(far) // len(block))  # blocks that read from before the first one, perhaps other shapes
    graph = built([*far, *before, *(row for _ in range(strange + count) for row in block), *after])
    start = len(far) + len(before) + strange * len(block)
    stop = start + count * len(block)
    assert any(
        found.start <= start and stop <= found.start + found.length and len(block) % found.per_block == 0
        for found in repetitions(graph)
    )


@relaxed
@given(st.lists(blocks(), min_size=1, max_size=3), st.lists(st.integers(0, 2), min_size=1, max_size=8))
def test_blocks_are_equal_up_to_names(kinds, sequence: list[int]) -> None:
    graph = built([row for kind in sequence for row in kinds[kind % len(kinds)]])
    alike = equal_operators(graph)
    for found in repetitions(graph):
        assert found.count >= 2
        for here in range(found.start, found.start + found.length - found.per_block):
            there = here + found.per_block
            assert alike[here] == alike[there]
            a, b = graph.operators[here], graph.operators[there]
            for one, other in zip(a.inputs, b.inputs, strict=True):
                made, made_later = graph.tensors[one].producer, graph.tensors[other].producer
                assert one == other or (made is not None and made_later == made + found.per_block)


@relaxed
@given(st.lists(blocks(), min_size=1, max_size=3), st.lists(st.integers(0, 2), min_size=1, max_size=8))
def test_disjoint_ones_are_inside_found_ones(kinds, sequence: list[int]) -> None:
    graph = built([row for kind in sequence for row in kinds[kind % len(kinds)]])
    found = repetitions(graph)
    chosen = disjoint(found)
    held = [o for r in chosen for o in range(r.start, r.start + r.length)]
    assert len(held) == len(set(held))
    for part in chosen:
        assert any(
            whole.per_block == part.per_block
            and whole.start <= part.start
            and part.start + part.length <= whole.start + whole.length
            for whole in found
        )
