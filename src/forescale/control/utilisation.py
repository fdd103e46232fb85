"""How much of each device a run uses, and is expected to use next.

Axes: L = quantile level (order of ``LEVELS``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from forescale.control.state import ControlState, DeviceUse
from forescale.core.cluster import Cluster
from forescale.engine.messages import StepFinished
from forescale.forecast.forecaster import ForecasterState
from forescale.forecast.level import LevelForecaster

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


def expected_use(state: ControlState) -> Mapping[str, UseForecast]:
    """By device, in the cluster's order; empty until a step under the plan in force was judged."""
    return {
        device: UseForecast(
            busy_L=_quantiles_L(use.busy), memory_L=_quantiles_L(use.memory) if use.memory else None
        )
        for device, use in state.use.items()
    }


def with_expected_use(reason: str, state: ControlState) -> str:
    """A decision's reason, and what the devices of the plan in force would go on being used."""
    assert state.plan is not None
    expected = expected_use(state)
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


def observe(state: ControlState, event: StepFinished, cluster: Cluster) -> ControlState:
    """Take in what one step used of every device."""
    use: dict[str, DeviceUse] = {}
    for report in event.stages:
        known = state.use.get(report.device, DeviceUse())
        busy_s = report.forward_s + report.backward_s + report.optimizer_s
        capacity_bytes = cluster.device(report.device).memory_bytes
        if report.memory_bytes and capacity_bytes:
            known = replace(known, memory=_updated(known.memory, report.memory_bytes / capacity_bytes))
        use[report.device] = replace(known, busy=_updated(known.busy, busy_s / event.step_s))
    return replace(state, use=use)


def _forecaster(state: ForecasterState | None) -> LevelForecaster:
    forecaster = LevelForecaster(step_s=1.0, horizon_steps=(1,), levels=LEVELS)
    if state is not None:
        forecaster.restore(state)
    return forecaster


def _updated(state: ForecasterState | None, value: float) -> ForecasterState:
    forecaster = _forecaster(state)
    forecaster.update(value)
    return forecaster.state()


def _quantiles_L(state: ForecasterState | None) -> tuple[float, ...]:
    # Errors are added to a level: near 0 or 1 the sum may leave what a fraction can be.
    return tuple(min(1.0, max(0.0, float(quantile))) for quantile in _forecaster(state).predict()[0])
