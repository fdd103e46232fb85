"""Which versions share a process, their house. Pure.

A version may share when it is known to be small beside the latencies that all in the house have been
promised: nobody waits long for another one's batch, the house is mostly idle, and it is loaded again soon if
its process is lost. ``step`` says where each is to be; who is in a house stays, as long as no limit is
exceeded by far, and one that is alone moves in when it has been small for a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from math import inf

from forescale.control.memory import Room, Version


@dataclass(frozen=True, slots=True, kw_only=True)
class HouseRules:
    """When versions share.

    Attributes:
        wait_share: the longest batch in a house, of the shortest latency promised there, at most.
        busy_share: of a house's time, at most.
        load_s: what loading one takes, at most: others wait so long when it comes.
        reload_s: what loading all in a house takes, at most.
        slack: times these limits, a house is still left as it is.
        settle_s: how long a version that is alone must have been small before it moves.
        memory_s: how soon what was once asked for counts half.
    """

    wait_share: float = 0.1
    busy_share: float = 0.2
    load_s: float = 1.0
    reload_s: float = 10.0
    slack: float = 2.0
    settle_s: float = 3.0
    memory_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A deployed version that is to have one replica, or sleeps.

    Attributes:
        is_awake: whether it is to have a replica now.
        may_move: whether no other version is taking its place.
        latency_s: in which it should answer.
        load_s: what loading it took.
        batch_s: its longest batch.
        row_s: seconds of its batches by row, in those that are least efficient.
        arrived_rows: asked for since it has been served.
    """

    is_awake: bool
    may_move: bool
    latency_s: float
    load_s: float
    batch_s: float
    row_s: float
    arrived_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A replica that does not leave; ``is_ready``: it answers."""

    version: Version
    device: str
    house: str
    is_ready: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """Where a version's replica is to be."""

    house: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Housing:
    """What is remembered.

    Attributes:
        homes: of the versions that share; all others are to be alone.
        small: versions that could share, wherever they are.
        arrived_rows: by version, at ``counted_s``.
        rows_per_s: the most that was asked of a version, fading.
        ripe_s: when those that are alone were first seen to be small.
    """

    homes: Mapping[Version, Home] = field(default_factory=dict[Version, Home])
    small: frozenset[Version] = frozenset()
    arrived_rows: Mapping[Version, int] = field(default_factory=dict[Version, int])
    rows_per_s: Mapping[Version, float] = field(default_factory=dict[Version, float])
    ripe_s: Mapping[Version, float] = field(default_factory=dict[Version, float])
    counted_s: float = -inf


_STEP_S = 1.0


def step(
    known: Housing,
    tenants: Mapping[Version, Tenant],
    replicas: Sequence[Resident],
    room: Room,
    *,
    now_s: float,
    rules: HouseRules | None = None,
) -> Housing:
    """Where the versions are to be; call it a few times a second.

    Args:
        tenants: versions that may share, of which something has been measured.
        replicas: all that do not leave, in the order in which they were started.
        room: with all replicas in it; those that are to come are put there, too.
    """
    rules = rules or HouseRules()
    is_due = now_s - known.counted_s >= _STEP_S
    if is_due:
        known = _counted(known, tenants, now_s, rules)
    plan = _Plan(known, tenants, replicas, room, rules)
    plan.keep()
    plan.wake()
    small = {version for version in tenants if plan.suit((version,))} if is_due else known.small
    ripe_s = {
        replica.version: known.ripe_s.get(replica.version, now_s)
        for replica in replicas
        if replica.is_ready and replica.version in tenants  # not one that has left since they were counted
        if replica.version in small and replica.version not in plan.homes
    }
    if not plan.is_moving:
        plan.move([version for version, since_s in ripe_s.items() if now_s - since_s >= rules.settle_s])
    return replace(known, homes=plan.homes, small=frozenset(small | plan.homes.keys()), ripe_s=ripe_s)


def _counted(known: Housing, tenants: Mapping[Version, Tenant], now_s: float, rules: HouseRules) -> Housing:
    elapsed_s = now_s - known.counted_s
    fading = 0.5 ** (elapsed_s / rules.memory_s)
    rows_per_s: dict[Version, float] = {}
    for version, tenant in tenants.items():
        rows = max(0, tenant.arrived_rows - known.arrived_rows.get(version, tenant.arrived_rows))
        rows_per_s[version] = max(rows / elapsed_s, known.rows_per_s.get(version, 0.0) * fading)
    arrived_rows = {version: tenant.arrived_rows for version, tenant in tenants.items()}
    return replace(known, arrived_rows=arrived_rows, rows_per_s=rows_per_s, counted_s=now_s)


class _Plan:
    """Homes, while they are given one after the other.

    Attributes:
        is_moving: whether a version is on its way from one house to another.
    """

    def __init__(
        self,
        known: Housing,
        tenants: Mapping[Version, Tenant],
        replicas: Sequence[Resident],
        room: Room,
        rules: HouseRules,
    ) -> None:
        self.homes: dict[Version, Home] = {}
        self._known = known
        self._tenants = tenants
        self._rules = rules
        self._room = room
        # Where each is, or is on its way to.
        self._where = {each.version: Home(house=each.house, device=each.device) for each in replicas}
        self.is_moving = any(
            each.version in tenants and each.house != self._where[each.version].house for each in replicas
        )
        self._houses: dict[Home, list[Version]] = {}
        for version, home in self._where.items():
            self._houses.setdefault(home, []).append(version)

    def suit(self, versions: Iterable[Version], slack: float = 1.0) -> bool:
        """Whether versions can share one process."""
        tenants = [self._tenants[version] for version in versions]
        latency_s = min(tenant.latency_s for tenant in tenants)
        rates_per_s = self._known.rows_per_s
        busy = sum(rates_per_s.get(version, 0.0) * self._tenants[version].row_s for version in versions)
        return (
            max(tenant.batch_s for tenant in tenants) <= self._rules.wait_share * slack * latency_s
            and max(tenant.load_s for tenant in tenants) <= self._rules.load_s * slack
            and busy <= self._rules.busy_share * slack
            and sum(tenant.load_s for tenant in tenants) <= self._rules.reload_s * slack
        )

    def keep(self) -> None:
        """Whoever shares goes on to, unless that has become too much: then the busiest go."""
        for home, there in self._houses.items():
            stay: list[Version] = []
            for version in sorted(there, key=self._busy):
                if version in self._tenants and self.suit([*stay, version], self._rules.slack):
                    stay.append(version)
            if len(there) > 1 or home == self._known.homes.get(there[0]):
                self.homes |= dict.fromkeys(stay, home)
                there[:] = stay

    def wake(self) -> None:
        """Versions that are small and are asked for share from the beginning."""
        for version, tenant in self._tenants.items():
            if tenant.is_awake and version not in self._where and self.suit((version,)):
                home = self._open_to(version) or self._new(version)
                if home is not None:
                    self._settle(version, home)

    def move(self, ripe: Sequence[Version]) -> None:
        """One of those that are alone goes to others, or to another one that is alone."""
        for version in ripe:
            target = self._open_to(version, beside=ripe) if self._tenants[version].may_move else None
            if target is not None:
                self.homes |= dict.fromkeys(self._houses[target], target)
                self._houses[self._where[version]].remove(version)
                self._settle(version, target)
                return

    def _busy(self, version: Version) -> float:
        tenant = self._tenants.get(version)
        return self._known.rows_per_s.get(version, 0.0) * tenant.row_s if tenant else inf

    def _open_to(self, version: Version, beside: Sequence[Version] | None = None) -> Home | None:
        """The fullest house that a version can join; those of one alone only if that is one of ``beside``."""
        own = self._where.get(version)
        for home in sorted(self._houses, key=lambda home: -len(self._houses[home])):
            there = self._houses[home]
            shares = bool(there) and there[0] in self.homes
            if (
                (shares or (beside is not None and len(there) == 1 and there[0] in beside))
                and home != own
                and self.suit([*there, version])
                and self._room.fits(version, home.device, home.house)
            ):
                return home
        return None

    def _new(self, version: Version) -> Home | None:
        device = self._room.best(version)
        if device is None:
            return None
        taken = {home.house for home in self._houses}
        house = next(name for number in count(1) if (name := f"shared-{number}") not in taken)
        return Home(house=house, device=device)

    def _settle(self, version: Version, home: Home) -> None:
        self.homes[version] = self._where[version] = home
        self._houses.setdefault(home, []).append(version)
        self._room.put(version, home.device, home.house)
