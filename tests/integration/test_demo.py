"""The demo's two runs, with a small model: a real process slows one device down, and the plan changes."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from forescale.cli.demo_run import LEAST_STEPS, MOST_STEPS, Course, train_contested
from forescale.cli.demo_task import ALPHABET, Shape, batches, demo_task, encode
from forescale.engine.train.task import TrainingTask
from forescale.profile.devices import allowed_cores, find_cluster

SHAPE = Shape(channels=128, heads=4, convolutions=3, attentions=3, length=64)
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

    adaptive = train_contested(task(), cluster, course, tmp_path / "adaptive", on_competitor=note)
    fixed = train_contested(task(), cluster, course, tmp_path / "fixed", like=adaptive)

    assert set(devices) == {"cpu1"}
    assert len(competitors) >= len(cluster.devices) + 1, "the workers and at least one competitor"
    assert not any(map(psutil.pid_exists, competitors))
    assert any(change.step >= course.slow_from for change in adaptive.report.repartitions)
    assert fixed.report.plans == adaptive.report.plans[:1]
    assert fixed.competitors == adaptive.competitors
    assert adaptive.report.losses == pytest.approx(fixed.report.losses, rel=1e-3)


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
