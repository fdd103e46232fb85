"""Devices that are slower or faster than planned for.

Each step gives one log ratio per device: observed over profiled compute seconds, for that plan and that
batch. Deviations from the log ratio planned with are measured in half widths of the device's own band
(the 5% and 95% quantiles forecast from the ordinary ones so far), clipped, and summed up less an allowance: a
two-sided CUSUM (Page, "Continuous inspection schemes", Biometrika, 1954) that neither a single outlier nor
noise inside the band can push over its threshold. What then stands is the median of the last log ratios
since the sum was nil. A plan for it is taken once it would already have got ahead of the plan in force by
some steps: other programs on the same host slow a core down for some seconds all the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, exp, log
from statistics import median

from forescale.control.choice import Choice, asked_gain, fits, moved, weigh
from forescale.control.planner import Planner
from forescale.control.policy import Policy
from forescale.control.state import ControlConfig, ControlState, Decision, DeviceWatch, Trigger, Waiting
from forescale.control.utilisation import observe, with_expected_use
from forescale.engine.messages import Binding, Command, Repartition, StepFinished
from forescale.plan.partition_plan import PartitionPlan
from forescale.plan.wording import spell_count

_RECENT = 128  # log ratios kept, to see for how long a shift has stood
_ESTIMATED = 8  # of them, at most, that the estimate after a shift rests on
_SUBMITTED = 2  # steps that may be under way already when one has finished
_MAX_STAYS = 5  # doublings of the cool-down after decisions to stay
_MAX_REVISITS = 6  # doublings of the time after which an idle device is tried again


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """Of a new plan: the fraction of the step time it saves, and the steps it must have got ahead by now."""

    gain: float
    patience_steps: float


def compared(plan: PartitionPlan, event: StepFinished, planner: Planner) -> Mapping[str, float] | None:
    """Log ratios by device; None if these are reports of a step of the plan before, which say nothing."""
    demand = planner.demand(plan, event.binding)
    observed_s: dict[str, float] = {}
    for report in event.stages:
        if (time_s := report.forward_s + report.backward_s) > 0.0:  # idle devices report, too
            observed_s[report.device] = observed_s.get(report.device, 0.0) + time_s
    if observed_s.keys() != demand.keys():
        return None
    return {
        device: log(time_s / demand[device].compute_s)
        for device, time_s in observed_s.items()
        if demand[device].compute_s > 0.0
    }


def watch(state: ControlState, event: StepFinished, config: ControlConfig) -> ControlState:
    """Compare one step's reports with what its plan and batch were profiled to take; forecast the next."""
    assert state.plan is not None
    policy = config.policy
    log_ratios = compared(state.plan, event, config.planner)
    if log_ratios is None:
        return state
    known = {**dict.fromkeys(log_ratios, _unknown(policy)), **state.watches}
    watches = {
        device: _observed(one, log_ratios[device], policy)
        if device in log_ratios
        else replace(one, idle_steps=one.idle_steps + 1, present_steps=0)
        for device, one in known.items()
    }
    # Evidence is not learned from: what is being judged must not widen the band.
    ordinary = {
        device: log_ratio - watches[device].reference
        for device, log_ratio in log_ratios.items()
        if max(watches[device].above, watches[device].below) < policy.clip - policy.allowance
    }
    state, forecasts = observe(replace(state, watches=watches), event, ordinary, config.planner)
    return replace(
        state,
        watches={
            device: _expecting(one, forecasts[device], policy) if device in ordinary else one
            for device, one in watches.items()
        },
    )


def react(state: ControlState, config: ControlConfig) -> tuple[ControlState, tuple[Command, ...]]:
    """Re-estimate the speeds and change the plan, when the evidence stands and it pays."""
    policy = config.policy
    deviating = {name: w for name, w in state.watches.items() if max(w.above, w.below) > policy.evidence}
    if not deviating:
        return _look_again(replace(state, waiting=None), config)
    estimates = {name: _estimate(w) if name in deviating else w.level for name, w in state.watches.items()}
    if not _due(state, estimates, policy):
        return _look_again(state, config)
    reason = "; ".join(_finding(name, w, estimates[name]) for name, w in deviating.items())
    asked = _Asked(gain=asked_gain(state, policy), patience_steps=policy.patience_steps)
    return _replan(state, estimates, _in_view(state), reason, asked, config)


def _look_again(state: ControlState, config: ControlConfig) -> tuple[ControlState, tuple[Command, ...]]:
    """At idle devices, and at what only a long time shows."""
    if state.pending is not None:
        return state, ()
    state, commands = _revisit(state, config)
    return (state, commands) if commands else _review(state, config)


def _review(state: ControlState, config: ControlConfig) -> tuple[ControlState, tuple[Command, ...]]:
    """Judge the levels of a long time: a shift too small to be answered at once may have come to stay."""
    assert state.plan is not None
    used = {stage.device for stage in state.plan.stages}
    watches = state.watches
    judged_step = max(state.levels_step, state.judged_step or 0)
    calm = state.next_step >= judged_step + _RECENT  # else the levels may be of before and after a shift
    if not calm or any(min(watches[n].present_steps, len(watches[n].recent)) < _RECENT for n in used):
        return state, ()
    levels = {name: median(w.recent) if name in used else w.reference for name, w in watches.items()}
    found = ", ".join(f"{name} {exp(levels[name]):.2f} times" for name in sorted(used))
    reason = f"over {_RECENT} steps, compute took as profiled but {found} as long"
    asked = _Asked(gain=config.policy.min_gain, patience_steps=0.0)
    changed, commands = _replan(state, levels, [*state.recent, *_in_view(state)], reason, asked, config)
    return (changed if commands else replace(state, levels_step=state.next_step)), commands


def _revisit(state: ControlState, config: ControlConfig) -> tuple[ControlState, tuple[Command, ...]]:
    """Try an idle device again: while nothing runs on it, nothing would show that it has recovered."""
    policy = config.policy
    idle = {
        name: w
        for name, w in state.watches.items()
        if w.reference > policy.big_shift and w.idle_steps >= policy.revisit_steps * 2**w.revisits
    }
    if not idle:
        return state, ()
    reason = "; ".join(
        f"{name} took {exp(w.reference):.2f} times its profiled time when it last ran, "
        f"{spell_count(w.idle_steps, 'step')} ago, and is tried again"
        for name, w in idle.items()
    )
    fresh = {
        name: replace(_unknown(policy), revisits=min(w.revisits + 1, _MAX_REVISITS))
        for name, w in idle.items()
    }
    state = replace(state, watches={**state.watches, **fresh})
    levels = {name: w.level for name, w in state.watches.items()}
    asked = _Asked(gain=asked_gain(state, policy), patience_steps=0.0)
    state, commands = _replan(state, levels, _in_view(state), reason, asked, config)
    # If it is still too slow, that is to be acted on as soon as it shows.
    return replace(state, judged_step=None), commands


def _replan(
    state: ControlState,
    estimates: dict[str, float],
    bindings: Sequence[Binding],
    reason: str,
    asked: _Asked,
    config: ControlConfig,
) -> tuple[ControlState, tuple[Command, ...]]:
    """Take the best plan at the estimated speeds, if it pays and would have done some steps more by now."""
    policy = config.policy
    planned = _planned_with(state, estimates, state.recent[-1], config)
    planned, choice = weigh(planned, bindings, config)
    if choice is not None and not fits(choice.plan, bindings, config.planner):
        choice = None
    if choice is None or not choice.worthwhile(policy.horizon_steps, asked.gain, policy.move_margin):
        return _stayed(planned, choice, reason, asked, policy), ()
    missing_steps = asked.patience_steps - _missed_steps(state, choice, estimates, config.planner)
    if missing_steps > 0:
        lasting_steps = ceil(missing_steps * choice.then_s / choice.gain_s)
        return _waited(state, estimates, choice, reason, lasting_steps, policy), ()
    return _moved(planned, choice, reason, policy)


def _in_view(state: ControlState) -> list[Binding]:
    return [state.ahead[step] for step in sorted(state.ahead)] or list(state.recent[-1:])


def _unknown(policy: Policy) -> DeviceWatch:
    return DeviceWatch(band_above=policy.initial_band, band_below=policy.initial_band)


def _observed(known: DeviceWatch, log_ratio: float, policy: Policy) -> DeviceWatch:
    deviation = log_ratio - known.reference
    above = _summed(known.above, deviation / known.band_above, policy)
    below = _summed(known.below, -deviation / known.band_below, policy)
    return replace(
        known,
        observations=known.observations + 1,
        recent=(*known.recent, log_ratio)[-_RECENT:],
        above=above,
        below=below,
        above_steps=known.above_steps + 1 if above else 0,
        below_steps=known.below_steps + 1 if below else 0,
        present_steps=known.present_steps + 1,
        idle_steps=0,
        revisits=known.revisits if known.present_steps < policy.calm_steps else 0,
    )


def _expecting(known: DeviceWatch, deviation_L: Sequence[float], policy: Policy) -> DeviceWatch:
    """The device with its level and band as forecast."""
    low, middle, high = deviation_L
    level, calibrated = known.reference + middle, known.observations >= policy.calibration_steps
    return replace(
        known,
        level=level,
        band_above=_band(high, policy) if calibrated else known.band_above,
        band_below=_band(-low, policy) if calibrated else known.band_below,
    )


def _band(width: float, policy: Policy) -> float:
    return min(max(policy.min_band, width), policy.max_band)


def _summed(evidence: float, deviation: float, policy: Policy) -> float:
    # The upper bound lets evidence that could not be acted on fade as fast as it came.
    clipped = min(policy.clip, deviation)
    return min(max(0.0, evidence + clipped - policy.allowance), policy.evidence + policy.clip)


def _taken_for(known: DeviceWatch, estimate: float, policy: Policy) -> DeviceWatch:
    """The device at another log ratio, with no evidence against it yet."""
    if abs(estimate - known.reference) >= policy.big_shift:
        # Were the band learned at once, it would take in how far off an estimate is that was made while the
        # device still grew slower.
        known = replace(
            known,
            observations=0,
            band_above=min(known.band_above, policy.initial_band),
            band_below=min(known.band_below, policy.initial_band),
        )
    return replace(known, reference=estimate, above=0.0, below=0.0, above_steps=0, below_steps=0)


def _estimate(known: DeviceWatch) -> float:
    steps = known.above_steps if known.above > known.below else known.below_steps
    return median(known.recent[-min(max(steps, 1), _ESTIMATED) :])


def _finding(name: str, known: DeviceWatch, estimate: float) -> str:
    steps = max(known.above_steps, known.below_steps)
    low, high = exp(-known.band_below) - 1, exp(known.band_above) - 1
    return (
        f"{name} computes {exp(estimate - known.reference):.2f} times as long as planned for, "
        f"over {spell_count(steps, 'step')} (ordinary: {low:+.0%} to {high:+.0%})"
    )


def _missed_steps(
    state: ControlState, choice: Choice, estimates: Mapping[str, float], planner: Planner
) -> float:
    """How many more steps the other plan would have done by now: the most that any last steps add up to.

    A step's time under a plan is the one predicted at the estimates, times the change of its busiest
    device, which sets the pace, from there to the step's own log ratios.
    """
    binding = state.recent[-1]
    profiled = [
        {device: demand.compute_s for device, demand in planner.demand(plan, binding).items()}
        for plan in (choice.before, choice.plan)
    ]
    usual = [_busiest_s(profiled_s, estimates) for profiled_s in profiled]
    seen = [state.watches[device] for device in profiled[0]]
    most = ahead = 0.0
    for back in range(1, min(min(len(w.recent), w.present_steps) for w in seen) + 1):
        log_ratios = {**estimates, **{d: state.watches[d].recent[-back] for d in profiled[0]}}
        now, then = (_busiest_s(p, log_ratios) / u for p, u in zip(profiled, usual, strict=True))
        ahead += choice.now_s * now / (choice.then_s * then) - 1.0
        most = max(most, ahead)
    return most


def _busiest_s(profiled_s: Mapping[str, float], log_ratios: Mapping[str, float]) -> float:
    return max(time_s * exp(log_ratios.get(device, 0.0)) for device, time_s in profiled_s.items())


def _due(state: ControlState, estimates: dict[str, float], policy: Policy) -> bool:
    """Whether the last decision is long enough ago, and no other change is under way."""
    if state.pending is not None:
        before = state.pending.before_step
        # A change for a batch further ahead is replaced, and planned again when this one is in force.
        if before is None or before <= state.next_step + _SUBMITTED:
            return False
    if state.waiting is not None:
        return state.next_step >= state.waiting.until_step or _shifted(
            state.waiting.estimates, estimates, policy
        )
    if state.judged_step is None:
        return True
    since = state.next_step - state.judged_step
    if since >= policy.cooldown_steps * 2**state.stays:
        return True
    references = {name: w.reference for name, w in state.watches.items()}
    return state.stays > 0 and _shifted(references, estimates, policy)


def _shifted(before: Mapping[str, float], after: Mapping[str, float], policy: Policy) -> bool:
    """Whether a device is far from where it was when last judged."""
    return max(abs(after[name] - before[name]) for name in after) >= policy.big_shift


def _planned_with(
    state: ControlState, estimates: dict[str, float], binding: Binding, config: ControlConfig
) -> ControlState:
    """Take on new estimates of the devices' log ratios and forget the evidence that led to them."""
    profiled = {device.name: device.speed for device in config.planner.cluster(binding).devices}
    return replace(
        state,
        watches={name: _taken_for(w, estimates[name], config.policy) for name, w in state.watches.items()},
        speeds={name: round(profiled[name] * exp(-estimate), 4) for name, estimate in estimates.items()},
        candidates={},
        judged_step=state.next_step,
        waiting=None,
        stays=state.stays if _lately(state, config.policy) else 0,
    )


def _lately(state: ControlState, policy: Policy) -> bool:
    return state.judged_step is not None and state.next_step - state.judged_step < policy.calm_steps


def _stayed(
    state: ControlState, choice: Choice | None, reason: str, asked: _Asked, policy: Policy
) -> ControlState:
    found = "the plan in force is still the best that fits"
    if choice is not None:
        bar = f"{asked.gain:.0%} of a step, {policy.move_margin:.0%} over the cost"
        found = f"not worth it (asked: {bar}) would be {choice.sentence(policy.horizon_steps)}"
    return replace(
        state,
        decision=_decision(state, f"{reason}; {found}", acted=False),
        stays=min(state.stays + 1, _MAX_STAYS),
    )


def _waited(
    state: ControlState,
    estimates: dict[str, float],
    choice: Choice,
    reason: str,
    lasting_steps: int,
    policy: Policy,
) -> ControlState:
    """As it was: what may pass is not planned with."""
    found = (
        f"if that lasts {spell_count(lasting_steps, 'more step')}: {choice.sentence(policy.horizon_steps)}"
    )
    return replace(
        state,
        decision=_decision(state, f"{reason}; {found}", acted=False),
        waiting=Waiting(until_step=state.next_step + lasting_steps, estimates=estimates),
    )


def _moved(
    state: ControlState, choice: Choice, reason: str, policy: Policy
) -> tuple[ControlState, tuple[Command, ...]]:
    decision = _decision(state, f"{reason}; {choice.sentence(policy.horizon_steps)}", acted=True)
    command = Repartition(plan=choice.plan, reason=decision.reason)
    state = replace(state, decision=decision, stays=0, pending=command, moved_steps=moved(state, policy))
    return state, (command,)


def _decision(state: ControlState, reason: str, *, acted: bool) -> Decision:
    reason = with_expected_use(reason, state)
    return Decision(step=state.next_step, trigger=Trigger.DEVIATION, acted=acted, reason=reason)
