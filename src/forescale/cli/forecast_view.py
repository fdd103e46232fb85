"""A forecast as a person reads it, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from math import floor, isfinite, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forescale.cli.console import console, table
from forescale.cli.units import percent

if TYPE_CHECKING:
    from rich.console import Console

    from forescale.cli.forecast_learning import Comparison, Forecast
    from forescale.forecast.forecaster import Array
    from forescale.forecast.series import Series

_SHOWN_MEMBERS = 6
_SHOWN_ANOMALIES = 5
_SAFE = 0.95


def as_json(found: Forecast, tested: Comparison | None, picture: Path | None) -> dict[str, Any]:
    series = found.series
    length = len(series.values_T)
    result: dict[str, Any] = {
        "series": {
            "column": series.name,
            "values": length,
            "missing": series.missing,
            "counts": series.counts,
            "step_s": series.step_s,
            "season_s": None if found.season_steps is None else found.season_steps * series.step_s,
            "start": _iso(series, 0),
            "end": _iso(series, length - 1),
            "notes": list(found.notes),
        },
        "levels": list(found.levels),
        "horizons": [
            {
                "horizon_s": steps * series.step_s,
                "steps": steps,
                "time": _iso(series, length - 1 + steps),
                "quantiles": quantiles.tolist(),
                "peak_quantiles": peaks.tolist(),
            }
            for steps, quantiles, peaks in zip(
                found.horizon_steps, found.quantiles_HL, found.peaks_HL, strict=True
            )
        ],
        "weights": dict(zip(found.members, found.weights_MH.tolist(), strict=True)),
        "anomalies": [
            {"step": step, "time": _iso(series, step), "value": float(series.values_T[step])}
            for step in found.anomalies
        ],
        "plot": None if picture is None else str(picture),
    }
    if tested is not None:
        result["backtest"] = {
            "origins": tested.origins,
            "horizon_s": [steps * series.step_s for steps in tested.horizon_steps],
            "loss": dict(zip(tested.names, _jsonable(tested.loss_CH), strict=True)),
            "relative_loss": dict(zip(tested.names, _jsonable(tested.relative_CH), strict=True)),
            "coverage": dict(zip(tested.names, _jsonable(tested.coverage_CHL), strict=True)),
        }
    return result


def show(name: str, found: Forecast, tested: Comparison | None, picture: Path | None) -> None:
    out = console()
    for line in _read(name, found):
        out.print(line, markup=False, soft_wrap=True)
    out.print()
    style = _style(found)
    out.print(_quantiles(found, "Forecast", found.quantiles_HL, style))
    out.print(_quantiles(found, "Highest value until then", found.peaks_HL, style))
    out.print(_advice(found, style), markup=False, soft_wrap=True)
    out.print()
    out.print(_weights(found))
    _show_anomalies(out, found, style)
    if tested is not None:
        _show_backtest(out, found, tested)
    if picture is not None:
        out.print(f"Fan chart: {picture}", markup=False, soft_wrap=True)


def duration(value_s: float) -> str:
    """A time in words, by its two largest units: ``15 s``, ``1 h 30 min``, ``16 d``."""
    if value_s < 59.5:
        return f"{value_s:.3g} s"
    rest = round(value_s)
    parts: list[str] = []
    for unit, size_s in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size_s)
        if count or parts:
            parts.append(f"{count:,} {unit}" if count else "")
        if len(parts) == 2:
            break
    return " ".join(filter(None, parts))


def when(series: Series, step: int) -> str | None:
    """Date of a step; with a Z where the file's times have a zone. None where it has no dates."""
    iso = _iso(series, step)
    if iso is None or series.start_s is None:
        return None
    whole_minutes = series.start_s % 60 == 0 and series.step_s % 60 == 0
    text = iso.removesuffix("Z").replace("T", " ")
    return (text.removesuffix(":00") if whole_minutes else text) + "Z" * series.zoned


def _iso(series: Series, step: int) -> str | None:
    if series.start_s is None:
        return None
    date = datetime.fromtimestamp(series.start_s + step * series.step_s, UTC).replace(tzinfo=None)
    precision = "seconds" if series.step_s >= 1 else "milliseconds"
    return date.isoformat(timespec=precision) + "Z" * series.zoned


def horizons(found: Forecast) -> list[str]:
    return [f"in {duration(steps * found.series.step_s)}" for steps in found.horizon_steps]


# --- parts -------------------------------------------------------------------------------------------------


def _read(name: str, found: Forecast) -> list[str]:
    series = found.series
    length = len(series.values_T)
    of = f", {series.name}" if series.name else ""
    span = duration(length * series.step_s)
    ends = "" if series.start_s is None else f", {when(series, 0)} to {when(series, length - 1)}"
    step = duration(series.step_s)
    return [
        f"{name}{of}: {length:,} values, {step} apart ({span}{ends})",
        *(f"- {note}" for note in found.notes),
    ]


def _quantiles(found: Forecast, title: str, quantiles_HL: Array, style: str) -> Any:
    series = found.series
    dated = series.start_s is not None
    names = ["median" if level == 0.5 else f"{100 * level:g}%" for level in found.levels]
    shown = table(title, "", *(["at"] if dated else []), *(f">{name}" for name in names))
    rows = zip(horizons(found), found.horizon_steps, quantiles_HL, strict=True)
    for words, steps, quantiles in rows:
        at = [when(series, len(series.values_T) - 1 + steps) or ""] if dated else []
        shown.add_row(words, *at, *(f"{value:{style}}" for value in quantiles))
    return shown


def _style(found: Forecast) -> str:
    """How figures are written, all alike: with four digits for the largest."""
    largest = float(np.abs(found.quantiles_HL).max())
    if not largest or not np.nanmax(np.abs(found.series.values_T)):
        return ".1f"
    decimals = max(0, 3 - floor(log10(largest)))
    return ".4g" if largest >= 1e12 or decimals > 9 else f",.{decimals}f"


def _advice(found: Forecast, style: str) -> str:
    """The figure to provide for."""
    level = min(found.levels, key=lambda level: abs(level - _SAFE))
    until = duration(found.horizon_steps[-1] * found.series.step_s)
    peak = found.peaks_HL[-1, found.levels.index(level)]
    return f"What covers all of the next {until} in {100 * level:g} of 100 cases: {peak:{style}}."


def _weights(found: Forecast) -> Any:
    shown = table("Whom the forecast trusts", "member", *(f">{words}" for words in horizons(found)))
    order = np.argsort(-found.weights_MH.mean(axis=1), kind="stable").tolist()
    named = [m for place, m in enumerate(order) if place < _SHOWN_MEMBERS or found.members[m] in found.slow]
    for member in named:
        shown.add_row(found.members[member], *map(percent, found.weights_MH[member]))
    others = [member for member in order if member not in named]
    if others:
        shown.add_row(f"{len(others)} others", *map(percent, found.weights_MH[others].sum(axis=0)))
    return shown


def _show_anomalies(out: Console, found: Forecast, style: str) -> None:
    series, length = found.series, len(found.series.values_T)
    if not found.anomalies:
        out.print("No anomalies.")
        return
    few = f", the last {_SHOWN_ANOMALIES}" if len(found.anomalies) > _SHOWN_ANOMALIES else ""
    shown = table(f"Anomalies: {len(found.anomalies):,}{few}", "when", ">value")
    for step in found.anomalies[-_SHOWN_ANOMALIES:]:
        ago = f"{duration((length - 1 - step) * series.step_s)} before the end"
        shown.add_row(when(series, step) or ago, f"{series.values_T[step]:{style}}")
    out.print(shown)


def _show_backtest(out: Console, found: Forecast, tested: Comparison) -> None:
    words = horizons(found)
    loss = table(
        "Backtest: quantile loss, seasonal naive = 1", "", *(f">{horizon}" for horizon in words), ">mean"
    )
    quick = set(found.members) - set(found.slow)
    shown = [c for c, name in enumerate(tested.names) if c <= _SHOWN_MEMBERS or name not in quick]
    for c in shown:
        relative_H = tested.relative_CH[c]
        loss.add_row(tested.names[c], *map(_ratio, relative_H), _ratio(_mean(relative_H)))
    hidden = len(tested.names) - len(shown)
    more = f"; {hidden} more members with --json" if hidden else ""
    loss.caption, loss.caption_justify = f"{tested.origins} forecasts of the last half{more}.", "left"
    out.print(loss)
    names = [f">{100 * level:g}%" for level in found.levels]
    covered = table("Share of values at or below each quantile", "", *names)
    for horizon, share_L in zip(words, tested.coverage_CHL[0], strict=True):
        covered.add_row(horizon, *(f"{100 * share:.1f}%" for share in share_L))
    out.print(covered)


def _mean(ratios: Sequence[float] | Array) -> float:
    """Geometric; of ratios, the only one that does not depend on which of the two is the divisor."""
    known = np.asarray(ratios)[np.isfinite(ratios)]
    return float(np.exp(np.log(np.maximum(known, 1e-12)).mean())) if len(known) else float("nan")


def _ratio(value: float) -> str:
    return f"{value:.3f}" if isfinite(value) else "-"


def _jsonable(values: Array) -> list[Any]:
    """Nested lists; None where there is no figure."""
    if values.ndim > 1:
        return [_jsonable(part) for part in values]
    return [value if isfinite(value) else None for value in values.tolist()]
