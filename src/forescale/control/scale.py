"""What scaling goes by, what it is told of a model, and what it knows and decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, nan

from forescale.control.capacity import ThreadTimes
from forescale.control.demand import DemandForecast
from forescale.control.hindsight import Hindsight
from forescale.registry.records import DeploymentSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingRules:
    """How cautious scaling is.

    Attributes:
        level: of the quantile that stands for demand to come; None: only what is seen counts, and nothing is
            kept in hindsight.
        busy_share: of the time that a replica should work on what is seen; the rest is for chance, which a
            quantile of what is to come covers by itself.
        settle_s: fewer replicas are wanted when no more were needed for so long, if only what is seen counts.
        release_s: the same with forecasts, which say themselves what is to be kept, or what a start takes.
        late_worth: a row that is late counts as much as so many that replicas could have answered, unasked.
        memory_s: how long bursts are remembered.
        idle_s: a model that may have none loses its last replica when nothing was asked for so long.
        catch_up_s: in what time a queue that is too long should be gone.
        soon_share: of the time that a start takes, or of half the latency if that is longer, in which any
            queue should be gone, if not only what is seen counts.
        trial_s: threads are changed again only after so long, to see what came of it.
        evidence_s: what more threads than now are worth is measured again after so long.
        horizon_s: for how long threads and replicas are priced against each other.
        faint_per_s: fewer rows than this, likely to come, keep no model awake.
        latency_s: target of models that were deployed without one.
        places_per_device: replicas that devices hold; what deployments ask for at least is always held.
    """

    level: float | None = 0.75
    busy_share: float = 0.8
    settle_s: float = 10.0
    release_s: float = 2.0
    late_worth: float = 6.0
    memory_s: float = 120.0
    idle_s: float = 60.0
    catch_up_s: float = 3.0
    soon_share: float = 0.2
    trial_s: float = 2.0
    evidence_s: float = 300.0
    horizon_s: float = 30.0
    faint_per_s: float = 0.5
    latency_s: float = 0.5
    places_per_device: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A deployed model as it is now.

    Attributes:
        arrived_rows: since it has been served, by all of its versions; refused ones count, too.
        batch_times: of the deployed version, as all below.
        max_rows: most rows of a batch.
        ready: replicas that answer, of any version.
        start_s: what a replica that is started now is expected to need until it answers.
        start_core_s: what starting takes of cores, its spare's successor included.
        threads: of each replica; None: as many as its device has cores.
        is_resizable: whether they can be changed.
        busy_core_s: that its batches have taken so far.
        replicas: by device.
        was_ready: whether a replica has ever answered.
        withheld_cores: cores that go with the memory that a replica takes.
    """

    spec: DeploymentSpec
    arrived_rows: int
    waiting_rows: int
    batch_times: ThreadTimes
    max_rows: int
    ready: int
    start_s: float
    start_core_s: float = 0.0
    threads: int | None = None
    is_resizable: bool = True
    busy_core_s: float = 0.0
    replicas: Mapping[str, int] = field(default_factory=dict[str, int])
    was_ready: bool = False
    withheld_cores: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What is known of a model, and decided.

    Attributes:
        wanted: replicas.
        short: how many more it would have if the pool had room.
        reason: why so many.
        rate_per_s: rows asked for in the last second; NaN: not known yet.
        likely_per_s: what they may as well exceed as not while a replica starts; NaN: not forecast.
        peak_per_s: what they stay below then, most probably; NaN: not forecast.
        capacity_per_s: rows of one replica at the latency target; None: not measured.
        batch_rows: of the largest batch that is answered in time; None: not measured, or no time is set.
        threads: of each replica; None: as many as its device has cores.
        threads_reason: why so many, if they were changed.
        changed_s: when they were changed last.
        ran_s: when each number of them was in use last.
        busy_cores: that its batches took in the last second.
        asked: when which demand was to be met: those that nothing since has surpassed.
        lead_s: how far ahead the forecast looks.
        needs: when how many replicas were needed: those that nothing since has surpassed.
        active_s: when something was asked last.
        hindsight: what it would have been worth to keep more.
        looked_s: when it was told last, after ``looked_rows``.
    """

    wanted: int
    short: int = 0
    reason: str = "deployed"
    rate_per_s: float = nan
    likely_per_s: float = nan
    peak_per_s: float = nan
    capacity_per_s: float | None = None
    batch_rows: int | None = None
    threads: int | None = None
    threads_reason: str | None = None
    changed_s: float = -inf
    ran_s: Mapping[int, float] = field(default_factory=dict[int, float])
    busy_cores: float = 0.0
    busy_core_s: float = 0.0
    asked: tuple[tuple[float, float], ...] = ()
    lead_s: float = 0.0
    arrived_rows: int | None = None
    needs: tuple[tuple[float, int], ...] = ()
    active_s: float
    hindsight: Hindsight = field(default_factory=Hindsight, compare=False)
    looked_s: float = inf
    looked_rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingState:
    """Of all models, by name; ``taken_s`` is when demand was last counted."""

    models: Mapping[str, Scale] = field(default_factory=dict[str, Scale])
    forecast: DemandForecast = field(default_factory=DemandForecast)
    taken_s: float = -inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A model gets other replicas or threads than before, or the pool cannot hold what it needs."""

    model: str
    before: int
    threads_before: int | None
    scale: Scale
