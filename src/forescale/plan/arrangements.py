"""Which pipelines a search looks at: how many devices run each stage, which, and where it is cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, pairwise, product
from operator import add

import numpy as np

from forescale.plan.problem import Array
from forescale.plan.workload import IntArray

_PAIR_SHIFTS = tuple(sign * size for size in (1, 4, 16) for sign in (1, -1))
_SHIFTS = tuple(sign * size for size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96) for sign in (1, -1))

Pattern = tuple[int, ...]
"""On how many devices each stage of a pipeline runs."""


def patterns(most_stages: int, most_replicas: int) -> Iterator[Pattern]:
    """All there are: pipelines, replicas of the whole model, and pipelines with some replicas."""
    yield from ((1,) * stages for stages in range(1, most_stages + 1))
    yield from ((replicas,) for replicas in range(2, most_replicas + 1))
    for devices in range(3, most_stages + 1):
        for places in range(2, devices):
            for cuts in combinations(range(1, devices), places - 1):
                pattern = tuple(b - a for a, b in pairwise((0, *cuts, devices)))
                if max(pattern) <= most_replicas:
                    yield pattern


def uniform(most_replicas: int) -> Iterator[Pattern]:
    """One device alone, and replicas of the whole model on a power of two of them, or on all."""
    yield (1,)
    yield from ((2**power,) for power in range(1, most_replicas.bit_length()) if 2**power < most_replicas)
    if most_replicas > 1:
        yield (most_replicas,)


def stage_positions(pattern: Pattern) -> tuple[int, ...]:
    return tuple(place for place, number in enumerate(pattern) for _ in range(number))


def all_bounds(length: int, stages: int) -> IntArray:
    bounds = [(0, *cuts, length + 1) for cuts in combinations(range(1, length), stages - 1)]
    return np.array(bounds, dtype=np.int64).T


def by_load(positions_S: Sequence[int], busy_s_S: Array) -> list[int]:
    """Inner boundaries, those of the busiest stages first."""
    busy_s_B = np.zeros(positions_S[-1] + 1)
    np.maximum.at(busy_s_B, list(positions_S), busy_s_S)
    return np.argsort(-np.maximum(busy_s_B[:-1], busy_s_B[1:]), kind="stable").tolist()


def moves(bounds: tuple[int, ...], places: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """Boundaries with one of them moved, or two neighbours.

    Args:
        places: inner boundaries, in the order in which they are moved.
    """
    inner, end = bounds[1:-1], bounds[-1] - 1
    alone = [(shift,) for shift in _SHIFTS]
    both = list(product(_PAIR_SHIFTS, repeat=2))
    for place in places:
        for shift in (*alone, *both):
            stop = place + len(shift)
            if stop > len(inner):
                continue
            moved = (*inner[:place], *map(add, inner[place:stop], shift), *inner[stop:])
            if all(a < b for a, b in pairwise((0, *moved, end))):
                yield (0, *moved, bounds[-1])


def arrangements(classes: Sequence[int], places: int) -> Iterator[tuple[int, ...]]:
    """Devices for so many places, without those that only exchange interchangeable devices."""

    def extend(chosen: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(chosen) == places:
            yield chosen
            return
        tried: set[int] = set()
        for device, kind in enumerate(classes):
            if device not in chosen and kind not in tried:
                tried.add(kind)
                yield from extend((*chosen, device))

    return extend(())
