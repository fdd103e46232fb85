"""On how many devices each stage of a pipeline may run, and on which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

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


def positions(pattern: Pattern) -> tuple[int, ...]:
    return tuple(place for place, number in enumerate(pattern) for _ in range(number))


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
