"""Who gets the places of a pool. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from forescale.control.memory import Budget
from forescale.registry.records import DeploymentSpec


def shared(
    specs: Sequence[DeploymentSpec], needed: Mapping[str, int], places: int, budget: Budget | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Replicas of each model in a pool of so many places; and bytes that models lack for one more.

    All have what their deployments ask for at least. Then class after class (1 first), whoever of a class
    has fewest gets the next.
    """
    missing: dict[str, int] = {}
    given = {spec.model: min(spec.min_replicas, needed[spec.model]) for spec in specs}

    def takes_place(spec: DeploymentSpec, before: int) -> bool:
        return budget is None or budget.takes_place((spec.model, spec.number), before)

    left = places - sum(takes_place(spec, number) for spec in specs for number in range(given[spec.model]))
    for priority in sorted({spec.priority for spec in specs}):
        mates = [spec for spec in specs if spec.priority == priority]
        while short := [
            spec
            for spec in mates
            if given[spec.model] < needed[spec.model]
            and spec.model not in missing
            and (left > 0 or not takes_place(spec, given[spec.model]))
        ]:
            spec = min(short, key=lambda each: given[each.model])
            version = spec.model, spec.number
            if budget is None or budget.grant(version):
                left -= takes_place(spec, given[spec.model])
                given[spec.model] += 1
            else:
                missing[spec.model] = budget.missing_bytes(version)
    return given, missing
