"""Small changes of which devices run a pipeline's stages together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, groupby, pairwise, permutations

Groups = list[tuple[int, ...]]
"""The devices of every stage, in pipeline order."""


def regroupings(
    devices: Sequence[int], positions_S: Sequence[int], classes: Sequence[int]
) -> Iterator[Groups]:
    """A device that was idle taken in, a group split or joined with the next, devices exchanged or moved.

    Args:
        devices: of the stages; ``positions_S`` their places in the pipeline, replicas' equal.
        classes: of all devices there are; of equal ones only one is tried.
    """
    pairs = zip(positions_S, devices, strict=True)
    groups = [tuple(device for _, device in members) for _, members in groupby(pairs, lambda pair: pair[0])]
    idle = {kind: device for device, kind in enumerate(classes) if device not in devices}
    for device in idle.values():
        for place, group in enumerate(groups):
            yield [*groups[:place], (*group, device), *groups[place + 1 :]]
            yield [*groups[:place], (device,), *groups[place:]]
    for place, group in enumerate(groups):
        for size in range(1, len(group)):
            yield [*groups[:place], group[:size], group[size:], *groups[place + 1 :]]
    for place, (group, following) in enumerate(pairwise(groups)):
        yield [*groups[:place], group + following, *groups[place + 2 :]]
    yield from _exchanged(groups, classes)
    yield from _moved(groups, classes)


def _exchanged(groups: Groups, classes: Sequence[int]) -> Iterator[Groups]:
    for one, other in combinations(range(len(groups)), 2):
        for device in _distinct(groups[one], classes):
            for partner in _distinct(groups[other], classes):
                if classes[device] != classes[partner]:
                    exchange = {device: partner, partner: device}
                    yield [tuple(exchange.get(d, d) for d in group) for group in groups]


def _moved(groups: Groups, classes: Sequence[int]) -> Iterator[Groups]:
    for giver, taker in permutations(range(len(groups)), 2):
        for device in _distinct(groups[giver], classes):
            if len(groups[giver]) > 1:
                changed = list(groups)
                changed[giver] = tuple(other for other in groups[giver] if other != device)
                changed[taker] = (*groups[taker], device)
                yield changed


def _distinct(group: Sequence[int], classes: Sequence[int]) -> list[int]:
    return list({classes[device]: device for device in group}.values())
