"""``forescale train``."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forescale.cli import options
from forescale.cli.console import console, print_json, table
from forescale.cli.output import check_writable
from forescale.cli.task_file import load_task
from forescale.cli.units import moved, percent, seconds, si
from forescale.core.errors import InvalidInput, RunFailed

if TYPE_CHECKING:
    from forescale.control.report import TrainingReport

Steps = Annotated[
    int,
    typer.Option(
        min=1, metavar="S", help="Steps in total, those before a resume included; fewer if the batches end."
    ),
]
Adapt = Annotated[bool, typer.Option(help="Change the plan while training, when that pays.")]
CheckpointEvery = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Steps between checkpoints. Default: one at the end."),
]
ReportPath = Annotated[
    Path | None,
    typer.Option(
        metavar="OUT.html",
        help="Write a page with plots of this run, also if it is interrupted.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in DIR.")]


def train(  # noqa: PLR0913, PLR0917 - typer takes the options from the signature
    file: options.TaskReference,
    steps: Steps,
    devices: options.Devices = None,
    adapt: Adapt = True,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = False,
    directory: options.RunFolder = None,
    report: ReportPath = None,
    json: options.Json = False,
) -> None:
    """Trains a model over several devices and moves parts of it between them when that pays.

    Ctrl-C ends a run with a checkpoint.
    """
    if resume and directory is None:
        raise typer.BadParameter("--resume needs --dir DIR, the folder of the run to go on with")
    if report is not None:
        _check_report(report, directory)
    from forescale.cli.training_view import TrainingView

    with redirect_stdout(sys.stderr), TrainingView(steps) as view:  # what the task prints is no result
        view.prepare("loading the task")
        task = load_task(file)
        import forescale

        try:
            done = forescale.train(
                task,
                steps=steps,
                devices=devices,
                adapt=adapt,
                directory=directory,
                checkpoint_every=checkpoint_every or steps,
                resume=resume,
                on_event=view.show,
                on_progress=view.prepare,
            )
        except RunFailed as failed:
            if report is not None and failed.report is not None:
                _write_report(report, failed.report, file)
            raise
    if json:
        print_json(report_as_json(done))
    else:
        _summarise(done)
    if report is not None and done.steps:
        _write_report(report, done, file)


def _check_report(path: Path, directory: Path | None) -> None:
    from forescale.cli.run_report import NO_PLOTS, plots_can_be_drawn

    if not plots_can_be_drawn():
        raise InvalidInput(f"--report: {NO_PLOTS[0].lower()}{NO_PLOTS[1:]}")
    check_writable(path, made=directory)


def _write_report(path: Path, report: TrainingReport, file: str) -> None:
    from forescale.cli.run_report import write_report

    write_report(path, {"run": report}, title=f"Training of {file}")
    console(stderr=True).print(f"report: {path}", markup=False, soft_wrap=True)


def report_as_json(report: TrainingReport) -> dict[str, Any]:
    return {
        "losses": report.losses,
        "step_s": report.step_s,
        "predicted_s": report.predicted_s,
        "tokens": [step.tokens for step in report.steps],
        "repartitions": [asdict(change) for change in report.repartitions],
        "plans": [asdict(plan) for plan in report.plans],
        "overhead_s": report.overhead_s,
        "log_path": str(report.log_path),
        "checkpoint": str(report.checkpoint) if report.checkpoint else None,
    }


def _summarise(report: TrainingReport) -> None:
    out = console()
    summary = table("Run", "", ">")
    if report.steps:
        first, last, total_s = report.steps[0], report.steps[-1], sum(report.step_s)
        errors = [abs(step.predicted_s / step.step_s - 1) for step in report.steps]
        summary.add_row("steps", f"{first.step} to {last.step}")
        summary.add_row("loss", f"{first.loss:.4f} to {last.loss:.4f}")
        summary.add_row("throughput", si(sum(step.tokens for step in report.steps) / total_s, "tokens/s"))
        summary.add_row("step time, median", seconds(median(report.step_s)))
        summary.add_row("error of predicted step time, median", percent(median(errors)))
        summary.add_row("time spent on adaptation", f"{100 * report.overhead_s / total_s:.2f}%")
    summary.add_row("repartitions", str(len(report.repartitions)))
    summary.add_row("log", str(report.log_path))
    summary.add_row("checkpoint", str(report.checkpoint or "none"))
    out.print(summary)
    if report.repartitions:
        changes = table("Repartitions", ">step", ">pause", ">moved", "reason")
        for change in report.repartitions:
            changes.add_row(
                str(change.step), seconds(change.pause_s), moved(change.moved_bytes), change.reason
            )
        out.print(changes)
