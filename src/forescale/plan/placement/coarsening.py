"""Where a long line of blocks may be cut, and pieces of it that move as one.

In place of a hierarchy of merged graphs (Herrmann et al., *Multilevel Algorithms for Acyclic Partitioning of
Directed Acyclic Graphs*, SISC 2019), segments of one topological order: every one is convex, so the coarse
graph has no cycle, and every coarse cut is a cut of the fine line with the same load.

Axes: B = block along the line, j = boundary before its j-th block, X = range, A = atom.
"""

from __future__ import annotations

import numpy as np

from forescale.plan.placement.problem import Array, IntArray


def everywhere(crossing_j: Array, weight_j: Array, most: int) -> IntArray:
    """At most about ``most`` boundaries: the narrowest of each share of the work.

    Args:
        crossing_j: cost of the tensors that cross a boundary.
        weight_j: work before a boundary.
    """
    count = len(crossing_j) - 1
    if count <= most:
        return np.arange(count + 1)
    # Half by the number of blocks: many without any work do not fall into one share.
    done_j = np.linspace(0.0, 1.0, count + 1) + weight_j / (weight_j[-1] or 1.0)
    share_X = np.searchsorted(done_j, np.linspace(0.0, 2.0, most + 1))
    return _with_narrowest(crossing_j, np.array([0, count]), np.clip(share_X, 1, count))


def around(cut_j: IntArray, crossing_j: Array, reach: int, most: int) -> IntArray:
    """At most about ``most`` boundaries: the cuts, and the narrowest ones up to ``reach`` blocks away."""
    count = len(crossing_j) - 1
    steps = np.linspace(-reach, reach, most // len(cut_j) + 1).astype(np.int64)
    near_X = np.clip(cut_j[:, None] + steps, 1, count).ravel()
    return _with_narrowest(crossing_j, np.concatenate([[0, count], cut_j]), np.append(near_X, count))


def _with_narrowest(crossing_j: Array, cut_j: IntArray, bound_X: IntArray) -> IntArray:
    """Some cuts and the narrowest boundary from each bound to the next."""
    start_X = np.unique(bound_X)
    size_X = np.diff(start_X, append=len(crossing_j))
    at_j = np.arange(start_X[0], len(crossing_j))
    least_X = np.minimum.reduceat(crossing_j[start_X[0] :], start_X - start_X[0])
    is_least_j = crossing_j[at_j] == np.repeat(least_X, size_X)
    range_j = np.repeat(np.arange(len(start_X)), size_X)[is_least_j]
    return np.unique(np.concatenate([cut_j, at_j[is_least_j][np.unique(range_j, return_index=True)[1]]]))


def pieces(along_A: IntArray, device_A: IntArray, weight_A: Array, most: int) -> IntArray:
    """Number 0 … of the piece of each atom: about ``most`` of like weight, none on two devices.

    Args:
        along_A: position on the line; a piece holds atoms that follow each other there.
    """
    order_A = np.lexsort((along_A, device_A))
    done_A = np.cumsum(weight_A[order_A])
    share_A = np.floor((done_A - weight_A[order_A] / 2) / done_A[-1] * most)
    starts_A = (np.diff(share_A, prepend=share_A[0]) != 0) | (np.diff(device_A[order_A], prepend=-1) != 0)
    piece_A = np.empty(len(order_A), dtype=np.int64)
    piece_A[order_A] = np.cumsum(starts_A) - 1
    return piece_A
