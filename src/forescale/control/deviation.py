"""Devices that are slower or faster than planned for.

Each step gives one log ratio per device: observed over profiled compute seconds, for that plan and that
batch. Deviations from the log ratio planned with are measured in half widths of the device's own band
(the 5% and 95% quantiles of its forecaster), clipped, and summed up less an allowance: a two-sided CUSUM
(Page, "Continuous inspection schemes", Biometrika, 1954) that neither a single outlier nor noise inside
the band can push over its threshold. What then stands is the median log ratio since the sum last was nil.
"""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from statistics import median

from forescale.control.choice import Choice, asked_gain, fits, moved, weigh
from forescale.control.policy import Policy
from forescale.control.state import ControlConfig, ControlState, Decision, DeviceWatch, Trigger
from forescale.control.utilisation import with_expected_use
from forescale.engine.messages import Binding, Command, Repartition, StepFinished
from forescale.forecast.forecaster import Forecaster
from forescale.forecast.level import LevelForecaster
from forescale.plan.wording import spell_count

_RECENT = 16  # log ratios kept for the estimate after a shift
_SUBMITTED = 2  # steps that may be under way already when one has finished
_MAX_STAYS = 5  # doublings of the cool-down after decisions to stay
_MAX_REVISITS = 6  # doublings of the time after which an idle device is tried again


def watch(state: ControlState, event: StepFinished, config: ControlConfig) -> ControlState:
    """Compare one step's reports with what its plan and batch were profiled to take."""
    assert state.plan is not None
    profiled_s: dict[str, float] = {}
    for stage, time_s in zip(
        state.plan.stages, config.planner.compute_s(state.plan, event.binding, {}), strict=True
    ):
        profiled_s[stage.device] = profiled_s.get(stage.device, 0.0) + time_s
    observed_s: dict[str, float] = {}
    for report in event.stages:
        if (time_s := report.forward_s + report.backward_s) > 0.0:  # idle devices report, too
            observed_s[report.device] = observed_s.get(report.device, 0.0) + time_s
    if observed_s.keys() != profiled_s.keys():
        return state  # a step of the plan before: its reports say nothing about this one
    watches = {
        device: replace(known, idle_steps=known.idle_steps + 1, present_steps=0)
        for device, known in state.watches.items()
    }
    for device, time_s in observed_s.items():
        if profiled_s[device] > 0.0:
            known = state.watches.get(device) or _unknown(config.policy)
            watches[device] = _observed(known, log(time_s / profiled_s[device]), config.policy)
    return replace(state, watches=watches)


def react(state: ControlState, config: ControlConfig) -> tuple[ControlState, tuple[Command, ...]]:
    """Re-estimate the speeds and change the plan, when the evidence stands and it pays."""
    policy = config.policy
    deviating = {name: w for name, w in state.watches.items() if max(w.above, w.below) > policy.evidence}
    if not deviating or not _due(state, deviating, policy):
        return _revisit(state, config)
    estimates = {name: _estimate(w) if name in deviating else w.level for name, w in state.watches.items()}
    reason = "; ".join(_finding(name, w, estimates[name]) for name, w in deviating.items())
    return _replan(state, estimates, reason, config)


def _revisit(state: ControlState, config: ControlConfig) -> tuple[ControlState, tuple[Command, ...]]:
    """Try an idle device again: while nothing runs on it, nothing would show that it has recovered."""
    policy = config.policy
    idle = {
        name: w
        for name, w in state.watches.items()
        if w.reference > policy.big_shift and w.idle_steps >= policy.revisit_steps * 2**w.revisits
    }
    if not idle or state.pending is not None:
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
    state, commands = _replan(state, {name: w.level for name, w in state.watches.items()}, reason, config)
    # If it is still too slow, that is to be acted on as soon as it shows.
    return replace(state, judged_step=None), commands


def _replan(
    state: ControlState, estimates: dict[str, float], reason: str, config: ControlConfig
) -> tuple[ControlState, tuple[Command, ...]]:
    state = _planned_with(state, estimates, state.recent[-1], config)
    bindings = [state.ahead[step] for step in sorted(state.ahead)] or list(state.recent[-1:])
    state, choice = weigh(state, bindings, config)
    if choice is not None and not fits(choice.plan, bindings, config.planner):
        choice = None
    return _decided(state, choice, reason, config.policy)


def _unknown(policy: Policy) -> DeviceWatch:
    return DeviceWatch(band_above=policy.initial_band, band_below=policy.initial_band)


def _observed(known: DeviceWatch, log_ratio: float, policy: Policy) -> DeviceWatch:
    forecaster: Forecaster = LevelForecaster(step_s=1.0, horizon_steps=(1,), levels=(0.05, 0.5, 0.95))
    if known.forecast is not None:
        forecaster.restore(known.forecast)
    forecaster.update(log_ratio)
    low, level, high = (float(quantile) for quantile in forecaster.predict()[0])
    observations = known.observations + 1
    narrowest = policy.min_band if observations >= policy.calibration_steps else policy.initial_band
    # While evidence builds up, the band stays as it was: what is being judged must not widen it.
    ordinary = max(known.above, known.below) < policy.clip - policy.allowance
    band_above = max(narrowest, high - level) if ordinary else known.band_above
    band_below = max(narrowest, level - low) if ordinary else known.band_below
    deviation = log_ratio - known.reference
    above = _summed(known.above, deviation / band_above, policy)
    below = _summed(known.below, -deviation / band_below, policy)
    return DeviceWatch(
        forecast=forecaster.state(),
        level=level,
        observations=observations,
        recent=(*known.recent, log_ratio)[-_RECENT:],
        reference=known.reference,
        band_above=band_above,
        band_below=band_below,
        above=above,
        below=below,
        above_steps=known.above_steps + 1 if above else 0,
        below_steps=known.below_steps + 1 if below else 0,
        present_steps=known.present_steps + 1,
        revisits=known.revisits if known.present_steps < policy.calm_steps else 0,
    )


def _summed(evidence: float, deviation: float, policy: Policy) -> float:
    # The upper bound lets evidence that could not be acted on fade as fast as it came.
    clipped = min(policy.clip, deviation)
    return min(max(0.0, evidence + clipped - policy.allowance), policy.evidence + policy.clip)


def _estimate(known: DeviceWatch) -> float:
    steps = known.above_steps if known.above > known.below else known.below_steps
    return median(known.recent[-max(steps, 1) :])


def _finding(name: str, known: DeviceWatch, estimate: float) -> str:
    steps = max(known.above_steps, known.below_steps)
    low, high = exp(-known.band_below) - 1, exp(known.band_above) - 1
    return (
        f"{name} computes {exp(estimate - known.reference):.2f} times as long as planned for, "
        f"over {spell_count(steps, 'step')} (ordinary: {low:+.0%} to {high:+.0%})"
    )


def _due(state: ControlState, deviating: dict[str, DeviceWatch], policy: Policy) -> bool:
    """Whether the last decision is long enough ago, and no other change is under way."""
    if state.pending is not None:
        before = state.pending.before_step
        # A change for a batch further ahead is replaced, and planned again when this one is in force.
        if before is None or before <= state.next_step + _SUBMITTED:
            return False
    if state.judged_step is None:
        return True
    since = state.next_step - state.judged_step
    if since >= policy.cooldown_steps * 2**state.stays:
        return True
    shift = max(abs(_estimate(w) - w.reference) for w in deviating.values())
    return state.stays > 0 and shift >= policy.big_shift


def _planned_with(
    state: ControlState, estimates: dict[str, float], binding: Binding, config: ControlConfig
) -> ControlState:
    """Take on new estimates of the devices' log ratios and forget the evidence that led to them."""
    profiled = {device.name: device.speed for device in config.planner.cluster(binding).devices}
    return replace(
        state,
        watches={
            name: replace(w, reference=estimates[name], above=0.0, below=0.0, above_steps=0, below_steps=0)
            for name, w in state.watches.items()
        },
        speeds={name: round(profiled[name] * exp(-estimate), 4) for name, estimate in estimates.items()},
        candidates={},
        judged_step=state.next_step,
        stays=state.stays if _lately(state, config.policy) else 0,
    )


def _lately(state: ControlState, policy: Policy) -> bool:
    return state.judged_step is not None and state.next_step - state.judged_step < policy.calm_steps


def _decided(
    state: ControlState, choice: Choice | None, reason: str, policy: Policy
) -> tuple[ControlState, tuple[Command, ...]]:
    min_gain, steps = asked_gain(state, policy), policy.horizon_steps
    acted = choice is not None and choice.worthwhile(steps, min_gain, policy.move_margin)
    found = choice.sentence(steps) if choice else "the plan in force is still the best that fits"
    if choice is not None and not acted:
        asked = f"{min_gain:.0%} of a step, {policy.move_margin:.0%} over the cost"
        found = f"not worth it (asked: {asked}) would be {found}"
    reason = with_expected_use(f"{reason}; {found}", state)
    decision = Decision(step=state.next_step, trigger=Trigger.DEVIATION, acted=acted, reason=reason)
    if not acted or choice is None:
        return replace(state, decision=decision, stays=min(state.stays + 1, _MAX_STAYS)), ()
    command = Repartition(plan=choice.plan, reason=reason)
    state = replace(state, decision=decision, stays=0, pending=command, moved_steps=moved(state, policy))
    return state, (command,)
