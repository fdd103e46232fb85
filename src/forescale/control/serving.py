"""What is to be done so that what is deployed is what is served. Pure.

Deployments say what is wanted, an observation what there is. ``step`` compares the two, whatever happened in
between, so that a decision that came too late or was not carried out is made good by the next step.

A version that takes another's place is started beside it. Only when it has as many replicas as it should
do requests go to it and does the old one leave, with its last answers given. A replica here is a wanted one:
that its process is replaced when it is lost is not decided again.

While a rollout runs, the new version is served beside the deployed one, and ``rollout`` says which requests
it gets and with how many replicas.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from forescale.control.houses import Home
from forescale.control.memory import Memory, Room, Version
from forescale.control.rollout import replicas, route
from forescale.engine.serve.routing import Route
from forescale.registry.records import DeploymentSpec
from forescale.registry.rollout import Rollout


class Phase(StrEnum):
    STARTING = "starting"
    READY = "ready"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """A replica that there is; those of one house are in one process."""

    name: str
    version: Version
    device: str
    phase: Phase
    house: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What there is.

    Attributes:
        devices: names of those that can have replicas.
        replicas: in the order in which they were started.
        served: versions that take requests.
        withdrawn: versions that take none any more and answer their last ones.
        unusable: versions whose file is missing or damaged.
        routes: of each model that has a served version.
        memory: what the devices have, and what replicas take.
    """

    devices: tuple[str, ...]
    replicas: tuple[Replica, ...] = ()
    served: frozenset[Version] = frozenset()
    withdrawn: frozenset[Version] = frozenset()
    unusable: frozenset[Version] = frozenset()
    routes: Mapping[str, Route] = field(default_factory=dict[str, Route])
    memory: Memory = field(default_factory=Memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """Take requests to a version; they wait for its first replica."""

    version: Version


@dataclass(frozen=True, slots=True, kw_only=True)
class StartReplica:
    """In the process of a house, if it is named, else in one of its own."""

    version: Version
    device: str
    house: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StopReplica:
    """Let a replica finish what it has, and end it."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SetRoute:
    """Requests that name no version go by this; all versions in it are served."""

    model: str
    route: Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdraw:
    """Take no more requests to a version, answer those that came, then stop its replicas."""

    version: Version


@dataclass(frozen=True, slots=True, kw_only=True)
class Short:
    """So many replicas of a version fit nowhere; the device that has most memory left lacks so much."""

    version: Version
    replicas: int
    missing_bytes: int


Command = Serve | StartReplica | StopReplica | SetRoute | Withdraw | Short


def step(
    wanted: Sequence[DeploymentSpec],
    seen: Observation,
    counts: Mapping[str, int] | None = None,
    rollouts: Mapping[str, Rollout] | None = None,
    homes: Mapping[Version, Home] | None = None,
) -> tuple[Command, ...]:
    """What to do, in this order.

    Args:
        counts: replicas that a model is to have now; where nothing is said, what its deployment allows.
        rollouts: that run, by model. One from another version than the deployed one has ended meanwhile.
        homes: of versions whose replica is to share a process; all others are to have processes of their own.
    """
    room = Room(seen.devices, seen.memory)
    for replica in seen.replicas:
        room.put(replica.version, replica.device, replica.house)
    there = {(replica.version, replica.house) for replica in seen.replicas}
    for version, home in (homes or {}).items():
        if (version, home.house) not in there:
            room.put(version, home.device, home.house)
    commands: list[Command] = []
    known = {*seen.served, *seen.withdrawn}
    index = _Index(seen, homes or {})
    for spec in wanted:
        rollout = (rollouts or {}).get(spec.model)
        if rollout is not None and rollout.spec.stable != spec.number:
            rollout = None
        known.add((spec.model, spec.number))
        if rollout:
            known.add((spec.model, rollout.spec.number))
        commands += _towards(spec, index, counts or {}, room, rollout)
    deployed = {spec.model for spec in wanted}
    commands += [Withdraw(version=version) for version in sorted(seen.served) if version[0] not in deployed]
    commands += [
        StopReplica(name=replica.name)
        for replica in seen.replicas
        if replica.version not in known and replica.phase is not Phase.LEAVING
    ]
    return tuple(commands)


class _Index:
    """What there is, by model and version: there may be thousands.

    Attributes:
        served: versions of a model that take requests, ascending.
        replicas: those of a version that are not leaving.
        ready: replicas that answer, of versions that take requests.
    """

    def __init__(self, seen: Observation, homes: Mapping[Version, Home]) -> None:
        self.seen = seen
        self.homes = homes
        self.served: defaultdict[str, list[Version]] = defaultdict(list)
        for version in sorted(seen.served):
            self.served[version[0]].append(version)
        self.replicas: defaultdict[Version, list[Replica]] = defaultdict(list)
        self.ready: Counter[Version] = Counter()
        self._residents: Counter[str | None] = Counter()
        for replica in seen.replicas:
            if replica.phase is not Phase.LEAVING:
                self.replicas[replica.version].append(replica)
                self._residents[replica.house] += 1
            if replica.phase is Phase.READY and replica.version in seen.served:
                self.ready[replica.version] += 1

    def is_at_home(self, replica: Replica) -> bool:
        """Whether it is in the process in which it is to be."""
        home = self.homes.get(replica.version)
        if home is None:
            return replica.house is None or self._residents[replica.house] == 1
        return replica.house == home.house


def _towards(
    spec: DeploymentSpec,
    index: _Index,
    counts: Mapping[str, int],
    room: Room,
    rollout: Rollout | None,
) -> Iterator[Command]:
    version = spec.model, spec.number
    least = counts.get(spec.model, spec.min_replicas)
    most = counts.get(spec.model, spec.max_replicas)
    new = (spec.model, rollout.spec.number) if rollout else version
    others = [other for other in index.served[spec.model] if other not in {version, new}]
    if others or rollout:
        least, most = max(least, 1), max(most, 1)  # it must be seen to serve before it takes over
    yield from _staffed(version, least, most, index, room)
    if rollout:
        number = replicas(rollout, least)
        yield from _staffed(new, number, number, index, room)
        ready = {number for model, number in index.served[spec.model] if index.ready[model, number]}
        yield from _routed(spec.model, route(rollout, ready), index.seen)
    if others and index.ready[version] >= least:
        if not rollout:
            yield from _routed(spec.model, Route(version=str(spec.number)), index.seen)
        yield from (Withdraw(version=other) for other in others)


def _staffed(version: Version, least: int, most: int, index: _Index, room: Room) -> Iterator[Command]:
    """Served, by as many replicas as it should be."""
    seen = index.seen
    if version in seen.withdrawn:
        return  # it was wanted no more and is again: served anew when its last answers are given
    if version in seen.unusable:
        return
    if version not in seen.served:
        yield Serve(version=version)
    mine = index.replicas[version]
    home = index.homes.get(version)
    at_home = [replica for replica in mine if index.is_at_home(replica)]
    own = Counter(replica.device for replica in mine)
    for lacking in range(least - len(at_home), 0, -1):
        if home is not None:
            yield StartReplica(version=version, device=home.device, house=home.house)
            continue
        device = room.place(version, own)
        if device is None:
            missing_bytes = room.missing_bytes(version, lacking)
            yield Short(version=version, replicas=lacking, missing_bytes=missing_bytes)
            break
        own[device] += 1
        yield StartReplica(version=version, device=device)
    yield from (StopReplica(name=replica.name) for replica in _surplus(mine, at_home, most))


def _surplus(mine: Sequence[Replica], at_home: Sequence[Replica], most: int) -> Sequence[Replica]:
    """Those that are not ready cost least to lose; of the others the newest go.

    One that is elsewhere goes on until the one that takes its place is ready.
    """
    coming = sum(replica.phase is not Phase.READY for replica in at_home)
    if len(at_home) < len(mine) and most:
        most += coming
    return sorted(mine, key=lambda each: (each.phase is not Phase.READY, each not in at_home))[most:]


def _routed(model: str, wanted: Route, seen: Observation) -> Iterator[Command]:
    targets = {(model, int(version)) for version in wanted.versions()}
    if targets <= seen.served and seen.routes.get(model) != wanted:
        yield SetRoute(model=model, route=wanted)
