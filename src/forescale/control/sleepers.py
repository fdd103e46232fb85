"""Which models a step need not look at, since it would leave them as they are. Pure but for what it holds.

Of thousands of models most sleep: they have no replicas and are to have none. What a step decides about one
depends on its deployment, on what the data plane tells of its versions, and on its forecast; it takes nothing
that others could have. So while none of that changes, deciding without it comes to the same. All others are
looked at in every step, and a model that a command is about until there is none.

What is forecast changes each time that demand is counted: then those are looked at that are forecast. So are
those whose demand was not seen to be none yet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import zip_longest

from forescale.control.serving import Command, SetRoute, StopReplica
from forescale.engine.serve.orders import PlaneState, SetThreads, Steer
from forescale.registry.records import DeploymentSpec


class Sleepers:
    """Finds the deployed models of one server that sleep on. Use it in the thread of its event loop."""

    def __init__(self) -> None:
        self._resting: dict[str, bool] = {}
        self._wanted: Sequence[DeploymentSpec] = ()
        self._seen = PlaneState(plane="", devices=())
        self._busy = frozenset[str]()

    def look(
        self, wanted: Sequence[DeploymentSpec], seen: PlaneState, busy: Collection[str], *, is_counting: bool
    ) -> frozenset[str]:
        """Models that this step may pass over.

        Args:
            busy: models of which something else than that is known, as rollouts.
            is_counting: whether the demand of all models is counted in this step.
        """
        replicas = (replica.model for replica in seen.replicas)
        self._busy = frozenset((*busy, *replicas, *(model for model, _ in seen.withdrawn)))
        if _common(seen) != _common(self._seen) or seen.routes != self._seen.routes:
            self._resting.clear()
        for model in (*self._changed(wanted, seen), *self._busy):
            self._resting.pop(model, None)
        self._wanted, self._seen = wanted, seen
        if is_counting:
            self._resting = {model: True for model, is_counted in self._resting.items() if is_counted}
        return frozenset(self._resting)

    def settle(self, resting: Mapping[str, bool], commands: Iterable[Command | Steer | SetThreads]) -> None:
        """A step is decided.

        Args:
            resting: as ``Scaler.resting``.
        """
        for model in resting.keys() - self._busy - {_model(command) for command in commands}:
            self._resting[model] = resting[model]

    def wake(self) -> None:
        """All are to be looked at once more."""
        self._resting.clear()

    def _changed(self, wanted: Sequence[DeploymentSpec], seen: PlaneState) -> Iterator[str]:
        """Models whose deployment or versions are others than before, or were."""
        if wanted is not self._wanted:
            before = {spec.model: spec for spec in self._wanted}
            now = {spec.model: spec for spec in wanted}
            yield from (model for model in before.keys() | now.keys() if before.get(model) != now.get(model))
        # A version to which nothing has happened is the same object as before.
        for pair in zip_longest(seen.versions, self._seen.versions):
            if pair[0] is not pair[1]:
                yield from (version.model for version in pair if version)


def _model(command: Command | Steer | SetThreads) -> str | None:
    """What a command is about; None: that has replicas."""
    match command:
        case StopReplica():
            return None
        case SetRoute() | Steer() | SetThreads():
            return command.model
        case _:
            return command.version[0]


def without(models: Set[str], seen: PlaneState) -> PlaneState:
    """What there is besides some models, which have no replicas."""
    return replace(
        seen,
        versions=tuple(version for version in seen.versions if version.model not in models),
        routes={model: route for model, route in seen.routes.items() if model not in models},
    )


def _common(seen: PlaneState) -> object:
    """What all models depend on."""
    return seen.plane, seen.devices, seen.cores, seen.warm_up_s, seen.spares > 0
