"""Which options to give up speed for when a stage does not fit: a multiple-choice knapsack.

Kellerer, Pferschy, Pisinger, *Knapsack Problems*, 2004, §11: every node starts with its fastest option; swaps
to smaller ones are made in the order of what a saved byte costs. Stopping within the last swap gives a bound,
stopping after it a choice that fits.

Axes: L = option, N = node, R = swap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forescale.plan.placement.problem import Array, IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Swaps:
    """Swaps that are worth while, in the order in which to make them.

    Attributes:
        first_N: the fastest option of each node; among equals the smallest.
        node_R, option_R: whose option is swapped, and for which.
        cost_R, saving_R: time it costs, and bytes it saves.
    """

    first_N: IntArray
    node_R: IntArray
    option_R: IntArray
    cost_R: Array
    saving_R: Array


def swaps(cost_LN: Array, bytes_LN: Array) -> Swaps:
    """Along the lower convex hull of each node's options."""
    nodes = np.arange(cost_LN.shape[1])
    fastest_LN = cost_LN == cost_LN.min(axis=0)
    first_N = np.where(fastest_LN, bytes_LN, np.inf).argmin(axis=0)
    current_N = first_N
    found: list[tuple[IntArray, IntArray, Array, Array]] = []
    for _ in range(1, len(cost_LN)):
        saving_LN = bytes_LN[current_N, nodes] - bytes_LN
        cost_step_LN = cost_LN - cost_LN[current_N, nodes]
        saves_LN = saving_LN > 0
        price_LN = np.where(saves_LN, cost_step_LN / np.where(saves_LN, saving_LN, 1.0), np.inf)
        # Of equal prices the larger saving, lest a hull point between is skipped and then comes too late.
        cheapest_LN = price_LN == price_LN.min(axis=0)
        next_N = np.where(cheapest_LN, saving_LN, -np.inf).argmax(axis=0)
        moved_N = np.flatnonzero(saves_LN.any(axis=0))
        option_N = next_N[moved_N]
        found.append((moved_N, option_N, cost_step_LN[option_N, moved_N], saving_LN[option_N, moved_N]))
        current_N = np.where(saves_LN.any(axis=0), next_N, current_N)
    if not found:
        found.append((nodes[:0], nodes[:0], cost_LN[0, :0], cost_LN[0, :0]))
    node_R, option_R, cost_R, saving_R = (np.concatenate(column) for column in zip(*found, strict=True))
    order_R = np.argsort(cost_R / saving_R, kind="stable")
    return Swaps(
        first_N=first_N,
        node_R=node_R[order_R],
        option_R=option_R[order_R],
        cost_R=cost_R[order_R],
        saving_R=saving_R[order_R],
    )
