"""How much of each device a run uses, and is expected to use next.

One bank forecasts four figures of each device: its deviation from the speed planned with, its busy share,
its busy seconds and its memory. All are logarithms of what was observed over what the planner predicts for
that plan and batch: so a forecast knows the batches to come, and holds for other plans. What is predicted is
also a covariate, since the ratio itself may change with it.

Axes: N = figure of a device (device by device), F = figure, K = covariate, L = quantile level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import exp, log, nan

import numpy as np

from forescale.control.planner import DeviceDemand, Planner
from forescale.control.state import ControlState, UseForecast
from forescale.core.cluster import Device
from forescale.engine.messages import StepFinished
from forescale.forecast.bank import ForecasterBank
from forescale.forecast.forecaster import Array
from forescale.forecast.snapshot import fork

LEVELS = (0.05, 0.5, 0.95)
FIGURES = ("deviation", "busy share", "busy seconds", "memory")
_LARGEST = 10.0  # log ratio; beyond it, little was known
_UNUSED = UseForecast(busy_L=(0.0, 0.0), busy_s_L=(0.0, 0.0), memory_L=None)

Demand = Mapping[str, DeviceDemand]
"""What a step asks of each device that its plan uses."""


def with_expected_use(reason: str, state: ControlState) -> str:
    """A decision's reason, and what the devices of the plan in force would go on being used."""
    assert state.plan is not None
    forecasts = {s.device: state.use[s.device] for s in state.plan.stages if s.device in state.use}
    if not forecasts:
        return reason
    uses = (
        f"{device} {spell_quantiles(use.busy_L)}"
        + (f" and {spell_quantiles(use.memory_L)} of its memory" if use.memory_L else "")
        for device, use in forecasts.items()
    )
    return f"{reason}. Expected busy without a change: {', '.join(uses)}."


def spell_quantiles(quantiles_L: tuple[float, float]) -> str:
    """``66% (up to 78%)``: the median, and what it stays below in 95 of 100 steps."""
    middle, high = (f"{quantile:.0%}" for quantile in quantiles_L)
    return middle if middle == high else f"{middle} (up to {high})"


def observe(
    state: ControlState, event: StepFinished, deviations: Mapping[str, float], planner: Planner
) -> tuple[ControlState, Mapping[str, Sequence[float]]]:
    """Take in what one step used of every device, and forecast the next one, whose batch may be known.

    Args:
        deviations: by device, where they are ordinary: log ratios less what is planned with.

    Returns:
        The state, and by device the quantiles (``LEVELS``) of the next deviation.
    """
    assert state.plan is not None
    devices = planner.cluster(event.binding).devices
    demand = planner.demand(state.plan, event.binding)
    upcoming = planner.demand(state.plan, state.ahead.get(event.step + 1, event.binding))
    forecaster = fork(state.forecaster) if state.forecaster else use_forecaster(len(devices) * len(FIGURES))
    forecaster.update(log_ratios_N(event, demand, deviations, devices), covariates_NK(demand, devices))
    ratios_NL = forecaster.predict(covariates_NK(upcoming, devices))[:, 0]
    ratios_DFL = ratios_NL.reshape(len(devices), len(FIGURES), -1).tolist()
    ratios = {device.name: ratios_FL for device, ratios_FL in zip(devices, ratios_DFL, strict=True)}
    measured = {report.device for report in event.stages if report.memory_bytes}
    measured |= {name for name, use in state.use.items() if use.memory_L}
    use = {
        d.name: _expected(upcoming[d.name], d, ratios[d.name], d.name in measured)
        if d.name in upcoming
        else _UNUSED
        for d in devices
    }
    return replace(state, forecaster=forecaster, use=use), {name: r[0] for name, r in ratios.items()}


def use_forecaster(
    figures: int, horizon_steps: Sequence[int] = (1,), levels: Sequence[float] = LEVELS
) -> ForecasterBank:
    """Of so many log ratios; told the covariates of each."""
    return ForecasterBank(figures, 1.0, horizon_steps, levels, lower=None, covariates=("demand",), light=True)


def log_ratios_N(
    event: StepFinished, demand: Demand, deviations: Mapping[str, float], devices: Sequence[Device]
) -> Array:
    """Observed over predicted, as logarithms; NaN where nothing was observed."""
    busy_s, memory_bytes = dict.fromkeys(demand, 0.0), dict.fromkeys(demand, 0)
    for report in event.stages:
        if report.device in demand:
            busy_s[report.device] += report.forward_s + report.backward_s + report.optimizer_s
            memory_bytes[report.device] += report.memory_bytes
    ratios: list[float] = []
    for name in (device.name for device in devices):
        if name not in demand:
            ratios += [nan] * len(FIGURES)
            continue
        asked = demand[name]
        ratios += [
            deviations.get(name, nan),
            _log_ratio(busy_s[name] / event.step_s, asked.busy_fraction),
            _log_ratio(busy_s[name], asked.busy_s),
            _log_ratio(memory_bytes[name], asked.memory_bytes),
        ]
    return np.array(ratios)


def covariates_NK(demand: Demand, devices: Sequence[Device]) -> Array:
    """What is predicted of each figure, as logarithms; nothing of deviations, which are the device's own."""
    told: list[float] = []
    for device in devices:
        asked = demand.get(device.name)
        figures = (asked.busy_fraction, asked.busy_s, asked.memory_bytes) if asked else (0.0, 0.0, 0.0)
        told += [nan, *(_log_ratio(figure, 1.0) for figure in figures)]
    return np.array(told)[:, None]


def _expected(
    asked: DeviceDemand, device: Device, ratios_FL: Sequence[Sequence[float]], measured: bool
) -> UseForecast:
    (_, *busy_L), (_, *busy_s_L), (_, *memory_L) = (
        [exp(min(ratio, _LARGEST)) for ratio in ratios_L] for ratios_L in ratios_FL[1:]
    )
    share = asked.memory_bytes / device.memory_bytes if device.memory_bytes else 0.0
    return UseForecast(
        busy_L=_fractions_L(busy_L, asked.busy_fraction),
        busy_s_L=(busy_s_L[0] * asked.busy_s, busy_s_L[1] * asked.busy_s),
        memory_L=_fractions_L(memory_L, share) if measured and share else None,
    )


def _fractions_L(ratios_L: Sequence[float], predicted: float) -> tuple[float, float]:
    middle, high = (min(1.0, ratio * predicted) for ratio in ratios_L)
    return middle, high


def _log_ratio(observed: float, predicted: float) -> float:
    return log(observed / predicted) if observed > 0.0 and predicted > 0.0 else nan
