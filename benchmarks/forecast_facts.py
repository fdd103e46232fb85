"""What planned events and the calendar are worth: forecasts with them against the same without.

Events: simulated demand with a daily season, tripled by campaigns at irregular times, known beforehand.
The calendar: public traces, as means over longer steps than their own. Times of traces without dates begin at
midnight: the hours of a day and the days of a week return all the same.

    python benchmarks/forecast_facts.py DATA_DIR [--out FILE.md]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from forecast_series import DAY_S, Series, find_series
from rich.progress import track
from table import environment, write_table

from forescale.core.clock import SystemClock
from forescale.forecast.backtest import Backtest, run_backtest, spread_origins
from forescale.forecast.calendar import CALENDAR, calendar_facts
from forescale.forecast.ensemble import EnsembleForecaster
from forescale.forecast.events import PlannedEvent, event_facts
from forescale.forecast.forecaster import Array, Covariates

HORIZON_STEPS = (1, 5, 15, 60)
LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
AT_95 = LEVELS.index(0.95)
SEEDS = 3
CAMPAIGN_STEP_S = 900.0
LONGEST = 1200  # values of a trace
LONGER_S = {60.0: (600.0,), 300.0: (1800.0,)}
"""Steps of means by a trace's own: of such steps the regression remembers several days."""


class Informed:
    """A contender that knows the facts about each step of its series."""

    def __init__(self, forecaster: EnsembleForecaster, facts: Sequence[Covariates]) -> None:
        self._forecaster = forecaster
        self._facts = facts
        self._steps = 0

    def update(self, value: float, covariates: Covariates | None = None) -> None:  # noqa: ARG002 - the protocol's
        self._forecaster.update(value, self._facts[self._steps])
        self._steps += 1

    def predict(self, covariates: Covariates | None = None) -> Array:  # noqa: ARG002 - the protocol's
        return self._forecaster.predict(self._facts[self._steps : self._steps + HORIZON_STEPS[-1]])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "forecast_facts.md")
    options = parser.parse_args()
    series = [
        resampled(one, step_s) for one in find_series(options.data) for step_s in LONGER_S.get(one.step_s, ())
    ]
    rows = [row(*campaigns(seed)) for seed in track(range(SEEDS), "campaigns")]
    for one in track(series, "calendar"):
        facts = calendar_facts(0.0, one.step_s, len(one.values_T) + HORIZON_STEPS[-1])
        rows.append(row(one, facts, CALENDAR))
    write_table(
        options.out,
        "Weighted quantile loss with facts known beforehand, over that without",
        environment(levels=", ".join(map(str, LEVELS)), origins="every step of the second half"),
        ("series", "facts", *(f"{steps} steps" for steps in HORIZON_STEPS), "95% covers, with", "without"),
        rows,
    )


def campaigns(seed: int) -> tuple[Series, Sequence[Covariates], Sequence[str]]:
    """Campaigns of twenty steps."""
    rng = np.random.default_rng(seed)
    length = 1500
    begins = np.cumsum(rng.integers(90, 200, 20))
    events = [
        PlannedEvent(name="campaign", start_s=begin * CAMPAIGN_STEP_S, end_s=(begin + 20) * CAMPAIGN_STEP_S)
        for begin in begins.tolist()
    ]
    facts = event_facts(events, 0.0, CAMPAIGN_STEP_S, length + HORIZON_STEPS[-1])
    planned_T = np.array([step["campaign"] for step in facts[:length]])
    rate_T = 60.0 + 30.0 * np.sin(2.0 * np.pi * np.arange(length) / 96) + 120.0 * planned_T
    values_T = rng.poisson(rate_T).astype(np.float64)
    return (
        Series(name=f"campaigns, seed {seed}", step_s=CAMPAIGN_STEP_S, values_T=values_T),
        facts,
        ("campaign",),
    )


def resampled(series: Series, step_s: float) -> Series:
    """Means over longer steps."""
    each = round(step_s / series.step_s)
    whole = len(series.values_T) // each * each
    means_T = series.values_T[:whole].reshape(-1, each).mean(axis=1)
    return Series(name=f"{series.name}, {step_s:g} s", step_s=step_s, values_T=means_T[-LONGEST:])


def row(series: Series, facts: Sequence[Covariates], names: Sequence[str]) -> Sequence[object]:
    informed, plain = (tested(series, facts, known) for known in (names, ()))
    coverage = [
        ", ".join(f"{100 * share:.1f}%" for share in one.coverage_HL[:, AT_95]) for one in (informed, plain)
    ]
    kind = names[0] if len(names) == 1 else "calendar"
    return series.name, kind, *(f"{ratio:.3f}" for ratio in informed.loss_H / plain.loss_H), *coverage


def tested(series: Series, facts: Sequence[Covariates], names: Sequence[str]) -> Backtest:
    day = round(DAY_S / series.step_s)
    season = day if 4 * day <= len(series.values_T) else None
    forecaster = EnsembleForecaster(series.step_s, HORIZON_STEPS, LEVELS, season, covariates=names)
    return run_backtest(
        Informed(forecaster, facts) if names else forecaster,
        series.values_T,
        horizon_steps=HORIZON_STEPS,
        levels=LEVELS,
        origins=spread_origins(len(series.values_T), HORIZON_STEPS),
        clock=SystemClock(),
    )


if __name__ == "__main__":
    main()
