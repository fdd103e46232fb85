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
    """

    room_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    process_bytes: int = 0
    model_bytes: Mapping[Version, int] = field(default_factory=dict[Version, int])
    measured: frozenset[Version] = frozenset()

    def replica_bytes(self, version: Version) -> int:
        """What a replica of a version takes."""
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

    def fits(self, version: Version, device: str) -> bool:
        """Whether one more replica of the version would."""
        return self._memory.replica_bytes(version) <= self._free.get(device, -inf)

    def put(self, version: Version, device: str) -> None:
        """A replica is there, whether it fits or not."""
        self._free[device] = self._free.get(device, 0.0) - self._memory.replica_bytes(version)
        self._replicas[device] += 1

    def place(self, version: Version, own: Counter[str]) -> str | None:
        """Put one more replica where it is best; None: nowhere is room.

        Args:
            own: replicas of the version by device. Two on one device would share what one could use alone.
        """
        fitting = [device for device in self._free if self.fits(version, device)]
        if not fitting:
            return None
        device = min(fitting, key=lambda name: (own[name], self._replicas[name]))
        self.put(version, device)
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
        kept: version and device of the deployed versions' replicas, in the order in which they are kept.
        others: of those that leave, or that no deployment counts: they are there as long as they are.
        least: replicas of each deployed version that are granted before all others.
    """

    def __init__(
        self,
        devices: Sequence[str],
        memory: Memory,
        kept: Iterable[tuple[Version, str]],
        others: Iterable[tuple[Version, str]],
        least: Mapping[Version, int],
    ) -> None:
        self._room = Room(devices, memory)
        self._own: dict[Version, Counter[str]] = {version: Counter() for version in least}
        self._there: dict[Version, list[str]] = {version: [] for version in least}
        for version, device in others:
            self._room.put(version, device)
        for version, device in kept:
            self._there[version].append(device)
        lacking: list[Version] = []
        for version, count in least.items():
            first, self._there[version] = self._there[version][:count], self._there[version][count:]
            for device in first:
                self._put(version, device)
            lacking += [version] * (count - len(first))
        for version in sorted(lacking, key=memory.replica_bytes, reverse=True):
            self._place(version)

    def grant(self, version: Version) -> bool:
        """One more replica of a deployed version: one that is there, or else one for which there is room."""
        while there := self._there[version]:
            device = there.pop(0)
            if self._room.fits(version, device):
                self._put(version, device)
                return True
        return self._place(version)

    def missing_bytes(self, version: Version) -> int:
        """How much is missing for one more replica on the device that has most left."""
        return self._room.missing_bytes(version)

    def _put(self, version: Version, device: str) -> None:
        self._room.put(version, device)
        self._own[version][device] += 1

    def _place(self, version: Version) -> bool:
        device = self._room.place(version, self._own[version])
        if device is not None:
            self._own[version][device] += 1
        return device is not None


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
    return room, Counter(version for version in replicas if room.place(version, Counter()) is None)


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
