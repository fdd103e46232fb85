"""Which replicas fit into the memory of which devices. Pure.

What a version takes is measured in its replicas; before it has had one, it is guessed from its file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

Version = tuple[str, int]
"""A model's name and the version's number."""

Placed = tuple[Version, str, str | None]
"""A replica's version, its device, and the house that it shares with others, if that is known."""

_ANY_HOUSE = ""
_FILE_SHARE = 1.25  # weights, and what loading takes for a moment
_RUN_BYTES = 64_000_000  # what running takes of a model that nobody has seen run


def guessed_bytes(file_bytes: int) -> int:
    """Memory of a model that was never loaded, from the size of its file."""
    return int(_FILE_SHARE * file_bytes) + _RUN_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What there is, and what replicas take.

    Attributes:
        room_bytes: what replicas may take together on each device; of others nothing is known, and so they
            hold any number.
        process_bytes: of a replica's process without its model.
        model_bytes: what models take besides.
        measured: versions of which that was measured, not guessed.
        small: versions that can go into a process that others are in.
    """

    room_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    process_bytes: int = 0
    model_bytes: Mapping[Version, int] = field(default_factory=dict[Version, int])
    measured: frozenset[Version] = frozenset()
    small: frozenset[Version] = frozenset()

    def replica_bytes(self, version: Version) -> int:
        """What a replica of a version takes in a process of its own."""
        return self.process_bytes + self.model_bytes.get(version, 0)

    def told(self, version: Version) -> str:
        """The same for people."""
        known = "measured" if version in self.measured else "guessed from its file"
        return f"a replica takes {size(self.replica_bytes(version))} ({known})"


class Room:
    """Devices, while replicas are put on them one after the other."""

    def __init__(self, devices: Sequence[str], memory: Memory) -> None:
        self._memory = memory
        self._free: dict[str, float] = {name: memory.room_bytes.get(name, inf) for name in devices}
        self._replicas = Counter(dict.fromkeys(devices, 0))
        self._houses = set[tuple[str, str | None]]()

    def fits(self, version: Version, device: str, house: str | None = None) -> bool:
        """Whether one more replica of the version would; in the process of a house, if it is named."""
        return self._bytes(version, device, house) <= self._free.get(device, -inf)

    def put(self, version: Version, device: str, house: str | None = None) -> None:
        """A replica is there, whether it fits or not; those of one house are in one process."""
        self._free[device] = self._free.get(device, 0.0) - self._bytes(version, device, house)
        self._replicas[device] += 1
        if house is not None:
            self._houses.add((device, house))

    def _bytes(self, version: Version, device: str, house: str | None) -> int:
        if (device, house) in self._houses:
            return self._memory.model_bytes.get(version, 0)
        return self._memory.replica_bytes(version)

    def best(
        self, version: Version, own: Mapping[str, int] | None = None, house: str | None = None
    ) -> str | None:
        """The device on which one more replica is best; None: nowhere is room.

        Args:
            own: replicas of the version by device. Two on one device would share what one could use alone.
        """
        fitting = [device for device in self._free if self.fits(version, device, house)]
        return min(fitting, key=lambda name: ((own or {}).get(name, 0), self._replicas[name]), default=None)

    def place(
        self, version: Version, own: Mapping[str, int] | None = None, house: str | None = None
    ) -> str | None:
        """Put one more replica where it is best, if there is room."""
        device = self.best(version, own, house)
        if device is not None:
            self.put(version, device, house)
        return device

    def missing_bytes(self, version: Version, replicas: int = 1) -> int:
        """How much more memory so many replicas need than the device has that has most left."""
        most_bytes = max(self._free.values(), default=0.0)
        if most_bytes == inf:
            return 0
        return max(0, replicas * self._memory.replica_bytes(version) - max(0, int(most_bytes)))


class Budget:
    """Grants replicas to versions, so that what deployments have at least never lacks room.

    Args:
        kept: replicas of the deployed versions, in the order in which they are kept.
        others: of those that leave, or that no deployment counts: they are there as long as they are.
        least: replicas of each deployed version that are granted before all others.
    """

    def __init__(
        self,
        devices: Sequence[str],
        memory: Memory,
        kept: Iterable[Placed],
        others: Iterable[Placed],
        least: Mapping[Version, int],
    ) -> None:
        self._memory = memory
        self._room = Room(devices, memory)
        self._own: dict[Version, Counter[str]] = {version: Counter() for version in least}
        self._there: dict[Version, list[tuple[str, str | None]]] = {version: [] for version in least}
        for other in others:
            self._room.put(*other)
        for version, device, house in kept:
            self._there[version].append((device, house))
        lacking: list[Version] = []
        for version, count in least.items():
            first, self._there[version] = self._there[version][:count], self._there[version][count:]
            for device, house in first:
                self._put(version, device, house)
            lacking += [version] * (count - len(first))
        for version in sorted(lacking, key=memory.replica_bytes, reverse=True):
            self._place(version)

    def grant(self, version: Version) -> bool:
        """One more replica of a deployed version: one that is there, or else one for which there is room."""
        while there := self._there[version]:
            device, house = there.pop(0)
            if self._room.fits(version, device, house):
                self._put(version, device, house)
                return True
        return self._place(version)

    def takes_place(self, version: Version, before: int) -> bool:
        """Whether one more replica, beside those before, takes one of the pool's places: a process."""
        return before > 0 or version not in self._memory.small

    def missing_bytes(self, version: Version) -> int:
        """How much is missing for one more replica on the device that has most left."""
        return self._room.missing_bytes(version)

    def _put(self, version: Version, device: str, house: str | None) -> None:
        self._room.put(version, device, house)
        self._own[version][device] += 1

    def _place(self, version: Version) -> bool:
        device = self._room.place(version, self._own[version], _house_of(version, self._memory))
        if device is not None:
            self._own[version][device] += 1
        return device is not None


def _house_of(version: Version, memory: Memory) -> str | None:
    """All small versions on a device are taken to share one more process."""
    return _ANY_HOUSE if version in memory.small else None


def refusal(
    version: Version, count: int, others: Mapping[Version, int], devices: Sequence[str], memory: Memory
) -> str | None:
    """Why a pool cannot hold so many replicas of a version beside the others; None: it can.

    Args:
        count: replicas of it, at least one; a model that sleeps must fit when it wakes.
        others: replicas that the other deployments have at least.
    """
    # The largest first packs well; the others first says what is left for this one.
    if not any(_packed(_largest_first({**others, version: count}, memory), devices, memory)[1].values()):
        return None
    room, homeless = _packed([*_each(others), *_each({version: count})], devices, memory)
    left = homeless[version]
    if not left:
        return None  # what lacks room lacks it without this one, too
    return (
        f"{version[0]}@{version[1]} does not fit: {memory.told(version)}, and beside what other deployments "
        f"have at least, {size(room.missing_bytes(version, left))} are missing for {left} of {count}"
    )


def _packed(
    replicas: Iterable[Version], devices: Sequence[str], memory: Memory
) -> tuple[Room, Counter[Version]]:
    """The devices with as many as fit, put one after the other, and those that did not."""
    room = Room(devices, memory)
    homeless = (v for v in replicas if room.place(v, house=_house_of(v, memory)) is None)
    return room, Counter(homeless)


def _largest_first(counts: Mapping[Version, int], memory: Memory) -> list[Version]:
    return sorted(_each(counts), key=memory.replica_bytes, reverse=True)


def _each(counts: Mapping[Version, int]) -> list[Version]:
    return [version for version, count in counts.items() for _ in range(count)]


def size(number_bytes: float) -> str:
    """For people."""
    for unit, one in (("GB", 1e9), ("MB", 1e6)):
        if number_bytes >= one:
            return f"{number_bytes / one:.3g} {unit}"
    return f"{number_bytes / 1e3:.0f} kB"
