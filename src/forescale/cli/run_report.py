"""``report.html``: what happened in one or several runs, in one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from forescale.cli.comparison import Phase, final_loss, saved_s, tokens_per_s, total_s
from forescale.cli.output import write_text
from forescale.cli.units import moved, seconds, si, size
from forescale.core.errors import InvalidInput

if TYPE_CHECKING:
    from forescale.control.report import TrainingReport
    from forescale.engine.messages import Repartitioned

Runs = Mapping[str, "TrainingReport"]
Plot = Callable[[Runs, Sequence[Phase]], str]

NO_PLOTS = "The plots need matplotlib: pip install 'forescale[report]'."


def plots_can_be_drawn() -> bool:
    """Whether the extra ``report`` is installed."""
    return find_spec("matplotlib") is not None


def write_report(
    path: Path, runs: Runs, *, title: str = "Training report", phases: Sequence[Phase] = ()
) -> None:
    """Writes the report of one or several runs.

    Args:
        runs: label -> run, at least one. Gains of repartitions are counted against the first run that
            never changed its plan, if there is one.
        phases: stretches of the runs to be told apart.

    Raises:
        InvalidInput: a run has no steps, or the file cannot be written.
    """
    if not all(run.steps for run in runs.values()):
        raise InvalidInput("there is nothing to report: the run has no steps")
    sections = (
        _section("Summary", _summary(runs, phases)),
        *_plots(runs, phases),
        _section("Repartitions", _repartitions(runs)),
        _section("Plans", *_plans(runs)),
        _section("Devices and model", _devices(next(iter(runs.values())))),
    )
    style = (files("forescale.cli") / "report.css").read_text(encoding="utf-8")
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n{''.join(sections)}</main></body></html>\n"
    )
    write_text(path, page)


def unchanging(runs: Runs) -> TrainingReport | None:
    """The first run that never changed its plan."""
    return next((run for run in runs.values() if not run.repartitions), None)


# --- parts of the page: arguments named *_html are markup, all others are text ----------------------


def _section(heading: str, *parts_html: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{''.join(parts_html)}</section>\n"


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _figure(content_html: str, caption: str) -> str:
    return (
        f'<figure><figcaption>{escape(caption)}</figcaption><div class="scroll">{content_html}</div></figure>'
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Columns whose name begins with ``>`` hold figures and are aligned to the right.

    Args:
        notes: a text for every row, shown below it.
    """
    kinds = [' class="figure"' if name.startswith(">") else "" for name in columns]
    head = "".join(
        f"<th{kind}>{escape(name.removeprefix('>'))}</th>" for name, kind in zip(columns, kinds, strict=True)
    )
    body = [
        f"<tr>{''.join(f'<td{kind}>{escape(cell)}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>"
        for row in rows
    ]
    for number, note in enumerate(notes):
        body[number] += f'<tr class="note"><td colspan="{len(columns)}"><div>{escape(note)}</div></td></tr>'
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


# --- sections ----------------------------------------------------------------------------------------


def _summary(runs: Runs, phases: Sequence[Phase]) -> str:
    every = list(runs.values())
    rows: list[list[str]] = [
        ["steps", *(str(len(run.steps)) for run in every)],
        ["total time", *(seconds(total_s(run.steps)) for run in every)],
        ["tokens/s", *(f"{tokens_per_s(run.steps):,.0f}" for run in every)],
        *(
            [f"tokens/s, {phase.name}", *(f"{tokens_per_s(phase.of(run)):,.0f}" for run in every)]
            for phase in phases
        ),
        ["loss, mean of the last 8 steps", *(f"{final_loss(run):.4f}" for run in every)],
        ["repartitions", *(str(len(run.repartitions)) for run in every)],
        ["paused for them", *(seconds(sum(change.pause_s for change in run.repartitions)) for run in every)],
        ["coordinator's time for decisions", *(seconds(run.overhead_s) for run in every)],
    ]
    return _table(["", *(f">{label}" for label in runs)], rows)


def _plots(runs: Runs, phases: Sequence[Phase]) -> list[str]:
    if not plots_can_be_drawn():
        return [_section("Plots", _paragraph(NO_PLOTS))]
    from forescale.cli.run_plots import plot_loads, plot_losses, plot_step_times

    plots: list[tuple[str, Plot, str]] = [
        (
            "Step time",
            plot_step_times,
            "Observed and predicted seconds of every step. Numbered lines are repartitions, listed below.",
        ),
        (
            "Load of the devices",
            plot_loads,
            "Share of each step in which a device computed: forward, backward and optimizer. On a device "
            "that another process competes for, this includes the time that process took.",
        ),
        ("Loss", plot_losses, "Where the curves cover each other, the runs learnt the same."),
    ]
    return [_section(heading, _figure(plot(runs, phases), caption)) for heading, plot, caption in plots]


def _repartitions(runs: Runs) -> str:
    columns = ["run", ">no.", ">before step", ">pause", ">moved", "changed"]
    baseline = unchanging(runs)
    rows: list[list[str]] = []
    reasons: list[str] = []
    for label, run in runs.items():
        saved = saved_s(run, baseline) if baseline is not None else ()
        for number, change in enumerate(run.repartitions):
            gain = [f"{saved[number]:+.1f} s"] if baseline is not None else []
            rows.append([label, str(number + 1), *_repartition_cells(change), *gain])
            reasons.append(change.reason)
    if not rows:
        return _paragraph("The plan was never changed.")
    if baseline is None:
        return _table(columns, rows, reasons)
    return _table([*columns, ">saved"], rows, reasons) + _paragraph(
        "Saved: by how much the run was faster than the one that kept its plan, until the next repartition."
    )


def _repartition_cells(change: Repartitioned) -> list[str]:
    from forescale.control.choice import changes

    return [
        str(change.step),
        seconds(change.pause_s),
        moved(change.moved_bytes),
        changes(change.before, change.after),
    ]


def _plans(runs: Runs) -> list[str]:
    """Every plan that was in force, each once, drawn."""
    from forescale.plan.drawing import draw_svg

    drawn: dict[str, list[str]] = {}
    for label, run in runs.items():
        starts = [run.steps[0].step, *(change.step for change in run.repartitions)]
        for plan, start in zip(run.plans, starts, strict=True):
            drawn.setdefault(draw_svg(run.costs.profile.graph, plan), []).append(
                f"{label}, from step {start}"
            )
    return [_figure(svg, "; ".join(captions)) for svg, captions in drawn.items()]


def _devices(run: TrainingReport) -> str:
    graph = run.costs.profile.graph
    parameters = sum(
        _elements(parameter.shape) for parameter in graph.parameters.values() if parameter.trainable
    )
    rows = [
        (
            device.name,
            ", ".join(map(str, device.cores)) or str(device.index),
            si(device.flops_per_s, "FLOP/s"),
            size(device.memory_bandwidth_bytes_per_s) + "/s",
            size(device.memory_bytes),
        )
        for device in run.costs.cluster.devices
    ]
    columns = ("device", "core or index", ">float32", ">memory bandwidth", ">memory")
    return _table(columns, rows) + _paragraph(
        f"The model: {parameters:,} trainable parameters, {len(graph.operators)} operators. "
        f"Every event and decision is in {run.log_path}; forescale replay explains it."
    )


def _elements(shape: Iterable[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
