"""How much of each device a run uses, and is expected to use next.

What a batch is predicted to use is known before it runs; what is forecast is by how much that is off. So a
batch of another shape is expected to use what such a batch does, also the first of its kind.

Axes: L = quantile level (order of ``LEVELS``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from forescale.control.planner import Planner
from forescale.control.state import ControlState, DeviceUse
from forescale.engine.messages import Binding, StepFinished
from forescale.forecast.covariates import ProportionalForecaster
from forescale.forecast.forecaster import ForecasterState
from forescale.forecast.level import LevelForecaster
from forescale.plan.partition_plan import PartitionPlan

LEVELS = (0.5, 0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class UseForecast:
    """What the next step is expected to use of a device, as quantiles of fractions from 0 on.

    Attributes:
        busy_L: time in which it computes, of the step's.
        memory_L: peak of tensor memory, of its capacity; None where that is not measured.
    """

    busy_L: tuple[float, ...]
    memory_L: tuple[float, ...] | None


def expected_use(state: ControlState, planner: Planner) -> Mapping[str, UseForecast]:
    """By device, in the cluster's order; empty until a step under the plan in force was judged."""
    if state.plan is None or not state.use:
        return {}
    predicted = _predicted_use(state.plan, state.ahead.get(state.next_step, state.recent[-1]), planner)
    return {
        device: UseForecast(
            busy_L=_quantiles_L(use.busy, predicted[device].busy),
            memory_L=_quantiles_L(use.memory, predicted[device].memory) if use.memory else None,
        )
        for device, use in state.use.items()
    }


def with_expected_use(reason: str, state: ControlState, planner: Planner) -> str:
    """A decision's reason, and what the devices of the plan in force would go on being used."""
    assert state.plan is not None
    expected = expected_use(state, planner)
    forecasts = {s.device: expected[s.device] for s in state.plan.stages if s.device in expected}
    if not forecasts:
        return reason
    uses = (
        f"{device} {spell_quantiles(use.busy_L)}"
        + (f" and {spell_quantiles(use.memory_L)} of its memory" if use.memory_L else "")
        for device, use in forecasts.items()
    )
    return f"{reason}. Expected busy without a change: {', '.join(uses)}."


def spell_quantiles(quantiles_L: tuple[float, ...]) -> str:
    """``66% (up to 78%)``: the median, and what it stays below in 95 of 100 steps."""
    middle, high = (f"{quantile:.0%}" for quantile in quantiles_L)
    return middle if middle == high else f"{middle} (up to {high})"


def observe(state: ControlState, event: StepFinished, planner: Planner) -> ControlState:
    """Take in what one step used of every device, against what its batch was predicted to."""
    assert state.plan is not None
    cluster = planner.cluster(event.binding)
    predicted = _predicted_use(state.plan, event.binding, planner)
    use: dict[str, DeviceUse] = {}
    for report in event.stages:
        known, size = state.use.get(report.device, DeviceUse()), predicted[report.device]
        busy_s = report.forward_s + report.backward_s + report.optimizer_s
        capacity_bytes = cluster.device(report.device).memory_bytes
        if report.memory_bytes and capacity_bytes:
            memory = _updated(known.memory, report.memory_bytes / capacity_bytes, size.memory)
            known = replace(known, memory=memory)
        use[report.device] = replace(known, busy=_updated(known.busy, busy_s / event.step_s, size.busy))
    return replace(state, use=use)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PredictedUse:
    """Shares of a device that a batch is predicted to use, as devices were profiled."""

    busy: float = 0.0
    memory: float = 0.0


def _predicted_use(plan: PartitionPlan, binding: Binding, planner: Planner) -> Mapping[str, _PredictedUse]:
    """By device of the cluster, those that the plan leaves idle included."""
    cluster = planner.cluster(binding)
    prediction = planner.prediction(plan, binding, {})
    use = {device.name: _PredictedUse() for device in cluster.devices}
    for stage, predicted, compute_s in zip(
        plan.stages, prediction.stages, planner.compute_s(plan, binding, {}), strict=True
    ):
        capacity_bytes = max(cluster.device(stage.device).memory_bytes, 1)
        known = use[stage.device]
        use[stage.device] = _PredictedUse(
            busy=known.busy + (compute_s + predicted.optimizer_s) / prediction.step_s,
            memory=known.memory + predicted.memory_bytes / capacity_bytes,
        )
    return use


def _forecaster(state: ForecasterState | None) -> ProportionalForecaster:
    forecaster = ProportionalForecaster(
        LevelForecaster(step_s=1.0, horizon_steps=(1,), levels=LEVELS), covariate="predicted"
    )
    if state is not None:
        forecaster.restore(state)
    return forecaster


def _updated(state: ForecasterState | None, value: float, predicted: float) -> ForecasterState:
    forecaster = _forecaster(state)
    forecaster.update(value, {"predicted": predicted})
    return forecaster.state()


def _quantiles_L(state: ForecasterState | None, predicted: float) -> tuple[float, ...]:
    # Errors are added to a level: near 1 the sum may leave what a fraction can be.
    quantiles_HL = _forecaster(state).predict({"predicted": predicted})
    return tuple(min(1.0, float(quantile)) for quantile in quantiles_HL[0])
