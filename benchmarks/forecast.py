"""Our forecasts against what anyone would pick instead, on every series of a folder.

Every contender is given the values of a series one by one, and is asked at origins spread over its second
half: at every step there what is cheap, at fewer what takes long. Ours is asked at every step, and compared
with each of the others at the origins of that one.

    python benchmarks/forecast.py DATA_DIR [--out FILE.md] [--baselines all|quick]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
from forecast_contenders import HORIZON_STEPS, LEVELS, SHORTEST_WINDOW, contenders, origins_of
from forecast_peaks import moving_maximum, over_reservation
from forecast_series import Series, find_series
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from table import environment, write_table

from forescale.core.clock import SystemClock
from forescale.forecast.backtest import Backtest, run_backtest, run_backtest_with_peaks, spread_origins
from forescale.forecast.ensemble import EnsembleForecaster

OURS = "Forescale"
ASKED = {  # the loss may be at most so much of the baseline's
    "seasonal naive": 0.48,
    "Prophet": 0.50,
    "LSTM, normalised": 0.86,
    "AutoARIMA": 0.70,
    "LightGBM, normalised": 0.94,
}
ASKED_EVERYWHERE = 1.03  # of any baseline, on any series
HPA_WINDOW_S = 300.0
IMPORT_TIME = (
    "import time; begun_s = time.perf_counter(); import forescale.forecast.ensemble; "
    "print(time.perf_counter() - begun_s)"
)
AT_95, AT_99 = LEVELS.index(0.95), LEVELS.index(0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One contender on one series; None where there is no such contender."""

    series: Series
    contender: str
    values: Backtest | None
    peaks: Backtest | None = None


def main() -> None:
    options = _options()
    series = find_series(options.data)
    if not series:
        raise SystemExit(f"no series in {options.data}")
    outcomes = _run(series, options)
    measured_on = environment(
        data=f"{len(series)} series of {options.data.name}, the last 12,000 values of each at most",
        horizons=f"{', '.join(map(str, HORIZON_STEPS))} steps",
        levels=", ".join(map(str, LEVELS)),
    )
    out: Path = options.out
    _write_losses(out, measured_on, outcomes, options.origins)
    _write_coverage(out.with_stem(f"{out.stem}_coverage"), measured_on, outcomes)
    _write_peaks(out.with_stem(f"{out.stem}_peaks"), measured_on, outcomes)
    _write_cost(out.with_stem(f"{out.stem}_cost"), outcomes)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "forecast.md")
    parser.add_argument("--baselines", choices=("all", "quick"), default="all")
    parser.add_argument(
        "--origins",
        type=int,
        default=60,
        metavar="N",
        help="of what is fitted at each; five times as many of what is learned",
    )
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


def _run(series: Sequence[Series], options: argparse.Namespace) -> Sequence[Outcome]:
    """Everybody on everything, the longest tasks first, one thread each."""
    quick = options.baselines == "quick"
    tasks = [(one, OURS) for one in sorted(series, key=lambda s: -len(s.values_T))]
    tasks += [(one, name) for name in reversed(contenders(quick)) for one in series]
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes to come
    progress = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    pool = ProcessPoolExecutor(options.processes, mp_context=get_context("spawn"))
    with progress, pool:
        bar = progress.add_task("backtests", total=len(tasks))
        running = [pool.submit(_outcome, one, name, options.origins, quick) for one, name in tasks]
        outcomes: list[Outcome] = []
        for done in as_completed(running):
            outcomes.append(done.result())
            last = outcomes[-1]
            progress.update(bar, advance=1, description=f"{last.contender} on {last.series.name}")
    return outcomes


def _outcome(series: Series, name: str, origins: int, quick: bool) -> Outcome:
    clock = SystemClock()
    values_T = series.values_T
    if name == OURS:
        ours = EnsembleForecaster(series.step_s, HORIZON_STEPS, LEVELS, series.season_steps)
        values, peaks = run_backtest_with_peaks(
            ours,
            values_T,
            step_s=series.step_s,
            horizon_steps=HORIZON_STEPS,
            levels=LEVELS,
            origins=spread_origins(len(values_T), HORIZON_STEPS),
            clock=clock,
        )
        return Outcome(series=series, contender=name, values=values, peaks=peaks)
    contender = contenders(quick)[name](series)
    if contender is None:
        return Outcome(series=series, contender=name, values=None)
    values = run_backtest(
        contender,
        values_T,
        horizon_steps=HORIZON_STEPS,
        levels=LEVELS,
        origins=spread_origins(len(values_T), HORIZON_STEPS, origins_of(name, origins)),
        clock=clock,
    )
    return Outcome(series=series, contender=name, values=values)


def _write_losses(
    out: Path, measured_on: Mapping[str, str], outcomes: Sequence[Outcome], origins: int
) -> None:
    """Our loss over each baseline's: the geometric mean over horizons for a series, then over series."""
    found = {(outcome.series.name, outcome.contender): outcome.values for outcome in outcomes}
    names = sorted({name for name, _ in found})
    baselines = [name for name in contenders(quick=False) if any(one == name for _, one in found)]
    ratios_HBS = np.full((len(HORIZON_STEPS), len(baselines), len(names)), np.nan)
    for b, baseline in enumerate(baselines):
        for s, name in enumerate(names):
            ours, theirs = found[name, OURS], found[name, baseline]
            if ours and theirs:
                ratios_HBS[:, b, s] = ours.at(theirs.origins).loss_H / theirs.loss_H
    rows: list[Sequence[object]] = [
        (name, *(_ratio(ratios_HBS[:, b, s]) for b in range(len(baselines)))) for s, name in enumerate(names)
    ]
    for h, steps in enumerate(HORIZON_STEPS):
        rows.append((f"*all, {steps} steps*", *(_ratio(ratios_HBS[h, b]) for b in range(len(baselines)))))
    rows.append(("**all**", *(f"**{_ratio(ratios_HBS[:, b])}**" for b in range(len(baselines)))))
    rows.append(("asked, all", *(f"≤ {ASKED[b]:.2f}" if b in ASKED else "" for b in baselines)))
    worst = [max(_mean(ratios_HBS[:, b, s]) for s in range(len(names))) for b in range(len(baselines))]
    rows.append(("worst series", *(f"{ratio:.3f}" for ratio in worst)))
    rows.append(("asked, each series", *(f"≤ {ASKED_EVERYWHERE}" for _ in baselines)))
    rows.append(("baseline / seasonal naive", *(_against_naive(found, names, b) for b in baselines)))
    counts = [origins_of(baseline, origins) or "every step" for baseline in baselines]
    rows.append(("origins a series", *counts))
    told = {"origins": "over the second half of a series; Forescale's are those of the baseline"}
    title = "Weighted quantile loss of Forescale's forecasts, relative to each baseline's"
    write_table(out, title, {**measured_on, **told}, ("series", *baselines), rows)


def _against_naive(
    found: Mapping[tuple[str, str], Backtest | None], names: Sequence[str], baseline: str
) -> str:
    ratios: list[float] = []
    for name in names:
        theirs, naive = found[name, baseline], found[name, "seasonal naive"]
        if theirs and naive:
            ratios += list(theirs.loss_H / naive.at(theirs.origins).loss_H)
    return f"{_mean(np.array(ratios)):.3f}"


def _mean(found: npt.ArrayLike) -> float:
    """Geometric, of those there are."""
    ratios = np.asarray(found)
    known = ratios[np.isfinite(ratios)]
    return float(np.exp(np.log(np.maximum(known, 1e-9)).mean())) if known.size else float("nan")


def _ratio(ratios: np.ndarray) -> str:
    mean = _mean(ratios)
    return "–" if np.isnan(mean) else f"{mean:.3f}"


def _write_coverage(out: Path, measured_on: Mapping[str, str], outcomes: Sequence[Outcome]) -> None:
    rows: list[Sequence[object]] = []
    kept = cells = 0
    for outcome in sorted(_ours(outcomes), key=lambda o: o.series.name):
        assert outcome.values
        cover_HL = outcome.values.coverage_HL
        rows.append((outcome.series.name, len(outcome.values.origins), *_covered(cover_HL)))
        kept += int(((cover_HL[:, AT_95] >= 0.925) & (cover_HL[:, AT_95] <= 0.97)).sum())
        kept += int((cover_HL[:, AT_99] >= 0.983).sum())
        cells += 2 * len(cover_HL)
    rows.append(("asked", "", *(["92.5 – 97 %"] * len(HORIZON_STEPS)), *(["≥ 98.3 %"] * len(HORIZON_STEPS))))
    header = (
        "series",
        "origins",
        *(f"95 %, {steps} steps" for steps in HORIZON_STEPS),
        *(f"99 %, {steps} steps" for steps in HORIZON_STEPS),
    )
    told = {"origins": "every step of the second half", "cells as asked": f"{kept} of {cells}"}
    write_table(out, "Coverage of upper quantiles", {**measured_on, **told}, header, rows)


def _covered(cover_HL: np.ndarray) -> list[str]:
    return [f"{100 * share:.1f} %" for level in (AT_95, AT_99) for share in cover_HL[:, level]]


def _write_peaks(out: Path, measured_on: Mapping[str, str], outcomes: Sequence[Outcome]) -> None:
    rows: list[Sequence[object]] = []
    shares_SH: list[list[float]] = []
    for outcome in sorted(_ours(outcomes), key=lambda o: o.series.name):
        assert outcome.peaks
        shares_H = [
            _reserved_share(outcome.series, outcome.peaks, h, best=best)
            for best in (False, True)
            for h in range(len(HORIZON_STEPS))
        ]
        shares_SH.append(shares_H)
        covered = _covered(outcome.peaks.coverage_HL)
        rows.append((outcome.series.name, *covered, *(f"{share:.2f}" for share in shares_H)))
    leads = len(HORIZON_STEPS)
    means_H = [_mean(shares_S) for shares_S in np.array(shares_SH).T]
    rows.append(("**geometric mean**", *([""] * 2 * leads), *(f"**{mean:.2f}**" for mean in means_H)))
    asked = [*(["92.5 – 97 %"] * leads), *(["≥ 98.3 %"] * leads), *(["≤ 0.60"] * 2 * leads)]
    rows.append(("asked", *asked))
    header = (
        "series",
        *(f"95 %, {steps} steps" for steps in HORIZON_STEPS),
        *(f"99 %, {steps} steps" for steps in HORIZON_STEPS),
        *(f"reserve / HPA's, {steps} steps" for steps in HORIZON_STEPS),
        *(f"reserve / best, {steps} steps" for steps in HORIZON_STEPS),
    )
    told = {
        "reserve": "mean of what the 95 % quantile holds beyond the peak, over the same of a moving maximum "
        "that covers as much: HPA's of 300 s, or the best of that, the lead time and five of them. What is "
        "added to it, or multiplied with, is the best with hindsight",
        "over all": f"{_mean(means_H[:leads]):.2f} of HPA's, {_mean(means_H[leads:]):.2f} of the best",
    }
    write_table(out, "Peaks over lead times", {**measured_on, **told}, header, rows)


def _reserved_share(series: Series, peaks: Backtest, h: int, *, best: bool) -> float:
    peaks_O, reserved_O = peaks.targets_OH[:, h], peaks.quantiles_OHL[:, h, AT_95]
    lead = peaks.horizon_steps[h]
    windows = [max(SHORTEST_WINDOW, round(HPA_WINDOW_S / series.step_s))]
    windows += [lead, 5 * lead] if best else []
    covered = float(peaks.coverage_HL[h, AT_95])
    theirs = moving_maximum(series.values_T, peaks.origins, peaks_O, windows, covered)
    return over_reservation(peaks_O, reserved_O) / theirs if theirs else float("nan")


def _write_cost(out: Path, outcomes: Sequence[Outcome]) -> None:
    bank = json.loads(_output("forecast_bank.py", "10000", "288", "240"))
    imported_s = min(float(_output("-c", IMPORT_TIME)) for _ in range(3))
    decisions_s = [outcome.values.decision_s for outcome in _ours(outcomes) if outcome.values]
    rows = [
        ("CPU of a round of 10,000 series, s", f"{bank['round_s']:.2f}", "< 10"),
        ("CPU per series and decision in it, ms", f"{bank['round_s'] / 10:.3f}", "≤ 1"),
        ("memory of that process, GiB", f"{bank['memory_bytes'] / 2**30:.2f}", "< 2"),
        ("rounds before that was measured", bank["rounds"], ""),
        ("one series alone, ms a decision with its peaks", f"{1e3 * float(np.median(decisions_s)):.1f}", ""),
        ("import, s", f"{imported_s:.2f}", "≤ 0.5"),
    ]
    for name in contenders(quick=False):
        found = [o.values.decision_s for o in outcomes if o.contender == name and o.values]
        if found:
            rows.append((f"{name}, ms a decision", f"{1e3 * float(np.median(found)):.2f}", ""))
    write_table(out, "Cost of forecasts", environment(), ("", "measured", "asked"), rows)


def _output(*arguments: str) -> str:
    """What another Python prints."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=Path(__file__).parent, check=True, capture_output=True, text=True
    ).stdout


def _ours(outcomes: Iterable[Outcome]) -> Sequence[Outcome]:
    return [outcome for outcome in outcomes if outcome.contender == OURS]


if __name__ == "__main__":
    main()
