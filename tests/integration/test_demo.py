"""The demo's two runs, with a small model: a real process slows one device down, and the plan changes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
import torch
from typer.testing import CliRunner

from forescale.cli.demo_run import LEAST_STEPS, MOST_STEPS, ContestedRun, Course, train_contested
from forescale.cli.demo_task import ALPHABET, Shape, batches, demo_task, encode
from forescale.cli.main import app
from forescale.control.costs import ProfiledCosts
from forescale.control.planner import Planner
from forescale.control.preparation import Progress, profile_task
from forescale.control.report import TrainingReport
from forescale.core.cluster import Cluster
from forescale.engine.messages import Event, StepFinished
from forescale.engine.train.task import TrainingTask
from forescale.profile.cores import allowed_cores
from forescale.profile.devices import find_cluster

SHAPE = Shape(channels=128, heads=4, convolutions=3, attentions=3, length=64)
TINY = Shape(channels=32, heads=2, convolutions=1, attentions=1, length=16)
TEXT = torch.randint(len(ALPHABET), (20_000,), generator=torch.Generator().manual_seed(0))


@pytest.mark.skipif(len(allowed_cores()) < 2, reason="one core: both devices slow down together")
def test_a_competing_process_leads_to_another_plan_and_does_not_stay(tmp_path: Path) -> None:
    cluster = find_cluster([f"cpu:{core}" for core in allowed_cores()[:2]])
    course = Course(steps=60, slow_from=12, long_from=54)
    competitors: set[int] = set()
    devices: list[str] = []

    def note(number: int, device: str) -> None:
        devices.append(device)
        competitors.update(child.pid for child in psutil.Process().children())

    def task() -> TrainingTask:
        return demo_task(TEXT, SHAPE, long_from=course.long_from)

    steps: list[StepFinished] = []

    def keep(event: Event) -> None:
        if isinstance(event, StepFinished):
            steps.append(event)

    adaptive = train_contested(
        task(), cluster, course, tmp_path / "adaptive", on_competitor=note, on_event=keep
    )
    fixed = train_contested(task(), cluster, course, tmp_path / "fixed", like=adaptive)

    assert set(devices) == {"cpu1"}
    assert len(competitors) >= len(cluster.devices) + 1, "the workers and at least one competitor"
    assert not any(map(psutil.pid_exists, competitors))
    assert fixed.report.plans == adaptive.report.plans[:1]
    assert fixed.competitors == adaptive.competitors
    assert adaptive.report.losses == pytest.approx(fixed.report.losses, rel=1e-3)
    if not any(change.step >= course.slow_from for change in adaptive.report.repartitions):
        slower = {device.name: slowdown(steps, device.name, course) for device in cluster.devices}
        if slower["cpu1"] < 1.5 * slower["cpu0"]:
            pytest.skip(f"something else slows the other device down as well: {slower}")
        pytest.fail(f"the plan stayed as it was, though one device became slower: {slower}")


def slowdown(steps: Sequence[StepFinished], device: str, course: Course) -> float:
    """By how much a device took longer for the same once there was competition."""
    alone_s, contested_s = (
        median(sum(r.forward_s + r.backward_s for r in step.stages if r.device == device) for step in part)
        for part in (
            [step for step in steps if step.step < course.slow_from],
            [step for step in steps if course.slow_from < step.step < course.long_from],
        )
    )
    return contested_s / alone_s


class QuickDemo:
    """Stands in for the demo's slow parts: profiles once, with a small model, and does not train."""

    def __init__(self) -> None:
        self.profiled: list[tuple[ProfiledCosts, tuple[Mapping[str, int], ...]]] = []

    def profile(
        self, task: TrainingTask, cluster: Cluster, directory: Path, progress: Progress
    ) -> tuple[ProfiledCosts, tuple[Mapping[str, int], ...]]:
        if not self.profiled:
            self.profiled.append(profile_task(task, cluster, directory, progress))
        return self.profiled[0]

    def train(
        self, task: TrainingTask, cluster: Cluster, course: Course, directory: Path, **_: Any
    ) -> ContestedRun:
        directory.mkdir(parents=True)  # not exist_ok: a folder that holds a run is refused
        (directory / "log.jsonl").touch()
        costs, bindings = self.profiled[0]
        binding = bindings[0]
        step = StepFinished(
            step=0, step_s=1.0, loss=1.0, binding=binding, rows=1, tokens=1, stages=(), predicted_s=1.0
        )
        report = TrainingReport(
            steps=tuple(replace(step, step=number) for number in range(course.steps)),
            repartitions=(),
            plans=(Planner(costs).best(binding, {}),),
            costs=costs,
            overhead_s=0.0,
            log_path=directory / "log.jsonl",
            checkpoint=None,
            _state={},
        )
        return ContestedRun(report=report, competitors={})


def test_the_demo_runs_again_in_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = QuickDemo()
    monkeypatch.setattr("forescale.cli.demo_task.Shape", lambda: TINY)
    monkeypatch.setattr("forescale.cli.demo_task.source_text", lambda: ("import this\n" * 2000, tmp_path))
    monkeypatch.setattr("forescale.control.preparation.profile_task", quick.profile)
    monkeypatch.setattr("forescale.cli.demo_run.train_contested", quick.train)
    out = tmp_path / "demo"
    former = out / "adaptive" / "log.jsonl"  # where earlier releases wrote
    former.parent.mkdir(parents=True)
    former.touch()
    logs: list[Path] = []
    for _ in range(2):
        for name in ("report.html", "plan.svg"):
            (out / name).write_text("former", encoding="utf-8")
        result = CliRunner().invoke(app, ["demo", "--out", str(out), "--steps", str(LEAST_STEPS), "--json"])
        assert result.exit_code == 0, result.output
        logs += [Path(run["log"]) for run in json.loads(result.stdout)["runs"].values()]
        assert (out / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE")
        assert (out / "plan.svg").read_text(encoding="utf-8").startswith("<svg")
    assert all(path.exists() for path in (former, *logs))
    assert [log.parent.name for log in logs] == ["adaptive", "fixed-plan"] * 2
    first, second = sorted({log.parents[1] for log in logs})
    assert first.parent == second.parent == out / "runs"
    assert (first / "profile").is_dir()


def test_batches_are_the_same_every_time_and_double_on_schedule() -> None:
    first, second = (batches(TEXT, SHAPE, long_from=2) for _ in range(2))
    lengths: list[int] = []
    for (inputs, targets), (again, _), _ in zip(first, second, range(4), strict=False):
        assert torch.equal(inputs, again)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        lengths.append(inputs.shape[1])
    assert lengths == [64, 64, 128, 128]


def test_the_text_is_written_in_the_alphabet() -> None:
    assert encode("ab\n€").tolist() == [
        ALPHABET.index("a"),
        ALPHABET.index("b"),
        ALPHABET.index("\n"),
        len(ALPHABET),
    ]


def test_slower_machines_take_fewer_steps_within_limits() -> None:
    courses = [Course.within(100.0, step_s, 2.5 * step_s) for step_s in (0.001, 0.2, 0.3, 50.0)]
    steps = [course.steps for course in courses]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] == MOST_STEPS
    assert LEAST_STEPS < steps[2] < steps[1] < MOST_STEPS
    assert steps[-1] == LEAST_STEPS
    assert all(0 < c.slow_from < c.long_from < c.steps for c in courses)
