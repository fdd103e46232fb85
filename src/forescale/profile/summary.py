"""What a profile says to people: which modules cost most, and what limits the model on a device.

Axes: O = operator.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from forescale.core.cluster import Device
from forescale.graph.model import ModelGraph
from forescale.graph.size import evaluate, tensor_bytes
from forescale.profile.measurement import Array
from forescale.profile.model import ModelProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleCost:
    """One module's own operators, without those of modules inside it (unless paths were cut to a depth).

    Attributes:
        path: the user's name, ``""`` for the model itself.
        fraction: of the seconds of the whole microbatch, 0 to 1.
        parameter_bytes: each parameter counts where it is read first.
    """

    path: str
    forward_s: float
    backward_s: float
    fraction: float
    flops: float
    parameter_bytes: int


def costliest_modules(
    profile: ModelProfile, binding: Mapping[str, int], device: Device, *, depth: int | None = None
) -> tuple[ModuleCost, ...]:
    """All modules, the costliest first.

    Args:
        depth: paths are cut to that many names, so that ``blocks.0.attn.qkv`` counts for ``blocks.0`` at 2.
    """
    costs = profile.microbatch_costs(binding, [device])
    work = profile.work(binding)
    forward_s_O, backward_s_O = costs["forward_s_DO"][0], costs["backward_s_DO"][0]
    flops_O = work.forward_flops_O + work.backward_flops_O
    total_s = float(forward_s_O.sum() + backward_s_O.sum())
    members: dict[str, list[int]] = defaultdict(list)
    for operator in profile.graph.operators:
        members[".".join(operator.module_path.split(".")[:depth])].append(operator.index)
    parameter_bytes_O = _parameter_bytes(profile.graph)
    modules = [
        ModuleCost(
            path=path,
            forward_s=float(forward_s_O[indices].sum()),
            backward_s=float(backward_s_O[indices].sum()),
            fraction=float(forward_s_O[indices].sum() + backward_s_O[indices].sum()) / total_s,
            flops=float(flops_O[indices].sum()),
            parameter_bytes=int(parameter_bytes_O[indices].sum()),
        )
        for path, indices in members.items()
    ]
    return tuple(sorted(modules, key=lambda module: -module.fraction))


def _parameter_bytes(graph: ModelGraph) -> Array:
    size_bytes_O = np.zeros(len(graph.operators))
    for name, readers in graph.parameter_readers.items():
        if readers:
            parameter = graph.parameters[name]
            size_bytes_O[readers[0]] += evaluate(tensor_bytes(parameter.shape, parameter.dtype), {})
    return size_bytes_O


class Limit(StrEnum):
    """What a model's speed, or its running at all, hangs on."""

    COMPUTE = "compute"
    BANDWIDTH = "memory bandwidth"
    DISPATCH = "starting of operators"
    LINK = "link"
    CAPACITY = "memory capacity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """The limit that matters most, with every limit's share of the time, 0 to 1."""

    limit: Limit
    fractions: Mapping[Limit, float]
    reason: str


def find_bottleneck(
    profile: ModelProfile,
    binding: Mapping[str, int],
    device: Device,
    *,
    needed_bytes: float = 0.0,
    link_s: float = 0.0,
) -> Bottleneck:
    """Names the bottleneck of one microbatch on one device.

    An operator's seconds count for the largest term of its roofline: arithmetic, traffic or start.

    Args:
        device: with measured rates; without, the rates fitted to the model's own operators are used.
        needed_bytes: peak memory the plan needs on it.
        link_s: seconds of one microbatch in which the device waits for transfers or makes them.
    """
    roofline = profile.roofline(device.kind)
    flops_per_s = device.flops_per_s or roofline.flops_per_s
    bytes_per_s = device.memory_bandwidth_bytes_per_s or roofline.bytes_per_s
    work = profile.work(binding)
    costs = profile.microbatch_costs(binding, [device])
    spent_s: dict[Limit, float] = dict.fromkeys((Limit.COMPUTE, Limit.BANDWIDTH, Limit.DISPATCH), 0.0)
    for seconds_O, flops_O, bytes_O in (
        (costs["forward_s_DO"][0], work.forward_flops_O, work.forward_bytes_O),
        (costs["backward_s_DO"][0], work.backward_flops_O, work.backward_bytes_O),
    ):
        terms = [flops_O / flops_per_s, bytes_O / bytes_per_s, np.full(len(flops_O), roofline.dispatch_s)]
        largest_O = np.argmax(np.stack(terms), axis=0)
        for position, limit in enumerate(spent_s):
            spent_s[limit] += float(seconds_O[largest_O == position].sum())
    spent_s[Limit.LINK] = link_s
    total_s = sum(spent_s.values())
    fractions = {limit: seconds / total_s for limit, seconds in spent_s.items()}
    if needed_bytes > device.memory_bytes:
        missing = needed_bytes - device.memory_bytes
        reason = f"{device.name} is short of {missing:,.0f} bytes"
        return Bottleneck(limit=Limit.CAPACITY, fractions=fractions, reason=reason)
    limit = max(fractions, key=lambda each: fractions[each])
    reason = f"{fractions[limit]:.0%} of the time on {device.name} goes to {limit}"
    return Bottleneck(limit=limit, fractions=fractions, reason=reason)
