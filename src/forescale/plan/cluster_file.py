"""Cluster files: TOML that says which devices there are and how they are joined (``docs/cluster.md``).

Pure: it takes texts. The command reads the user's file, and ``profiles.toml`` from the package.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from forescale.core.cluster import Link
from forescale.core.errors import InvalidInput
from forescale.profile.hardware import BANDWIDTH_EFFICIENCY, COMPUTE_EFFICIENCY

Kind = Literal["gpu", "cpu", "tpu", "fpga", "asic"]
_Positive = Annotated[float, Field(gt=0)]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceGroup:
    """Devices that are alike, named ``gpu0``, ``gpu1``, … for the name ``gpu``.

    Attributes:
        flops_per_s: what it sustains in float32; ``half_flops_per_s`` in bfloat16 or float16. This and the
            following are None where the file does not say.
        memory_bandwidth_bytes_per_s: what it sustains.
        speed_ratio: how fast it runs a graph that comes with times, relative to the device of those times.
        pays_transfers: whether sending and receiving takes its time.
    """

    name: str
    kind: Kind
    count: int
    flops_per_s: float | None
    half_flops_per_s: float | None
    memory_bytes: float
    memory_bandwidth_bytes_per_s: float | None
    speed_ratio: float | None
    pays_transfers: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Joins ``members`` units of the level below (devices, for the first) by ``link``."""

    name: str
    members: int
    link: Link


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """Between devices of one unit (a node, a rack, …) that no smaller unit holds.

    Attributes:
        devices: how many such a unit holds.
        links: those that are passed on the way.
    """

    devices: int
    links: tuple[Link, ...]

    def transfer_s(self, size_bytes: float) -> float:
        """The slowest of the links sets the pace."""
        return max(link.transfer_s(size_bytes) for link in self.links)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFile:
    """``levels``: from the innermost outwards; they hold the devices that pay for transfers."""

    groups: tuple[DeviceGroup, ...]
    levels: tuple[Level, ...]

    @property
    def distances(self) -> tuple[Distance, ...]:
        """How far devices can be from each other, the nearest first.

        Raises:
            InvalidInput: there are several devices and no level.
        """
        devices = _transferring(self.groups)
        if not self.levels:
            if sum(group.count for group in self.groups) > 1:
                raise InvalidInput("the cluster file does not join its devices; add [[topology]] with a link")
            return (Distance(devices=1, links=(Link(bandwidth_bytes_per_s=float("inf"), latency_s=0.0),)),)
        held = [*accumulate((level.members for level in self.levels), mul)]
        links = tuple(level.link for level in self.levels)
        needed = 1 + sum(capacity < devices for capacity in held)
        # A level of one member joins nothing, but is passed on the way outwards.
        return tuple(
            Distance(devices=held[level], links=links[: level + 1])
            for level in range(needed)
            if held[level] > ([1, *held][level]) or level == needed - 1
        )


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _ProfileTable(_Table):
    kind: Kind
    flops_per_s: _Positive
    half_flops_per_s: _Positive
    memory_bytes: _Positive
    memory_bandwidth_bytes_per_s: _Positive
    source: str


class _LinkTable(_Table):
    bandwidth_bytes_per_s: _Positive
    latency_s: Annotated[float, Field(ge=0)]
    source: str = ""


class _GroupTable(_Table):
    count: Annotated[int, Field(ge=1, le=1_000_000)]
    profile: str | None = None
    kind: Kind | None = None
    flops_per_s: _Positive | None = None
    half_flops_per_s: _Positive | None = None
    memory_bytes: _Positive | None = None
    memory_bandwidth_bytes_per_s: _Positive | None = None
    speed: _Positive | None = None
    pays_transfers: bool | None = None


class _LevelTable(_Table):
    name: str
    link: str
    size: Annotated[int, Field(ge=1)] | None = None


class _Profiles(_Table):
    devices: dict[str, _ProfileTable]
    links: dict[str, _LinkTable]


class _Cluster(_Table):
    devices: Annotated[dict[_Name, _GroupTable], Field(min_length=1)]
    links: dict[str, _LinkTable] = {}
    topology: list[_LevelTable] = []


_T = TypeVar("_T", bound=_Table)
_TABLES: Mapping[str | int, type[_Table]] = {
    "devices": _GroupTable,
    "links": _LinkTable,
    "topology": _LevelTable,
}


def read_cluster(text: str, *, profiles: str) -> ClusterFile:
    """The cluster that a TOML text describes.

    Args:
        profiles: the text of ``profiles.toml``, which names devices and links.

    Raises:
        InvalidInput: not TOML, an unknown key or name, a figure out of range, or devices that the topology
            does not hold; one line with the key and its line number.
    """
    known = _parse(profiles, _Profiles)
    file = _parse(text, _Cluster)
    groups = tuple(_group(name, table, known.devices, text) for name, table in file.devices.items())
    names = [f"{group.name}{number}" for group in groups for number in range(group.count)]
    if len(set(names)) < len(names):
        raise InvalidInput(
            "cluster file: two devices would have the same name, because a group is named like another one "
            "with a number after it; rename one"
        )
    return ClusterFile(groups=groups, levels=_levels(file, known.links, _transferring(groups), text))


def _transferring(groups: Sequence[DeviceGroup]) -> int:
    return sum(group.count for group in groups if group.pays_transfers)


def _group(name: str, table: _GroupTable, profiles: Mapping[str, _ProfileTable], text: str) -> DeviceGroup:
    place = ("devices", name)
    profile = (
        _named(table.profile, profiles, (*place, "profile"), text) if table.profile is not None else None
    )
    kind = table.kind or (profile.kind if profile else "gpu")
    memory_bytes = table.memory_bytes or (profile.memory_bytes if profile else None)
    if memory_bytes is None:
        raise _wrong(text, place, f"devices.{name} needs a profile or memory_bytes")
    # A profile has peaks; what the file says itself is taken as it stands.
    flops_per_s = table.flops_per_s or (profile and COMPUTE_EFFICIENCY * profile.flops_per_s)
    return DeviceGroup(
        name=name,
        kind=kind,
        count=table.count,
        flops_per_s=flops_per_s,
        half_flops_per_s=table.half_flops_per_s
        or (profile and COMPUTE_EFFICIENCY * profile.half_flops_per_s)
        or flops_per_s,
        memory_bytes=memory_bytes,
        memory_bandwidth_bytes_per_s=table.memory_bandwidth_bytes_per_s
        or (profile and BANDWIDTH_EFFICIENCY * profile.memory_bandwidth_bytes_per_s),
        speed_ratio=table.speed,
        pays_transfers=kind != "cpu" if table.pays_transfers is None else table.pays_transfers,
    )


def _levels(file: _Cluster, shipped: Mapping[str, _LinkTable], devices: int, text: str) -> tuple[Level, ...]:
    links = {**shipped, **file.links}
    levels: list[Level] = []
    held = 1
    for index, table in enumerate(file.topology):
        place = ("topology", index)
        last = index == len(file.topology) - 1
        if table.size is None and not last:
            raise _wrong(
                text, place, f"level {table.name} needs a size; only the outermost level may lack it"
            )
        # Without a size, the outermost level joins all there are.
        members = table.size or max(1, -(-devices // held))
        link = _named(table.link, links, (*place, "link"), text)
        levels.append(
            Level(
                name=table.name,
                members=members,
                link=Link(bandwidth_bytes_per_s=link.bandwidth_bytes_per_s, latency_s=link.latency_s),
            )
        )
        held *= members
    if levels and held < devices:
        raise _wrong(
            text,
            ("topology",),
            f"the topology holds {held} devices and the cluster has {devices}; leave out the outermost size",
        )
    return tuple(levels)


_V = TypeVar("_V")


def _named(name: str, table: Mapping[str, _V], place: Sequence[str | int], text: str) -> _V:
    if name not in table:
        raise _wrong(text, place, f"there is no {place[-1]} {name!r}; known are {', '.join(sorted(table))}")
    return table[name]


def _parse(text: str, kind: type[_T]) -> _T:
    try:
        return kind.model_validate(tomllib.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        raise _wrong(text, first["loc"], _explained(first, kind)) from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the cluster file is not TOML: {error}") from error


def _explained(error: Any, kind: type[_Table]) -> str:
    place: tuple[str | int, ...] = error["loc"]
    name = ".".join(str(part) for part in place)
    if error["type"] == "extra_forbidden":
        table = _TABLES.get(place[0], kind) if len(place) > 1 else kind
        return f"the key {name} is unknown; known there are {', '.join(sorted(table.model_fields))}"
    if error["type"] == "missing":
        return f"the key {name} is missing"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{name} is {str(error['input'])[:40]}; {message}"


def _wrong(text: str, place: Sequence[str | int], message: str) -> InvalidInput:
    line = _line(text, tuple(place))
    return InvalidInput(f"cluster file, line {line}: {message}" if line else f"cluster file: {message}")


_HEADER = re.compile(r"\s*(\[\[?)([^\[\]]+)\]")
_KEY = re.compile(r"\s*([\w.\"'-]+)\s*=")


def _line(text: str, place: tuple[str | int, ...]) -> int | None:
    """Number of the line of a key, or else of the innermost table around it that has a line of its own."""
    line_of: dict[tuple[str | int, ...], int] = {}
    table: tuple[str | int, ...] = ()
    entries: dict[tuple[str | int, ...], int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if header := _HEADER.match(line):
            table = _path(header[2])
            if header[1] == "[[":
                entries[table] = entries.get(table, -1) + 1
                line_of.setdefault(table, number)
                table = (*table, entries[table])
            line_of.setdefault(table, number)
        elif key := _KEY.match(line):
            line_of.setdefault((*table, *_path(key[1])), number)
    found = (line_of.get(place[:length]) for length in range(len(place), 0, -1))
    return next((number for number in found if number), None)


def _path(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))
