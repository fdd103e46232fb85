from __future__ import annotations

from forescale.graph.model import ModelGraph
from forescale.plan.order import gather_atoms, linear_orders
from unit.plan.graphs import GraphBuilder, chain


def orders(graph: ModelGraph) -> list[tuple[int, ...]]:
    return linear_orders(graph, gather_atoms(graph), dict.fromkeys(graph.tensors, 4))


def branches() -> ModelGraph:
    """Two branches captured in turns: 0 -> 1, 3, 5 and 0 -> 2, 4, 6, joined by 7."""
    builder = GraphBuilder()
    left = right = builder.add("start", "x")
    for index in range(3):
        left = builder.add(f"left{index}", left)
        right = builder.add(f"right{index}", right)
    builder.add("join", left, right)
    return builder.build(["join"], {"x": 8})


def test_a_chain_has_one_order() -> None:
    assert orders(chain(5)) == [(0, 1, 2, 3, 4)]


def test_branches_are_offered_in_turns_and_whole() -> None:
    found = orders(branches())
    assert found[0] == tuple(range(8))
    assert any(order[1:4] in {(1, 3, 5), (2, 4, 6)} for order in found)
    assert len(set(found)) == len(found)


def test_orders_are_topological() -> None:
    graph = branches()
    for order in orders(graph):
        place = {operator: index for index, operator in enumerate(order)}
        assert sorted(order) == list(range(8))
        assert all(place[p] < place[o] for o, before in enumerate(graph.predecessors) for p in before)


def test_an_atom_holds_what_shares_a_buffer_and_what_lies_between() -> None:
    builder = GraphBuilder()
    builder.buffer("running", 4)
    builder.add("before", "x")
    builder.add("reads", "before", buffers=["running"])
    builder.add("between", "reads")
    builder.add("beside", "before")
    builder.add("writes", "between", updates="running")
    builder.add("after", "writes", "beside")
    atoms = gather_atoms(builder.build(["after"], {"x": 8}))
    assert atoms.members == ((0,), (1, 2, 4), (3,), (5,))
    assert atoms.predecessors == ((), (0,), (0,), (1, 2))


def test_groups_that_overlap_become_one_atom() -> None:
    builder = GraphBuilder()
    for name in ("one", "two"):
        builder.buffer(name, 4)
    builder.add("a", "x", buffers=["one"], updates="one")
    builder.add("b", "a", buffers=["one", "two"])
    builder.add("c", "b", updates="two")
    builder.add("d", "c")
    atoms = gather_atoms(builder.build(["d"], {"x": 8}))
    assert atoms.members == ((0, 1, 2), (3,))
