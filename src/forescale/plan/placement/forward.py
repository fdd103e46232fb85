"""What contiguity binds: the edges of the forward pass."""

from __future__ import annotations

from forescale.plan.placement.problem import IntArray, PlacementProblem


def forward_edges(problem: PlacementProblem, part_N: IntArray) -> list[tuple[int, int]]:
    """Edges between parts that join two nodes of the forward pass, each once, ascending."""
    backward_N = problem.backward_N
    edges = {
        (int(part_N[source]), int(part_N[target]))
        for source, target in problem.edges
        if not (backward_N[source] or backward_N[target] or part_N[source] == part_N[target])
    }
    return sorted(edges)
