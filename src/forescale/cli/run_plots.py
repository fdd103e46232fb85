"""Plots of training runs as SVG that takes its colours from the page it is put into."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from forescale.cli.plot_style import plot_style

if TYPE_CHECKING:
    from forescale.cli.comparison import Phase
    from forescale.control.report import TrainingReport

Runs = Mapping[str, "TrainingReport"]

# Matplotlib wants colours when it draws; the page decides which. Each of these stands for a variable.
_VARIABLES = {
    "#010101": "--ink",
    "#020202": "--muted",
    "#030303": "--line",
    "#040404": "--band",
    "#040405": "--card",
    "#050501": "--series-1",
    "#050502": "--series-2",
    "#050503": "--series-3",
    "#050504": "--series-4",
}
_INK, _MUTED, _LINE, _BAND, _CARD, *_SERIES = _VARIABLES
_STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_STYLE: dict[Any, Any] = plot_style(ink=_INK, muted=_MUTED, line=_LINE) | {"lines.linewidth": 1.6}
_WIDTH_INCHES = 7.2
_ROW_INCHES = 2.5


def plot_step_times(runs: Runs, phases: Sequence[Phase]) -> str:
    """Observed and predicted seconds of every step, one row per run; repartitions are numbered lines."""
    with mpl.rc_context(_STYLE):
        figure, rows = _figure(len(runs))
        slowest_s = max(step_s for run in runs.values() for step_s in (*run.step_s, *run.predicted_s))
        for axes, (label, run), color in zip(rows, runs.items(), _cycle(len(runs)), strict=True):
            steps = [step.step for step in run.steps]
            axes.plot(steps, run.step_s, color=color, label="observed")
            axes.plot(
                steps, run.predicted_s, color=_INK, linewidth=1.1, linestyle=_STYLES[1], label="predicted"
            )
            axes.set_ylim(0, 1.18 * slowest_s)
            axes.set_ylabel("seconds per step")
            axes.set_title(label)
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1)
            _mark(axes, run, phases)
        return _svg(figure, "step-times")


def plot_loads(runs: Runs, phases: Sequence[Phase]) -> str:
    """Share of every step in which each device computed, one row per run."""
    with mpl.rc_context(_STYLE):
        figure, rows = _figure(len(runs))
        for axes, (label, run) in zip(rows, runs.items(), strict=True):
            devices = [device.name for device in run.costs.cluster.devices]
            for number, (device, color) in enumerate(zip(devices, _cycle(len(devices)), strict=True)):
                loads = [
                    sum(
                        stage.forward_s + stage.backward_s + stage.optimizer_s
                        for stage in step.stages
                        if stage.device == device
                    )
                    / step.step_s
                    for step in run.steps
                ]
                style = _STYLES[number % len(_STYLES)]
                axes.plot(
                    [step.step for step in run.steps], loads, color=color, linestyle=style, label=device
                )
            axes.set_ylim(0, 1.1)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_ylabel("computing")
            axes.set_title(label)
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0.1)
            _mark(axes, run, phases)
        return _svg(figure, "loads")


def plot_losses(runs: Runs, phases: Sequence[Phase]) -> str:
    """Loss of every step, all runs in one."""
    with mpl.rc_context(_STYLE):
        figure, (axes,) = _figure(1)
        for number, ((label, run), color) in enumerate(zip(runs.items(), _cycle(len(runs)), strict=True)):
            # Later runs are thinner and broken, so that equal ones show both.
            width, style = max(1.2, 3.2 - 1.6 * number), _STYLES[number % len(_STYLES)]
            steps = [step.step for step in run.steps]
            axes.plot(steps, run.losses, color=color, linewidth=width, linestyle=style, label=label)
        axes.set_ylabel("loss")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(runs), borderaxespad=0.1)
        _shade(axes, phases)
        return _svg(figure, "losses")


def _figure(rows: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH_INCHES, _ROW_INCHES * rows + 0.4), layout="constrained")
    found = [figure.add_subplot(rows, 1, number + 1) for number in range(rows)]
    for axes in found:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.01)
        axes.tick_params(length=0)
    found[-1].set_xlabel("step")
    return figure, found


def _cycle(count: int) -> list[str]:
    return [_SERIES[number % len(_SERIES)] for number in range(count)]


def _mark(axes: Axes, run: TrainingReport, phases: Sequence[Phase]) -> None:
    _shade(axes, phases)
    top = axes.get_ylim()[1]
    for number, change in enumerate(run.repartitions, start=1):
        axes.axvline(change.step - 0.5, color=_INK, linewidth=1)
        axes.text(change.step - 0.2, top, f" {number}", color=_INK, weight="bold", va="top")


def _shade(axes: Axes, phases: Sequence[Phase]) -> None:
    """Every other phase gets a band; its name stands at the bottom."""
    for number, phase in enumerate(phases):
        if number % 2:
            axes.axvspan(phase.first_step - 0.5, phase.end_step - 0.5, color=_BAND, linewidth=0, zorder=0)
        axes.annotate(
            phase.name,
            xy=((phase.first_step + phase.end_step - 1) / 2, 0.03),
            xycoords=("data", "axes fraction"),
            ha="center",
            color=_MUTED,
            fontsize=9,
            bbox={"facecolor": _CARD, "edgecolor": "none", "alpha": 0.75, "pad": 1.5},
        )


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element to be put into a page, whose names do not clash with another's."""
    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text
