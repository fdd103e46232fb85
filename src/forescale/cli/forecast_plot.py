"""A forecast as a fan: what was, and how likely what is to come."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from forescale.cli.forecast_view import duration
from forescale.cli.plot_style import plot_style
from forescale.core.errors import InvalidInput

if TYPE_CHECKING:
    from forescale.cli.forecast_learning import Forecast
    from forescale.forecast.events import PlannedEvent
    from forescale.forecast.series import Series

_INK, _MUTED, _LINE, _FAN, _PEAK, _EVENT = "#1c2024", "#5d646d", "#e4e6e8", "#1f6fd1", "#c2570c", "#f3efe2"
_STYLE: dict[Any, Any] = plot_style(ink=_INK, muted=_MUTED, line=_LINE) | {
    "svg.hashsalt": "forecast",
    "axes.spines.left": False,
}
_PAST = 3
"""Times as much is shown of the past as of what is to come, and at least ``_LEAST`` steps."""
_LEAST = 60
_UNITS_S = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
_LABEL_GAP = 0.045  # between labels of quantiles, as a fraction of the axis


def write_fan_chart(path: Path, found: Forecast) -> None:
    """Writes the picture; its kind is that of the file's ending.

    Raises:
        InvalidInput: it cannot be written.
    """
    with mpl.rc_context(_STYLE):
        figure = draw_fan(found)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        try:
            figure.savefig(path, format=path.suffix[1:].lower(), dpi=160, metadata=metadata)
        except OSError as error:
            raise InvalidInput(f"cannot write {path}: {error.strerror}") from error


def draw_fan(found: Forecast) -> Figure:
    """The last values, the median and the bands between quantiles, and the highest value to be expected."""
    series, ahead = found.series, found.horizon_steps[-1]
    length = len(series.values_T)
    shown = min(length, max(_PAST * ahead, _LEAST))
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(length=0)
    axes.margins(x=0.01)
    place = _Axis(series, ahead)
    past = np.arange(length - shown, length)
    axes.plot(place.of(past), series.values_T[past], color=_INK, linewidth=1.3)
    odd = [step for step in found.anomalies if step >= length - shown]
    if odd:
        axes.plot(place.of(odd), series.values_T[odd], "o", color=_PEAK, markersize=5, fillstyle="none")
    _shade_events(axes, place.of([length - shown, length - 1 + ahead]), found.events)
    _draw_bands(axes, place, found)
    axes.axvline(place.of([length - 1])[0], color=_MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
    _label(axes, place.of([length - 1 + ahead])[0], found)
    place.mark(axes)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_title(f"{series.name or 'The series'}: the next {duration(ahead * series.step_s)}", pad=12)
    return figure


class _Axis:
    """Steps as dates, or where the series has none, as time from now in a unit that suits."""

    def __init__(self, series: Series, ahead: int) -> None:
        self._series = series
        self._last = len(series.values_T) - 1
        ahead_s = ahead * series.step_s
        self._unit_s, self._unit = next((unit for unit in _UNITS_S if ahead_s >= 2 * unit[0]), _UNITS_S[-1])

    def of(self, steps: Sequence[int] | np.ndarray) -> Any:
        at = np.asarray(steps)
        if self._series.start_s is None:
            return (at - self._last) * (self._series.step_s / self._unit_s)
        start_s = self._series.start_s
        return [datetime.fromtimestamp(start_s + step * self._series.step_s, UTC) for step in at.tolist()]

    def mark(self, axes: Axes) -> None:
        if self._series.start_s is None:
            axes.set_xlabel(f"{self._unit} from now")
            axes.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 3, 5, 6, 10]))
            return
        locator = AutoDateLocator(minticks=4, maxticks=9)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        if self._series.zoned:
            axes.set_xlabel("UTC")


def _shade_events(axes: Axes, ends: Any, events: Sequence[PlannedEvent]) -> None:
    """A band for each, as far as it is shown, with its name at the top; only dated series have events."""
    for event in events:
        begin, end = (datetime.fromtimestamp(at_s, UTC) for at_s in (event.start_s, event.end_s))
        if begin < ends[1] and ends[0] < end:
            begin, end = max(begin, ends[0]), min(end, ends[1])
            axes.axvspan(*date2num([begin, end]).tolist(), color=_EVENT, linewidth=0, zorder=0)
            axes.annotate(
                event.name,
                (begin + (end - begin) / 2, 1.0),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                color=_MUTED,
                fontsize=8,
            )


def _draw_bands(axes: Axes, place: _Axis, found: Forecast) -> None:
    """Fans begin at the last value; between horizons they are straight."""
    values_T = found.series.values_T
    known = np.flatnonzero(~np.isnan(values_T))[-1]
    at = place.of([known, *(len(values_T) - 1 + steps for steps in found.fan_steps)])
    quantiles_HL = np.vstack([np.full(len(found.levels), values_T[known]), found.fan_quantiles_HL])
    for lower in range(len(found.levels) - 1):
        middle = (found.levels[lower] + found.levels[lower + 1]) / 2
        axes.fill_between(
            at,
            quantiles_HL[:, lower],
            quantiles_HL[:, lower + 1],
            color=_tint(_FAN, 0.55 - abs(middle - 0.5)),
            linewidth=0,
        )
    if 0.5 in found.levels:
        axes.plot(at, quantiles_HL[:, found.levels.index(0.5)], color=_FAN, linewidth=1.8)
    highest = np.concatenate(([values_T[known]], found.fan_peaks_HL[:, _safe(found)]))
    axes.plot(at, highest, color=_PEAK, linewidth=1.3, linestyle=(0, (4, 2)))


def _label(axes: Axes, end: Any, found: Forecast) -> None:
    """Names quantiles at the end of the fan, moved apart where they would cover each other."""
    percents = ["median" if level == 0.5 else f"{100 * level:g}%" for level in found.levels]
    safe = _safe(found)
    texts = [
        *zip(found.quantiles_HL[-1].tolist(), percents, [_FAN] * len(percents), strict=True),
        (float(found.peaks_HL[-1, safe]), f"highest until then, {percents[safe]}", _PEAK),
    ]
    low, high = axes.get_ylim()
    below = -np.inf
    for value, text, color in sorted(texts):
        below = max(value, below + _LABEL_GAP * (high - low))
        axes.annotate(
            text,
            (end, below),
            xytext=(6, 0),
            textcoords="offset points",
            color=color,
            va="center",
            fontsize=9,
        )
    axes.set_ylim(low, max(high, below))


def _safe(found: Forecast) -> int:
    return int(np.argmin(np.abs(np.array(found.levels) - 0.95)))


def _tint(color: str, strength: float) -> tuple[float, float, float]:
    """Mixed with white, not transparent, so that bands look alike in every viewer."""
    red, green, blue = (1.0 - strength * (1.0 - part) for part in to_rgb(color))
    return red, green, blue
