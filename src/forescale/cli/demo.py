"""``forescale demo``."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forescale.cli import options
from forescale.cli.comparison import final_loss, saved_s, tokens_per_s, total_s
from forescale.cli.console import console, print_json, status, table
from forescale.cli.output import check_writable, fresh_folder, write_text
from forescale.cli.plan import microbatches, modules, parameters
from forescale.cli.units import moved, percent, seconds, si, size
from forescale.core.errors import InvalidInput

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from forescale.cli.demo_run import ContestedRun, Course
    from forescale.cli.demo_task import Shape
    from forescale.control.costs import ProfiledCosts
    from forescale.control.report import TrainingReport
    from forescale.core.cluster import Cluster
    from forescale.plan.partition_plan import PartitionPlan

Out = Annotated[
    Path,
    typer.Option(
        metavar="DIR", help="Where report and plan go, and the runs: each time to a new folder in DIR/runs."
    ),
]
Steps = Annotated[
    int | None, typer.Option(metavar="N", help="Steps of each run. Default: what two minutes allow.")
]

_TRAINING_BUDGET_S = 120.0
"""For both runs, their preparation included."""
_LEAST_TRAINING_S = 60.0
_SHOWN_MODULES = 6
ADAPTIVE, FIXED = "adaptive", "fixed plan"


def demo(out: Out = Path("demo-output"), steps: Steps = None, json: options.Json = False) -> None:
    """Trains a real model over two devices while one of them slows down, with and without adaptation."""
    shown = console(stderr=json)
    with status() as say, redirect_stdout(sys.stderr):
        scene = _set_up(shown, steps, out, say)
    _show_profile(shown, scene)
    _show_plan(shown, scene, out / "plan.svg")
    runs = _train_both(shown, scene)
    with status() as say:
        say("drawing the report")
        from forescale.cli.run_report import write_report

        write_report(
            out / "report.html",
            runs,
            title="Forescale demo: one device slows down",
            phases=scene.course.phases,
        )
    if json:
        print_json(_as_json(scene, runs, out))
    else:
        _show_outcome(shown, scene, runs, out)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scene:
    """What is trained, where and for how long; ``folder`` is that of these runs."""

    folder: Path
    text: Tensor
    shape: Shape
    cluster: Cluster
    costs: ProfiledCosts
    plan: PartitionPlan
    course: Course

    @property
    def binding(self) -> Mapping[str, int]:
        """The graph's symbols in the first batches."""
        graph = self.costs.profile.graph
        return graph.bind({graph.inputs[0]: (self.shape.rows, self.shape.length)})


def _set_up(shown: Console, steps: int | None, out: Path, say: Any) -> _Scene:
    say("reading the standard library's source")
    started_s = time.perf_counter()
    from forescale.cli.demo_run import LEAST_STEPS, Course
    from forescale.cli.demo_task import Shape, demo_task, encode, source_text
    from forescale.control.planner import Planner
    from forescale.control.preparation import profile_task
    from forescale.profile.cores import allowed_cores
    from forescale.profile.devices import core_sharing, find_cluster

    if steps is not None and steps < LEAST_STEPS:
        raise InvalidInput(f"--steps is {steps}; below {LEAST_STEPS} there is nothing to see")
    folder = fresh_folder(out / "runs", datetime.now().astimezone())
    for path in (out / "report.html", out / "plan.svg"):
        check_writable(path)
    text, library = source_text()
    shown.print(
        f"Text: {len(text):,} characters of the Python standard library, from {library}", markup=False
    )
    shape, encoded = Shape(), encode(text)
    cores = allowed_cores()
    # One core each, however many there are: so the demo is the same everywhere, and a core is quickly taken.
    cluster = find_cluster([f"cpu:{cores[number % len(cores)]}" for number in range(2)])
    if (warning := core_sharing(cluster)) is not None:
        shown.print(f"Note: {warning}; here adaptation can gain little.")
    task = demo_task(encoded, shape, long_from=sys.maxsize)
    costs, bindings = profile_task(task, cluster, folder / "profile", say)
    preparation_s = time.perf_counter() - started_s
    planner, graph = Planner(costs), costs.profile.graph
    plan = planner.best(bindings[0], {})
    long = planner.best(graph.bind({graph.inputs[0]: (shape.rows, 2 * shape.length)}), {})
    budget_s = max(_TRAINING_BUDGET_S - 3 * preparation_s, _LEAST_TRAINING_S)
    course = (
        Course.of(steps)
        if steps is not None
        else Course.within(budget_s, plan.prediction.step_s, long.prediction.step_s)
    )
    return _Scene(
        folder=folder, text=encoded, shape=shape, cluster=cluster, costs=costs, plan=plan, course=course
    )


def _train_both(shown: Console, scene: _Scene) -> dict[str, TrainingReport]:
    from forescale.cli.demo_run import train_contested
    from forescale.cli.demo_task import demo_task
    from forescale.cli.training_view import TrainingView

    course = scene.course
    shown.print(
        f"\nTwo runs of {course.steps} steps. From step {course.slow_from} on, another process takes CPU "
        f"time from {scene.cluster.devices[-1].name}; from step {course.long_from} on, sequences are doubled."
    )
    done: ContestedRun | None = None
    runs: dict[str, TrainingReport] = {}
    for label in (ADAPTIVE, FIXED):
        shown.print(f"\n[bold]{label}[/bold]")
        with TrainingView(course.steps) as view:

            def tell(number: int, device: str) -> None:
                others = "another process competes" if number == 1 else f"{number} other processes compete"
                print(f"{others} for {device}", file=sys.stderr)

            done = train_contested(
                demo_task(scene.text, scene.shape, long_from=course.long_from),
                scene.cluster,
                course,
                scene.folder / label.replace(" ", "-"),
                like=done,
                on_event=view.show,
                on_competitor=tell,
                on_progress=view.prepare,
            )
        runs[label] = done.report
    return runs


def _show_profile(shown: Console, scene: _Scene) -> None:
    from forescale.profile.hardware import suggest_hardware
    from forescale.profile.summary import costliest_modules, find_bottleneck

    profile, device = scene.costs.profile, scene.costs.cluster.devices[0]
    binding = scene.binding
    work = profile.work(binding)
    found = costliest_modules(profile, binding, device, depth=3)
    parameter_bytes = sum(module.parameter_bytes for module in found)
    shown.print(
        f"\n[bold]Profile[/bold] of one batch ({scene.shape.rows} × {scene.shape.length} characters): "
        f"{len(profile.graph.operators)} operators, {parameter_bytes // 4:,} parameters, "
        f"forward {si(float(work.forward_flops_O.sum()), 'FLOP')}, "
        f"backward {si(float(work.backward_flops_O.sum()), 'FLOP')}\n"
    )
    costliest = table("Costliest modules", "module", ">time", ">forward", ">backward", ">work", ">parameters")
    for module in found[:_SHOWN_MODULES]:
        costliest.add_row(
            module.path or "(model)",
            percent(module.fraction),
            seconds(module.forward_s),
            seconds(module.backward_s),
            si(module.flops, "FLOP"),
            size(module.parameter_bytes),
        )
    shown.print(costliest)
    needed_bytes = max(scene.costs.peak_bytes(scene.plan, binding))
    bottleneck = find_bottleneck(profile, binding, device, needed_bytes=needed_bytes)
    hardware = suggest_hardware(work, needed_bytes=needed_bytes, step_s=scene.plan.prediction.step_s)
    shown.print(f"Bottleneck: {bottleneck.limit} ({bottleneck.reason})")
    shown.print(f"For steps ten times as fast: {hardware.reason}")


def _show_plan(shown: Console, scene: _Scene, path: Path) -> None:
    from forescale.plan.drawing import draw_svg

    graph, plan = scene.costs.profile.graph, scene.plan
    write_text(path, draw_svg(graph, plan))
    stages = table("Plan", "device", ">operators", "from", "to", ">parameters", ">busy", ">peak memory")
    peaks_bytes = scene.costs.peak_bytes(plan, scene.binding)
    for stage, predicted, peak_bytes in zip(plan.stages, plan.prediction.stages, peaks_bytes, strict=True):
        paths = modules(graph, stage)
        stages.add_row(
            stage.device,
            str(len(stage.operators)),
            paths[0],
            paths[-1],
            f"{parameters(graph, stage):,}",
            percent(predicted.busy_s / plan.prediction.step_s),
            size(peak_bytes),
        )
    shown.print()
    shown.print(stages)
    shown.print(
        f"Predicted: {seconds(plan.prediction.step_s)} a step, with {microbatches(plan)}. Drawn in {path}.",
        markup=False,
    )


def _show_outcome(shown: Console, scene: _Scene, runs: dict[str, TrainingReport], out: Path) -> None:
    adaptive, fixed = runs[ADAPTIVE], runs[FIXED]
    phases = scene.course.phases
    outcome = table("Outcome", "", f">{ADAPTIVE}", f">{FIXED}", ">ratio")
    times_s = total_s(adaptive.steps), total_s(fixed.steps)
    outcome.add_row("total time", *map(seconds, times_s), f"{times_s[0] / times_s[1]:.2f}")
    for phase in phases:
        rates = tokens_per_s(phase.of(adaptive)), tokens_per_s(phase.of(fixed))
        outcome.add_row(
            f"tokens/s, {phase.name}", *(f"{rate:,.0f}" for rate in rates), f"{rates[0] / rates[1]:.2f}"
        )
    losses = final_loss(adaptive), final_loss(fixed)
    outcome.add_row("loss, last 8 steps", *(f"{loss:.4f}" for loss in losses), f"{losses[0] / losses[1]:.2f}")
    shown.print()
    shown.print(outcome)
    changes = table("Repartitions", ">before step", ">pause", ">moved", ">saved", "reason")
    for change, gain_s in zip(adaptive.repartitions, saved_s(adaptive, fixed), strict=True):
        changes.add_row(
            str(change.step),
            seconds(change.pause_s),
            moved(change.moved_bytes),
            f"{gain_s:+.1f} s",
            change.reason,
        )
    if adaptive.repartitions:
        shown.print(changes)
        shown.print("Saved: against the fixed plan over the same steps, until the next repartition.")
    else:
        shown.print("The plan was never changed: nothing was predicted to be worth it.")
    where = f"\nReport: {out / 'report.html'}\nPlan:   {out / 'plan.svg'}\nRuns:   {scene.folder}"
    shown.print(where, markup=False)


def _as_json(scene: _Scene, runs: dict[str, TrainingReport], out: Path) -> dict[str, Any]:
    saved = saved_s(runs[ADAPTIVE], runs[FIXED])
    return {
        "course": asdict(scene.course),
        "runs": {
            label: {
                "total_s": total_s(run.steps),
                "tokens_per_s": {phase.name: tokens_per_s(phase.of(run)) for phase in scene.course.phases},
                "final_loss": final_loss(run),
                "losses": run.losses,
                "step_s": run.step_s,
                "predicted_s": run.predicted_s,
                "overhead_s": run.overhead_s,
                "log": str(run.log_path),
            }
            for label, run in runs.items()
        },
        "repartitions": [
            {
                "step": change.step,
                "reason": change.reason,
                "pause_s": change.pause_s,
                "moved_bytes": change.moved_bytes,
                "saved_s": gain_s,
            }
            for change, gain_s in zip(runs[ADAPTIVE].repartitions, saved, strict=True)
        ],
        "report": str(out / "report.html"),
        "plan": str(out / "plan.svg"),
    }
