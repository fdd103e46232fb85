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

from forescale.control.choice import Choice, weigh
from forescale.control.messages import Binding, Command, Repartition, StepFinished
from forescale.control.policy import Policy
from forescale.control.state import ControlConfig, ControlState, Decision, DeviceWatch, Trigger
from forescale.forecast.forecaster import Forecaster
from forescale.forecast.level import LevelForecaster

_RECENT = 16  # log ratios kept for the estimate after a shift
_MAX_STAYS = 4  # doublings of the cool-down after decisions to stay


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
        time_s = report.forward_s + report.backward_s
        observed_s[report.device] = observed_s.get(report.device, 0.0) + time_s
    if observed_s.keys() != profiled_s.keys():
        return state  # a step of the plan before: its reports say nothing about this one
    watches = dict(state.watches)
    for device, time_s in observed_s.items():
        if time_s > 0.0 and profiled_s[device] > 0.0:
            known = watches.get(device) or DeviceWatch(
                band_above=config.policy.initial_band, band_below=config.policy.initial_band
            )
            watches[device] = _observed(known, log(time_s / profiled_s[device]), config.policy)
    return replace(state, watches=watches)


def react(state: ControlState, config: ControlConfig) -> tuple[ControlState, tuple[Command, ...]]:
    """Re-estimate the speeds and change the plan, when the evidence stands and it pays."""
    policy = config.policy
    deviating = {name: w for name, w in state.watches.items() if _evidence(w) > policy.evidence}
    if not deviating or not _due(state, deviating, policy):
        return state, ()
    estimates = {
        name: _estimate(w) if name in deviating else w.level for name, w in state.watches.items()
    }
    reason = "; ".join(
        f"{name} computes {exp(estimates[name] - w.reference):.2f} times as long as planned for over "
        f"{max(w.above_steps, w.below_steps)} steps (band {exp(-w.band_below) - 1:+.0%} to {exp(w.band_above) - 1:+.0%})"
        for name, w in deviating.items()
    )
    binding = state.recent[-1]
    state = _planned_with(state, estimates, binding, config)
    bindings = [state.ahead[step] for step in sorted(state.ahead)] or list(state.recent[-1:])
    state, choice = weigh(state, bindings, config)
    return _decided(state, choice, reason, policy)


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
    )


def _summed(evidence: float, deviation: float, policy: Policy) -> float:
    # The upper bound lets evidence that could not be acted on fade as fast as it came.
    clipped = min(policy.clip, deviation)
    return min(max(0.0, evidence + clipped - policy.allowance), policy.evidence + policy.clip)


def _evidence(known: DeviceWatch) -> float:
    return max(known.above, known.below)


def _estimate(known: DeviceWatch) -> float:
    steps = known.above_steps if known.above > known.below else known.below_steps
    return median(known.recent[-max(steps, 1) :])


def _due(state: ControlState, deviating: dict[str, DeviceWatch], policy: Policy) -> bool:
    """Whether the last decision is long enough ago, and no other change is under way."""
    if state.pending is not None:
        before = state.pending.before_step
        # A change for a batch further ahead can wait and will be planned again.
        if before is None or before <= state.next_step + 1:
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
    moved = tuple(step for step in state.moved_steps if step > state.next_step - policy.calm_steps)
    # Two moves answer one change (the second corrects the first); more of them are asked for more.
    min_gain = policy.min_gain * 2 ** min(max(len(moved) - 1, 0), 2)
    steps = policy.horizon_steps
    acted = choice is not None and choice.worthwhile(steps, min_gain, policy.move_margin)
    found = choice.sentence(steps) if choice else "the plan in force is still the best that fits"
    verdict = "" if acted or choice is None else f" (not worth it: asked for {min_gain:.0%} and {policy.move_margin:.0%} over the cost)"
    decision = Decision(
        step=state.next_step, trigger=Trigger.DEVIATION, acted=acted, reason=f"{reason}: {found}{verdict}"
    )
    if not acted or choice is None:
        return replace(state, decision=decision, stays=min(state.stays + 1, _MAX_STAYS)), ()
    command = Repartition(plan=choice.plan, reason=decision.reason)
    state = replace(
        state, decision=decision, stays=0, pending=command, moved_steps=(*moved, state.next_step)
    )
    return state, (command,)
