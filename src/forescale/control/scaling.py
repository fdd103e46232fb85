"""How many replicas each model is to have: before demand comes, not after. Pure.

Three figures ask for replicas: the demand that is forecast for the time that a start takes (an upper
quantile of its peak), the demand of the last second, and a queue that would not be answered in time. The
largest wins, unless hindsight shows that it pays to keep more. Fewer are wanted only when none of them has
asked for more for a while. Where cores are idle, more threads may do instead (``threads.py``). ``step`` says
what it changes and why, with the figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, inf, isnan, nan
from typing import TypeVar

from forescale.control.capacity import rows_per_s, times_with
from forescale.control.demand import STEP_S
from forescale.control.hindsight import Look
from forescale.control.memory import Budget, size
from forescale.control.scale import Decision, Load, Scale, ScalingRules, ScalingState
from forescale.control.sharing import shared
from forescale.control.threads import Cores, Want, batch_rows, choose

_N = TypeVar("_N", int, float)

_LIKELY = 0.5  # a model that has no replica gets one when more likely than not it is asked for
_TINY = 1e-9


def step(
    state: ScalingState,
    loads: Sequence[Load],
    now_s: float,
    devices: int,
    rules: ScalingRules,
    *,
    budget: Budget | None = None,
    cores: Mapping[str, int] | None = None,
) -> tuple[ScalingState, tuple[Decision, ...]]:
    """Decide. Call it a few times a second, and at once when a model without replicas is asked.

    Args:
        budget: of memory, with what all deployments have at least; None: there is enough.
        cores: of CPU devices; where nothing is said, threads stay as they are.
    """
    models = {load.spec.model: _known(state, load, now_s) for load in loads}
    state = replace(state, models=models)
    busy = (_busy(load, models[load.spec.model]) for load in loads if load.replicas)
    free = Cores(cores or {}, busy)
    if is_counting(state, now_s):
        state = _counted(state, loads, now_s, rules, free)
    needed: dict[str, Scale] = {}
    for load in sorted(loads, key=lambda load: load.spec.priority):
        name = load.spec.model
        needed[name] = _needed(load, state.models[name], now_s, rules, free)
        if load.replicas:
            free.take(*_busy(load, needed[name]))
    specs = [load.spec for load in loads]
    places = devices * rules.places_per_device
    wanted = {name: scale.wanted for name, scale in needed.items()}
    given, missing = shared(specs, wanted, places, budget)
    after = {name: _cut(scale, given[name], missing.get(name), places) for name, scale in needed.items()}
    decisions = tuple(
        Decision(model=name, before=models[name].wanted, threads_before=models[name].threads, scale=scale)
        for name, scale in after.items()
        if _differs(scale, models[name])
    )
    return replace(state, models=after), decisions


def is_counting(state: ScalingState, now_s: float) -> bool:
    """Whether ``step`` would count demand now: once a second."""
    return now_s - state.taken_s >= STEP_S - _TINY


def _differs(scale: Scale, before: Scale) -> bool:
    threads_before = before.threads or scale.threads  # to begin with some is no change
    return (scale.wanted, scale.short, scale.threads) != (before.wanted, before.short, threads_before)


def _known(state: ScalingState, load: Load, now_s: float) -> Scale:
    known = state.models.get(load.spec.model)
    if known is not None:
        return known
    # A new one is started even if it may have none: whether it can be served is seen at once. One that served
    # before this controller came keeps what it has, as if it had just been needed.
    least = load.spec.min_replicas if load.was_ready else max(1, load.spec.min_replicas)
    found = min(load.ready, load.spec.max_replicas)
    needs = ((now_s, found),) if found > least else ()
    return Scale(wanted=max(least, found), needs=needs, active_s=now_s, threads=load.threads)


def _busy(load: Load, scale: Scale) -> tuple[str, float, Mapping[str, int]]:
    """Cores that each replica keeps busy: all it was given, or as measured if that is one."""
    threads = scale.threads or 1
    each = float(threads) if threads > 1 else scale.busy_cores / max(1, sum(load.replicas.values()))
    return load.spec.model, each, load.replicas


def _most_threads(load: Load, free: Cores) -> tuple[int, int] | None:
    """That each of a model's replicas may have, and all together; None: they stay as they are."""
    room = free.room(load.spec.model) if load.is_resizable else None
    return room and (min(room[0], load.spec.max_threads or room[0]), room[1])


def _counted(
    state: ScalingState, loads: Sequence[Load], now_s: float, rules: ScalingRules, free: Cores
) -> ScalingState:
    """After a second more: the demand of each model in it, and what is forecast now."""
    elapsed_s = now_s - state.taken_s
    scaled = {
        load.spec.model: load for load in loads if _is_scaled(load, state.models[load.spec.model], free)
    }
    rates_per_s = {name: _rate_per_s(state.models[name], load, elapsed_s) for name, load in scaled.items()}
    leads_s = {name: load.start_s + STEP_S for name, load in scaled.items()}
    forecast, peaks_per_s = state.forecast, dict[str, list[float]]()
    if rules.level is not None:
        forecast = forecast.taken_in(rates_per_s, now_s)
        peaks_per_s = forecast.peaks_per_s(leads_s, sorted((_LIKELY, rules.level)))
    models = {load.spec.model: _batched(state.models[load.spec.model], load) for load in loads}
    for name, load in scaled.items():
        scale = models[name]
        models[name] = replace(
            scale,
            arrived_rows=load.arrived_rows,
            rate_per_s=rates_per_s[name],
            likely_per_s=min(peaks_per_s.get(name, [nan])),
            peak_per_s=max(peaks_per_s.get(name, [nan])),
            lead_s=leads_s[name],
            capacity_per_s=_capacity_per_s(load, scale.threads, rules) or scale.capacity_per_s,
            busy_cores=max(0.0, load.busy_core_s - scale.busy_core_s) / elapsed_s,
            busy_core_s=load.busy_core_s,
            active_s=now_s if rates_per_s[name] > 0.0 else scale.active_s,
        )
    return ScalingState(models=models, forecast=forecast, taken_s=now_s)


def _capacity_per_s(load: Load, threads: int | None, rules: ScalingRules) -> float | None:
    times = times_with(load.batch_times, threads)
    return rows_per_s(times, load.max_rows, load.spec.latency_s or rules.latency_s)


def _batched(scale: Scale, load: Load) -> Scale:
    latency_s = load.spec.latency_s
    rows = None
    if latency_s is not None:
        rows = batch_rows(load.batch_times, scale.threads, load.max_rows, latency_s)
    return scale if rows == scale.batch_rows else replace(scale, batch_rows=rows)


def _rate_per_s(scale: Scale, load: Load, elapsed_s: float) -> float:
    # A version that left has taken its count with it.
    if scale.arrived_rows is None or load.arrived_rows < scale.arrived_rows:
        return nan
    return (load.arrived_rows - scale.arrived_rows) / elapsed_s


def _is_scaled(load: Load, scale: Scale, free: Cores) -> bool:
    if load.spec.min_replicas < load.spec.max_replicas or (scale.threads or 1) > 1:
        return True
    room = _most_threads(load, free)
    return room is not None and room[0] > 1


def _needed(load: Load, scale: Scale, now_s: float, rules: ScalingRules, free: Cores) -> Scale:
    """With as many replicas and threads as the model needs, whatever others need."""
    spec = load.spec
    if not _is_scaled(load, scale, free):
        return replace(scale, wanted=spec.min_replicas, reason="as many as deployed")
    if load.waiting_rows:
        scale = replace(scale, active_s=now_s)
    if spec.min_replicas == 0 and _is_idle(load, scale, now_s, rules):
        if scale.wanted == 0:
            return scale  # as it is, for thousands sleep: the reason is still why it went to sleep
        idle_s = now_s - scale.active_s
        return replace(scale, wanted=0, needs=(), reason=f"nothing asked for {_seconds(idle_s)}")
    demand_per_s, reason = _asked_for(load, scale, rules)
    settle_s = _settle_s(load, rules)
    scale = _threaded(load, scale, demand_per_s, now_s, rules, free)
    capacity_per_s = scale.capacity_per_s
    need = 1 if capacity_per_s is None else max(1, ceil(demand_per_s / capacity_per_s - _TINY))
    reason = f"{reason}; {_can_do(scale, spec.latency_s or rules.latency_s, now_s)}"
    if scale.wanted == 0:
        came = load.waiting_rows or scale.rate_per_s > 0.0
        reason = f"{'a request came' if came else 'a request is likely to come'}; {reason}"
    held, needs = _held(scale.needs, need, now_s, settle_s)
    if held > need:
        since_s = now_s - needs[0][0]
        reason = f"{held} were needed {_seconds(since_s)} ago; now {need}: {reason}"
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


def _settle_s(load: Load, rules: ScalingRules) -> float:
    return rules.settle_s if rules.level is None else max(rules.release_s, load.start_s)


def _is_idle(load: Load, scale: Scale, now_s: float, rules: ScalingRules) -> bool:
    if load.waiting_rows or scale.likely_per_s >= rules.faint_per_s:
        return False
    if scale.wanted == 0:
        return not scale.rate_per_s > 0.0
    return now_s - scale.active_s >= rules.idle_s


def _asked_for(load: Load, scale: Scale, rules: ScalingRules) -> tuple[float, str]:
    """Rows per second that forecast, demand or queue ask for, and which of them does."""
    rate_per_s = 0.0 if isnan(scale.rate_per_s) else scale.rate_per_s
    now = f"{_rate(rate_per_s)} now"
    asked = [(rate_per_s / rules.busy_share, now)]
    if scale.capacity_per_s is None:
        return asked[0]
    if not isnan(scale.peak_per_s):
        ahead = f"up to {_rate(scale.peak_per_s)} expected within {_seconds(scale.lead_s)}, {now}"
        asked.append((scale.peak_per_s, ahead))
    latency_s = load.spec.latency_s or rules.latency_s
    wait_s = load.waiting_rows / (load.ready * scale.capacity_per_s) if load.ready else inf
    waits = f", {_seconds(wait_s)} of work" if load.ready else ""
    queue = f"{load.waiting_rows} rows wait{waits}; {now}"
    if load.waiting_rows and wait_s > latency_s:
        asked.append(((rate_per_s + load.waiting_rows / rules.catch_up_s) / rules.busy_share, queue))
    if rules.level is not None:
        # They will be late, and who comes after them, if what answers them is started once they are.
        soon_s = rules.soon_share * max(load.start_s, latency_s / 2.0)
        asked.append((load.waiting_rows / soon_s, queue))
    return max(asked, key=lambda each: each[0])


def _can_do(scale: Scale, latency_s: float, now_s: float) -> str:
    if scale.capacity_per_s is None:
        return "what a replica can do is not known yet"
    told = f"a replica does {_rate(scale.capacity_per_s)} within {latency_s * 1e3:g} ms"
    if (scale.batch_rows or 1) > 1:
        told += f" in batches of {scale.batch_rows}"
    if scale.threads_reason is None:
        return told
    told = f"{told} with {scale.threads} thread{'s' * (scale.threads != 1)}"
    return f"{told}: {scale.threads_reason}" if scale.changed_s == now_s else told


def _threaded(
    load: Load, scale: Scale, demand_per_s: float, now_s: float, rules: ScalingRules, free: Cores
) -> Scale:
    """With as many threads as are cheapest, if other ones may be had."""
    room = _most_threads(load, free)
    if room is None:
        return scale if scale.threads is None else replace(scale, threads=None, threads_reason=None)
    spec, before = load.spec, scale.threads or load.threads or 1
    settle_s = _settle_s(load, rules)
    demand_per_s, asked = _held(scale.asked, demand_per_s, now_s, settle_s)
    threads, reason = min(before, spec.max_threads or before), None
    times = {
        each: seconds
        for each, seconds in load.batch_times.items()
        if each <= before or now_s - scale.ran_s.get(each, now_s) < rules.evidence_s
    }
    if times and scale.wanted and now_s - scale.changed_s >= rules.trial_s:
        want = Want(
            times=times,
            max_rows=load.max_rows,
            latency_s=spec.latency_s or rules.latency_s,
            demand_per_s=demand_per_s,
            least=max(1, spec.min_replicas),
            most=scale.wanted if scale.short else spec.max_replicas,
            most_threads=room[0],
            cores=room[1],
            start_s=load.start_s,
            start_core_s=load.start_core_s,
            withheld_cores=load.withheld_cores,
            late_worth=rules.late_worth,
            horizon_s=rules.horizon_s,
        )
        threads, reason = choose(threads, scale.wanted, want)
    scale = replace(scale, threads=threads, asked=asked)
    if threads == before:
        return scale
    scale = replace(
        scale,
        ran_s={**scale.ran_s, before: now_s},
        threads_reason=reason or "no more, as deployed",
        changed_s=now_s,
        capacity_per_s=_capacity_per_s(load, threads, rules) or scale.capacity_per_s,
    )
    return _batched(scale, load)


def _held(
    needs: tuple[tuple[float, _N], ...], need: _N, now_s: float, settle_s: float
) -> tuple[_N, tuple[tuple[float, _N], ...]]:
    """The largest need of the last ``settle_s``, and what must be remembered to tell it later."""
    kept = [(at_s, count) for at_s, count in needs if count > need and now_s - at_s < settle_s]
    kept.append((now_s, need))
    return kept[0][1], tuple(kept)


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
