"""How many replicas each model is to have: before demand comes, not after. Pure.

Three figures ask for replicas: the demand that is forecast for the time that a start takes (an upper
quantile of its peak), the demand of the last second, and a queue that would not be answered in time. The
largest wins, unless hindsight shows that it pays to keep more. Fewer are wanted only when none of them has
asked for more for a while. ``step`` says what it changes and why, with the figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, inf, isnan, nan

from forescale.control.capacity import BatchTimes, rows_in_time, rows_per_s
from forescale.control.demand import STEP_S, DemandForecast
from forescale.control.hindsight import Hindsight, Look
from forescale.control.memory import Budget, size
from forescale.registry.records import DeploymentSpec

_LIKELY = 0.5  # a model that has no replica gets one when more likely than not it is asked for
_GROWTH = 3.0  # times what was ever asked: forecasts of models that are new say anything
_TINY = 1e-9
_REMEMBERED_S = 7200.0  # after which a model that nobody asks for is forecast no more


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingRules:
    """How cautious scaling is.

    Attributes:
        level: of the quantile that stands for demand to come; None: only what is seen counts, and nothing is
            kept in hindsight.
        busy_share: of the time that a replica should work on what is seen; the rest is for chance, which a
            quantile of what is to come covers by itself.
        settle_s: fewer replicas are wanted when no more were needed for so long, if only what is seen counts.
        release_s: the same with forecasts, which say themselves what is to be kept.
        late_worth: a row that is late counts as much as so many that replicas could have answered, unasked.
        memory_s: how long bursts are remembered.
        idle_s: a model that may have none loses its last replica when nothing was asked for so long.
        catch_up_s: in what time a queue that is too long should be gone.
        faint_per_s: fewer rows than this, likely to come, keep no model awake.
        latency_s: target of models that were deployed without one.
        places_per_device: replicas that devices hold; what deployments ask for at least is always held.
    """

    level: float | None = 0.75
    busy_share: float = 0.8
    settle_s: float = 10.0
    release_s: float = 3.0
    late_worth: float = 6.0
    memory_s: float = 120.0
    idle_s: float = 60.0
    catch_up_s: float = 3.0
    faint_per_s: float = 0.5
    latency_s: float = 0.5
    places_per_device: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A deployed model as it is now.

    Attributes:
        arrived_rows: since it has been served, by all of its versions; refused ones count, too.
        batch_times: of the deployed version.
        max_rows: most rows of a batch.
        ready: replicas that answer.
        start_s: what a replica that is started now is expected to need until it answers.
    """

    spec: DeploymentSpec
    arrived_rows: int
    waiting_rows: int
    batch_times: BatchTimes
    max_rows: int
    ready: int
    start_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What is known of a model, and decided.

    Attributes:
        wanted: replicas.
        short: how many more it would have if the pool had room.
        reason: why so many.
        rate_per_s: rows asked for in the last second; NaN: not known yet.
        highest_per_s: of all such seconds.
        likely_per_s: what they may as well exceed as not while a replica starts; NaN: not forecast.
        peak_per_s: what they stay below then, most probably; NaN: not forecast.
        capacity_per_s: rows of one replica at the latency target; None: not measured.
        batch_rows: of the largest batch that is answered in time; None: not measured, or no time is set.
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
    highest_per_s: float = 0.0
    likely_per_s: float = nan
    peak_per_s: float = nan
    capacity_per_s: float | None = None
    batch_rows: int | None = None
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
    """A model gets another number of replicas than before, or the pool cannot hold what it needs."""

    model: str
    before: int
    scale: Scale


def step(
    state: ScalingState,
    loads: Sequence[Load],
    now_s: float,
    devices: int,
    rules: ScalingRules,
    budget: Budget | None = None,
) -> tuple[ScalingState, tuple[Decision, ...]]:
    """Decide. Call it a few times a second, and at once when a model without replicas is asked.

    Args:
        budget: of memory, with what all deployments have at least; None: there is enough.
    """
    models = {load.spec.model: _known(state, load, now_s) for load in loads}
    state = replace(state, models=models)
    if now_s - state.taken_s >= STEP_S - _TINY:
        state = _counted(state, loads, now_s, rules)
    needed = {load.spec.model: _needed(load, state.models[load.spec.model], now_s, rules) for load in loads}
    specs = [load.spec for load in loads]
    places = devices * rules.places_per_device
    given, missing = _shared(specs, needed, places, budget)
    after = {name: _cut(scale, given[name], missing.get(name), places) for name, scale in needed.items()}
    decisions = tuple(
        Decision(model=name, before=models[name].wanted, scale=scale)
        for name, scale in after.items()
        if (scale.wanted, scale.short) != (models[name].wanted, models[name].short)
    )
    return replace(state, models=after), decisions


def _known(state: ScalingState, load: Load, now_s: float) -> Scale:
    known = state.models.get(load.spec.model)
    if known is not None:
        return known
    # A new one is started even if it may have none: whether it can be served is seen at once. One that served
    # before this controller came keeps what it has, as if it had just been needed.
    least, found = max(1, load.spec.min_replicas), min(load.ready, load.spec.max_replicas)
    if found > least:
        return Scale(wanted=found, needs=((now_s, found),), active_s=now_s)
    return Scale(wanted=least, active_s=now_s)


def _counted(state: ScalingState, loads: Sequence[Load], now_s: float, rules: ScalingRules) -> ScalingState:
    """After a second more: the demand of each model in it, and what is forecast now."""
    elapsed_s = now_s - state.taken_s
    scaled = {load.spec.model: load for load in loads if _is_scaled(load.spec)}
    rates_per_s = {name: _rate_per_s(state.models[name], load, elapsed_s) for name, load in scaled.items()}
    leads_s = {name: load.start_s + STEP_S for name, load in scaled.items()}
    forecast, peaks_per_s = state.forecast, dict[str, list[float]]()
    # Of thousands of models most sleep: there is nothing to forecast of what nobody has asked for in long.
    asked = {name: rate for name, rate in rates_per_s.items() if _is_asked(state.models[name], rate, now_s)}
    if rules.level is not None and asked:
        forecast = forecast.taken_in(asked)
        leads_asked_s = {name: leads_s[name] for name in asked}
        peaks_per_s = forecast.peaks_per_s(leads_asked_s, sorted((_LIKELY, rules.level)))
    models = {load.spec.model: _batched(state.models[load.spec.model], load) for load in loads}
    for name, load in scaled.items():
        scale = models[name]
        latency_s = load.spec.latency_s or rules.latency_s
        highest_per_s = max(scale.highest_per_s, rates_per_s[name])  # in this order: NaN is no demand
        models[name] = replace(
            scale,
            arrived_rows=load.arrived_rows,
            rate_per_s=rates_per_s[name],
            highest_per_s=highest_per_s,
            likely_per_s=min(peaks_per_s.get(name, [nan])),
            peak_per_s=min(max(peaks_per_s.get(name, [nan])), highest_per_s * _GROWTH),
            lead_s=leads_s[name],
            capacity_per_s=rows_per_s(load.batch_times, load.max_rows, latency_s) or scale.capacity_per_s,
            active_s=now_s if rates_per_s[name] > 0.0 else scale.active_s,
        )
    return ScalingState(models=models, forecast=forecast, taken_s=now_s)


def _is_asked(scale: Scale, rate_per_s: float, now_s: float) -> bool:
    return rate_per_s > 0.0 or (scale.highest_per_s > 0.0 and now_s - scale.active_s < _REMEMBERED_S)


def _batched(scale: Scale, load: Load) -> Scale:
    latency_s = load.spec.latency_s
    rows = None if latency_s is None else rows_in_time(load.batch_times, load.max_rows, latency_s)
    return scale if rows == scale.batch_rows else replace(scale, batch_rows=rows)


def _rate_per_s(scale: Scale, load: Load, elapsed_s: float) -> float:
    # A version that left has taken its count with it.
    if scale.arrived_rows is None or load.arrived_rows < scale.arrived_rows:
        return nan
    return (load.arrived_rows - scale.arrived_rows) / elapsed_s


def _is_scaled(spec: DeploymentSpec) -> bool:
    return spec.min_replicas < spec.max_replicas


def _needed(load: Load, scale: Scale, now_s: float, rules: ScalingRules) -> Scale:
    """With as many replicas as the model needs, whatever others need."""
    spec = load.spec
    if not _is_scaled(spec):
        return replace(scale, wanted=spec.min_replicas, reason="as many as deployed")
    if load.waiting_rows:
        scale = replace(scale, active_s=now_s)
    if spec.min_replicas == 0 and _is_idle(load, scale, now_s, rules):
        idle_s = now_s - scale.active_s
        return replace(scale, wanted=0, needs=(), reason=f"nothing asked for {_seconds(idle_s)}")
    need, reason = _asked_for(load, scale, rules)
    if scale.wanted == 0:
        came = load.waiting_rows or scale.rate_per_s > 0.0
        reason = f"{'a request came' if came else 'a request is likely to come'}; {reason}"
    settle_s = rules.settle_s if rules.level is None else rules.release_s
    held, needs = _held(scale.needs, need, now_s, settle_s)
    if held > need:
        since_s = now_s - needs[0][0]
        reason = f"{held} were needed {_seconds(since_s)} ago; now {need}: {reason}"
    capacity_per_s = scale.capacity_per_s
    if rules.level is not None and capacity_per_s is not None:
        scale = _looked_back(load, scale, capacity_per_s, held, now_s, rules)
        kept, late_per_s = scale.hindsight.best(capacity_per_s, rules.late_worth)
        if kept > held:
            held = kept
            reason = f"{kept} are kept for bursts: with one, {_rate(late_per_s)} would be late; now {reason}"
    wanted = max(spec.min_replicas, min(held, spec.max_replicas))
    if wanted != held:
        limit = f"at least {wanted}" if wanted > held else f"at most {wanted}"
        reason += f"; {limit}, as deployed"
    return replace(scale, wanted=wanted, needs=needs, reason=reason)


def _looked_back(
    load: Load, scale: Scale, capacity_per_s: float, held: int, now_s: float, rules: ScalingRules
) -> Scale:
    hindsight, rows = scale.hindsight, load.arrived_rows - scale.looked_rows
    if scale.looked_s < now_s and rows >= 0:  # a version that left has taken its count with it
        look = Look(
            rows=rows,
            elapsed_s=now_s - scale.looked_s,
            asked=max(held, load.spec.min_replicas),
            start_s=load.start_s,
            capacity_per_s=capacity_per_s,
            latency_s=load.spec.latency_s or rules.latency_s,
            most=load.spec.max_replicas,
        )
        hindsight = hindsight.after(look, rules.memory_s)
    return replace(scale, hindsight=hindsight, looked_s=now_s, looked_rows=load.arrived_rows)


def _is_idle(load: Load, scale: Scale, now_s: float, rules: ScalingRules) -> bool:
    if load.waiting_rows or scale.likely_per_s >= rules.faint_per_s:
        return False
    if scale.wanted == 0:
        return not scale.rate_per_s > 0.0
    return now_s - scale.active_s >= rules.idle_s


def _asked_for(load: Load, scale: Scale, rules: ScalingRules) -> tuple[int, str]:
    """Replicas that forecast, demand or queue ask for, and which of them does."""
    rate_per_s = 0.0 if isnan(scale.rate_per_s) else scale.rate_per_s
    now = f"{_rate(rate_per_s)} now"
    if scale.capacity_per_s is None:
        return 1, f"{now}; what a replica can do is not known yet"
    latency_s = load.spec.latency_s or rules.latency_s
    each = f"a replica does {_rate(scale.capacity_per_s)} within {latency_s * 1e3:g} ms"
    asked = [(rate_per_s / rules.busy_share, f"{now}; {each}")]
    if not isnan(scale.peak_per_s):
        ahead = f"up to {_rate(scale.peak_per_s)} expected within {_seconds(scale.lead_s)}, {now}; {each}"
        asked.append((scale.peak_per_s, ahead))
    wait_s = load.waiting_rows / (load.ready * scale.capacity_per_s) if load.ready else inf
    if load.waiting_rows and wait_s > latency_s:
        waits = f", {_seconds(wait_s)} of work" if load.ready else ""
        queue = f"{load.waiting_rows} rows wait{waits}; {now}; {each}"
        asked.append(((rate_per_s + load.waiting_rows / rules.catch_up_s) / rules.busy_share, queue))
    demand_per_s, reason = max(asked, key=lambda each: each[0])
    return max(1, ceil(demand_per_s / scale.capacity_per_s - _TINY)), reason


def _held(
    needs: tuple[tuple[float, int], ...], need: int, now_s: float, settle_s: float
) -> tuple[int, tuple[tuple[float, int], ...]]:
    """The largest need of the last ``settle_s``, and what must be remembered to tell it later."""
    kept = [(at_s, count) for at_s, count in needs if count > need and now_s - at_s < settle_s]
    kept.append((now_s, need))
    return kept[0][1], tuple(kept)


def _shared(
    specs: Sequence[DeploymentSpec], needed: Mapping[str, Scale], places: int, budget: Budget | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Replicas of each model in a pool of so many places; and bytes that models lack for one more.

    All have what their deployments ask for at least. Then class after class (1 first), whoever of a class
    has fewest gets the next.
    """
    missing: dict[str, int] = {}
    given = {spec.model: min(spec.min_replicas, needed[spec.model].wanted) for spec in specs}
    left = places - sum(given.values())
    for priority in sorted({spec.priority for spec in specs}):
        mates = [spec for spec in specs if spec.priority == priority]
        while left > 0 and (
            short := [
                spec
                for spec in mates
                if given[spec.model] < needed[spec.model].wanted and spec.model not in missing
            ]
        ):
            spec = min(short, key=lambda each: given[each.model])
            version = spec.model, spec.number
            if budget is None or budget.grant(version):
                given[spec.model] += 1
                left -= 1
            else:
                missing[spec.model] = budget.missing_bytes(version)
    return given, missing


def _cut(scale: Scale, given: int, missing_bytes: int | None, places: int) -> Scale:
    """With as many replicas as it is given."""
    short = scale.wanted - given
    if not short:
        return replace(scale, short=0) if scale.short else scale
    cause = f"the pool's {places} places are taken by models of its class or before"
    if missing_bytes is not None:
        cause = f"{size(missing_bytes)} of memory are missing for one more"
    reason = f"{scale.reason}; {short} fewer than needed: {cause}"
    return replace(scale, wanted=given, short=short, reason=reason)


def _rate(per_s: float) -> str:
    return f"{per_s:.3g} rows/s" if per_s < 1000.0 else f"{per_s:.0f} rows/s"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10.0 else f"{seconds:.0f} s"
