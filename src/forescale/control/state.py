"""What the training controller knows between two events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from forescale.control.planner import Planner
from forescale.control.policy import Policy
from forescale.engine.messages import Binding, Repartition
from forescale.forecast.bank import ForecasterBank
from forescale.plan.partition_plan import PartitionPlan


class Trigger(StrEnum):
    """What a decision was about."""

    DEVIATION = "deviation"
    LOAD = "predicted load"
    MEMORY = "predicted memory"
    LOSS = "worker lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A question the controller answered: to change something, or to leave it.

    Attributes:
        step: the next step to run at that time.
        acted: whether it led to a command.
        reason: one sentence with the figures it rests on.
    """

    step: int
    trigger: Trigger
    acted: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceWatch:
    """A device's log ratios: observed over profiled compute seconds of a step, 0 = as profiled.

    Attributes:
        level: median of the next one, as forecast.
        observations: how many log ratios were taken since plans are made with about this reference.
        recent: the last of them, newest last.
        reference: the log ratio that plans are made with.
        band_above, band_below: how far from the reference an ordinary log ratio lies.
        above, below: evidence that it has left the band, in band widths.
        above_steps, below_steps: for how many steps that evidence has stood.
        present_steps, idle_steps: for how many steps the plan has, or has not, used the device.
        revisits: how many times an idle device was tried again without staying for long.
    """

    level: float = 0.0
    observations: int = 0
    recent: tuple[float, ...] = ()
    reference: float = 0.0
    band_above: float
    band_below: float
    above: float = 0.0
    below: float = 0.0
    above_steps: int = 0
    below_steps: int = 0
    present_steps: int = 0
    idle_steps: int = 0
    revisits: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A change that would pay, once what calls for it has lasted.

    Attributes:
        until_step: when it is judged again.
        estimates: the devices' log ratios it was weighed for.
    """

    until_step: int
    estimates: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class UseForecast:
    """What the next step is expected to use of a device: the median, and what 95 of 100 steps stay below.

    Attributes:
        busy_L: time in which it computes, as a fraction of the step's.
        busy_s_L: the same in seconds.
        memory_L: peak of tensor memory, as a fraction of its capacity; None where that is not measured.
    """

    busy_L: tuple[float, float]
    busy_s_L: tuple[float, float]
    memory_L: tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlState:
    """Everything the next decision depends on; begins as ``ControlState()``.

    Attributes:
        plan: the plan in force, None before the run has started.
        next_step: the first step that has not finished.
        ahead: known bindings by step, from ``next_step`` on.
        recent: bindings of the last finished steps, newest last.
        alike_steps: how many of the last batches were alike.
        pending: the last command to repartition, until it is carried out.
        unsettled_steps: steps that are still not to be judged.
        watches: by device.
        forecaster: of what the devices are used for, see :mod:`forescale.control.utilisation`; never changed,
            but replaced by one that has learned more. What it says is in ``watches`` and ``use``.
        use: by device, as expected of the next step; empty until a step under the plan was judged.
        speeds: estimated speeds by device; empty while all run as profiled.
        candidates: plans considered at these speeds, by class of batch; None where none fits.
        move_overhead_s: what a repartition is taken to cost beside sending; None until one was seen.
        moved_steps: when the plan was changed lately without a change of shape.
        judged_step, stays: when deviations were last judged, and how many times in a row that led to nothing.
        levels_step: when the devices' long-time levels were last judged.
        waiting: the deviation that has not lasted for long enough yet.
        reviewed_step, reviews: when the mixture of shapes was last looked at, and how many times in a row
            that led to nothing.
        decision: the last one.
    """

    plan: PartitionPlan | None = None
    next_step: int = 0
    ahead: Mapping[int, Binding] = field(default_factory=dict)
    recent: tuple[Binding, ...] = ()
    alike_steps: int = 0
    pending: Repartition | None = None
    unsettled_steps: int = 0
    watches: Mapping[str, DeviceWatch] = field(default_factory=dict)
    forecaster: ForecasterBank | None = field(default=None, compare=False, repr=False)
    use: Mapping[str, UseForecast] = field(default_factory=dict)
    speeds: Mapping[str, float] = field(default_factory=dict)
    candidates: Mapping[int, PartitionPlan | None] = field(default_factory=dict)
    move_overhead_s: float | None = None
    moved_steps: tuple[int, ...] = ()
    judged_step: int | None = None
    stays: int = 0
    levels_step: int = 0
    waiting: Waiting | None = None
    reviewed_step: int = 0
    reviews: int = 0
    decision: Decision | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig:
    """By which thresholds, and with whose plans, the controller decides."""

    policy: Policy
    planner: Planner
