"""A series to its forecast: one pass over it, in which the backtest asks on the way.

Axes: H = horizon, L = level, M = member, O = origin, C = contender.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from forescale.cli.forecast_facts import known_facts
from forescale.cli.forecast_members import slow_members
from forescale.core.clock import SystemClock
from forescale.core.errors import InvalidInput
from forescale.forecast.backtest import Backtest, Contender, run_backtest, spread_origins
from forescale.forecast.baselines import MovingWindow, SeasonalNaive
from forescale.forecast.ensemble import EnsembleForecaster
from forescale.forecast.events import Plan, PlannedEvent
from forescale.forecast.forecaster import Array, Covariates
from forescale.forecast.members.refitted import SlowMembers
from forescale.forecast.series import Series

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_HORIZON_STEPS = (1, 5, 15, 60)
_DAY_S = 86400.0
_ORIGINS = 200
_FAN_PARTS = 5
_MOST = 20_000
"""Values that are learned from: at a millisecond each, what one would wait for; older ones weigh nothing."""
OURS, NAIVE = "Forescale", "seasonal naive"
_WINDOWS: tuple[tuple[Callable[[Array], float], float, str], ...] = (
    (np.mean, 60.0, "mean of the last minute (Knative)"),
    (np.max, 300.0, "highest of the last 5 minutes (HPA)"),
)

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What is to come.

    Attributes:
        season_steps: None for no season.
        quantiles_HL: of the value at each horizon.
        peaks_HL: of the highest value until then.
        fan_steps: horizons that a picture is drawn through; all that were asked for are among them.
        fan_quantiles_HL, fan_peaks_HL: the same quantiles there.
        slow: those of the members that were fitted now and then.
        weights_MH: of each member at each horizon, mean over levels; adds up to 1 over members.
        anomalies: steps of the series whose values do not belong.
        events: that were planned.
        notes: what was done to the series, and what was assumed, a sentence each.
    """

    series: Series
    horizon_steps: tuple[int, ...]
    levels: tuple[float, ...]
    season_steps: int | None
    quantiles_HL: Array
    peaks_HL: Array
    fan_steps: tuple[int, ...]
    fan_quantiles_HL: Array
    fan_peaks_HL: Array
    members: tuple[str, ...]
    slow: tuple[str, ...]
    weights_MH: Array
    anomalies: tuple[int, ...]
    events: tuple[PlannedEvent, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How good forecasts of the last half of a series were.

    Attributes:
        names: of the contenders; ours first, then the others, the best first.
        origins: how many forecasts were made.
        loss_CH: weighted quantile loss.
        relative_CH: the same over that of seasonal naive.
        coverage_CHL: share of values at or below each quantile.
    """

    names: tuple[str, ...]
    origins: int
    horizon_steps: tuple[int, ...]
    loss_CH: Array
    relative_CH: Array
    coverage_CHL: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow:
    """Slow models that are members too, by name, and who fits them."""

    names: tuple[str, ...]
    executor: Executor


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is asked of a series.

    Attributes:
        horizon_s: None for 1, 5, 15 and 60 steps, or those of them that the series is long enough for.
        season_s: None for a day, if the series holds two.
        fan: whether a picture will be drawn, which looks at more horizons.
        backtest: whether to compare, too.
        plan: events to go by.
        calendar: whether to go by the time of day and week.
    """

    horizon_s: Sequence[float] | None = None
    season_s: float | None = None
    fan: bool = False
    backtest: bool = False
    plan: Plan | None = None
    calendar: bool = False
    slow: Slow | None = None


def learn(series: Series, wanted: Wanted, progress: Progress) -> tuple[Forecast, Comparison | None]:
    """Gives a forecaster the whole series.

    Raises:
        InvalidInput: the series is too short for that, or has no dates for what is known by date.
    """
    series = _recent(series)
    length = len(series.values_T)
    horizon_steps, said = _horizons(series, wanted.horizon_s)
    season_steps, said_of_season = _season(series, wanted.season_s)
    fan_steps = _fan(horizon_steps) if wanted.fan else tuple(sorted({1, *horizon_steps}))
    asked_H = [fan_steps.index(steps) for steps in horizon_steps]
    facts = known_facts(series, fan_steps[-1], plan=wanted.plan, calendar=wanted.calendar)
    slow = _slow(wanted.slow, series, season_steps)
    forecaster = EnsembleForecaster(
        series.step_s,
        fan_steps,
        LEVELS,
        season_steps,
        lower=series.lower,
        covariates=facts.names,
        slow=slow,
    )
    pupil = _Pupil(forecaster, asked_H, facts.of_steps, fan_steps[-1])
    seen = 0
    comparison = None
    if wanted.backtest:
        origins = spread_origins(length, horizon_steps, _ORIGINS)
        comparison = _compared(pupil, series, horizon_steps, season_steps, origins, progress)
        seen = origins[-1] + 1
    for t in range(seen, length):
        pupil.update(float(series.values_T[t]))
        progress("learning", (t + 1) / length)
    fan_quantiles_HL = forecaster.predict(pupil.upcoming)
    fan_peaks_HL = np.stack(
        [forecaster.predict_peak(steps * series.step_s, LEVELS, pupil.upcoming) for steps in fan_steps]
    )
    found = Forecast(
        series=series,
        horizon_steps=horizon_steps,
        levels=LEVELS,
        season_steps=season_steps,
        quantiles_HL=fan_quantiles_HL[asked_H],
        peaks_HL=fan_peaks_HL[asked_H],
        fan_steps=fan_steps,
        fan_quantiles_HL=fan_quantiles_HL,
        fan_peaks_HL=fan_peaks_HL,
        members=tuple(forecaster.member_names),
        slow=tuple(model.name for group in slow for model in group.models),
        weights_MH=forecaster.weights().mean(axis=-1)[:, asked_H],
        anomalies=tuple(pupil.anomalies),
        events=wanted.plan.events if wanted.plan else (),
        notes=(*series.notes, *said, *said_of_season, *facts.notes),
    )
    return found, comparison


def _slow(slow: Slow | None, series: Series, season_steps: int | None) -> tuple[SlowMembers, ...]:
    if slow is None:
        return ()
    return slow_members(
        slow.names,
        slow.executor,
        step_s=series.step_s,
        season_steps=season_steps,
        length=len(series.values_T),
    )


class _Pupil:
    """Learns, and keeps which values were anomalies and what each member forecast when asked.

    Args:
        asked_H: which of the forecaster's horizons are asked for.
        facts: about each step of the series and those after it; empty where nothing is known.
        ahead: steps that are forecast.
    """

    def __init__(
        self, forecaster: EnsembleForecaster, asked_H: list[int], facts: Sequence[Covariates], ahead: int
    ) -> None:
        self.forecaster = forecaster
        self._asked_H = asked_H
        self._facts = facts
        self._ahead = ahead
        self.anomalies: list[int] = []
        self.members_OMHL: list[Array] = []
        self._step = 0

    @property
    def upcoming(self) -> Sequence[Covariates] | None:
        """Facts about the steps to come."""
        return self._facts[self._step : self._step + self._ahead] if self._facts else None

    def update(self, value: float, covariates: Covariates | None = None) -> None:  # noqa: ARG002 - it knows
        self.forecaster.predict(self.upcoming)  # members are judged by what they say knowing the facts
        self.forecaster.update(value, self._facts[self._step] if self._facts else None)
        if self.forecaster.anomaly():
            self.anomalies.append(self._step)
        self._step += 1

    def predict(self, covariates: Covariates | None = None) -> Array:  # noqa: ARG002 - it knows
        quantiles_HL = self.forecaster.predict(self.upcoming)
        self.members_OMHL.append(self.forecaster.member_quantiles(self.upcoming)[:, self._asked_H])
        return quantiles_HL[self._asked_H]


def _compared(
    pupil: _Pupil,
    series: Series,
    horizon_steps: tuple[int, ...],
    season_steps: int | None,
    origins: tuple[int, ...],
    progress: Progress,
) -> Comparison:
    def tested(name: str, contender: Contender) -> Backtest:
        return run_backtest(
            contender,
            series.values_T,
            horizon_steps=horizon_steps,
            levels=LEVELS,
            origins=origins,
            clock=SystemClock(),
            on_progress=lambda seen: progress(f"testing {name}", seen / (origins[-1] + 1)),
        )

    ours = tested(OURS, pupil)
    members_OMHL = np.stack(pupil.members_OMHL)
    results = {
        name: replace(ours, quantiles_OHL=members_OMHL[:, m])
        for m, name in enumerate(pupil.forecaster.member_names)
    }
    others: dict[str, Contender] = {NAIVE: SeasonalNaive(series.step_s, horizon_steps, LEVELS, season_steps)}
    for figure, window_s, name in _WINDOWS:
        steps = max(1, round(window_s / series.step_s))
        others[name if steps > 1 else "last value"] = MovingWindow(steps, figure, horizon_steps, LEVELS)
    results |= {name: tested(name, contender) for name, contender in others.items()}
    naive_H = results[NAIVE].loss_H
    order = sorted(results, key=lambda name: _typical(results[name].loss_H))
    ranked = {OURS: ours, **{name: results[name] for name in order}}
    loss_CH = np.stack([result.loss_H for result in ranked.values()])
    with np.errstate(divide="ignore", invalid="ignore"):
        relative_CH = loss_CH / naive_H
    return Comparison(
        names=tuple(ranked),
        origins=len(origins),
        horizon_steps=horizon_steps,
        loss_CH=loss_CH,
        relative_CH=relative_CH,
        coverage_CHL=np.stack([result.coverage_HL for result in ranked.values()]),
    )


def _typical(loss_H: Array) -> float:
    """Geometric mean of the losses that there are; infinite if there is none."""
    known = loss_H[np.isfinite(loss_H)]
    return float(np.log(np.maximum(known, 1e-12)).mean()) if len(known) else inf


# --- what is asked ---------------------------------------------------------------------------------------


def _recent(series: Series) -> Series:
    """The last of a long series."""
    length = len(series.values_T)
    if length <= _MOST:
        return series
    dropped_s = (length - _MOST) * series.step_s
    return replace(
        series,
        values_T=series.values_T[-_MOST:],
        start_s=None if series.start_s is None else series.start_s + dropped_s,
        notes=(*series.notes, f"the last {_MOST:,} of {length:,} values are learned from"),
    )


def _horizons(series: Series, horizon_s: Sequence[float] | None) -> tuple[tuple[int, ...], list[str]]:
    """In steps, ascending, and what is to be said of them."""
    longest = len(series.values_T) // 2
    if horizon_s is None:
        return tuple(steps for steps in _HORIZON_STEPS if steps <= longest), []
    steps = [round(value_s / series.step_s) for value_s in horizon_s]
    for value_s, count in zip(horizon_s, steps, strict=True):
        if count < 1:
            raise InvalidInput(f"--horizon-s {value_s:g} is less than a step of {series.step_s:g} s")
        if count > longest:
            raise InvalidInput(
                f"--horizon-s {value_s:g} is {count:,} steps; {len(series.values_T):,} values are enough for "
                f"{longest:,}, or {longest * series.step_s:g} s"
            )
    off = any(abs(s * series.step_s - h) > 1e-9 * h for s, h in zip(steps, horizon_s, strict=True))
    return tuple(sorted(set(steps))), ["horizons are rounded to whole steps"] * off


def _fan(horizon_steps: tuple[int, ...]) -> tuple[int, ...]:
    """Near enough to each other that a season shows."""
    ahead = horizon_steps[-1]
    between = (round(ahead * part / _FAN_PARTS) for part in range(1, _FAN_PARTS))
    return tuple(sorted({1, *horizon_steps, *(steps for steps in between if steps)}))


def _season(series: Series, season_s: float | None) -> tuple[int | None, list[str]]:
    """In steps, and what is to be said of it."""
    steps = round((season_s or _DAY_S) / series.step_s)
    if season_s is not None:
        if not 2 <= steps <= len(series.values_T) // 2:
            raise InvalidInput(
                f"--season-s {season_s:g} is {steps:,} steps; a season has at least 2, and "
                f"{len(series.values_T):,} values must hold two of them"
            )
        return steps, []
    if series.step_known and 2 <= steps <= len(series.values_T) // 2:
        return steps, ["a season is taken to be a day"]
    return None, []
