"""What knowing the upcoming batch is worth in forecasts of a run's utilisation.

Trains a small model on two devices with batches whose sequence length keeps changing, and goes through the
run's log again: what was said of each step's busy share and compute seconds on each device, before it ran,
without and with the batch's predicted use. Weighted quantile loss; lower is better.

    python benchmarks/forecast_covariates.py [--log RUN/log.jsonl] [--out FILE.md]

Axes: L = quantile level.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from table import environment, write_table
from workloads import gpt_task, token_batches

import forescale as fs
from forescale.control.costs import ProfiledCosts
from forescale.control.log import Header, decode
from forescale.control.planner import Planner
from forescale.engine.messages import Binding, Repartitioned, RunStarted, StepFinished
from forescale.engine.runlog import read_run_log
from forescale.forecast.covariates import ProportionalForecaster
from forescale.forecast.forecaster import Covariates, Forecaster
from forescale.forecast.level import LevelForecaster
from forescale.forecast.scoring import weighted_quantile_loss
from forescale.plan.partition_plan import PartitionPlan

STEPS, WARM_UP, ROWS = 240, 40, 8
LENGTHS = (32, 64, 128, 256)
LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


def batches(count: int, seed: int = 5) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Runs of a length, from single batches to dozens."""
    rng = np.random.default_rng(seed)
    made = 0
    while made < count:
        length = int(rng.choice(LENGTHS))
        run = min(int(rng.choice([1, 2, 5, 20])), count - made)
        yield from token_batches(count=run, rows=ROWS, length=length, seed=made)
        made += run


def record(folder: Path) -> Path:
    task = gpt_task(width=96, layers=4, rows=ROWS, length=LENGTHS[0], count=1)
    task = fs.TrainingTask(task.model, task.loss, task.optimizer, batches(STEPS + 16))
    return fs.train(task, steps=STEPS, devices=2, directory=folder, adapt=False).log_path


@dataclass(slots=True)
class Score:
    """What a forecaster said of one quantity of one device, and what came."""

    forecaster: Forecaster
    said: list[np.ndarray] = field(default_factory=list)
    came: list[float] = field(default_factory=list)
    spent_s: float = 0.0

    def take(self, value: float, known: Covariates) -> None:
        begun_s = time.perf_counter()
        self.said.append(self.forecaster.predict(known)[0])
        self.forecaster.update(value, known)
        self.spent_s += time.perf_counter() - begun_s
        self.came.append(value)

    @property
    def loss(self) -> float:
        said_TL = np.array(self.said[WARM_UP:])
        return weighted_quantile_loss(np.array(self.came[WARM_UP:]), said_TL, LEVELS)


def contenders() -> Mapping[str, Forecaster]:
    return {
        "level": LevelForecaster(1.0, (1,), LEVELS),
        "level x predicted use": ProportionalForecaster(LevelForecaster(1.0, (1,), LEVELS), "predicted"),
    }


def observations(path: Path) -> Iterator[tuple[str, float, float]]:
    """Quantity of a device, its value in a step, and what the batch was predicted to need of it."""
    planner: Planner | None = None
    plan: PartitionPlan | None = None
    for values in read_run_log(path):
        found = decode(values)
        if isinstance(found, Header):
            planner = Planner(ProfiledCosts.from_json(found.run))
        elif isinstance(found, RunStarted):
            plan = found.plan
        elif isinstance(found, Repartitioned):
            plan = found.after
        elif isinstance(found, StepFinished) and planner is not None and plan is not None:
            predicted_s = predictions(planner, plan, found.binding)
            step_s = planner.prediction(plan, found.binding, {}).step_s
            for report in found.stages:
                busy_s = report.forward_s + report.backward_s + report.optimizer_s
                expected_s = predicted_s.get(report.device, 0.0)
                yield f"{report.device}, busy share", busy_s / found.step_s, expected_s / step_s
                yield f"{report.device}, seconds busy", busy_s, expected_s


def predictions(planner: Planner, plan: PartitionPlan, binding: Binding) -> Mapping[str, float]:
    """Seconds per device that a batch is predicted to keep it busy for."""
    busy_s: dict[str, float] = {}
    stages = planner.prediction(plan, binding, {}).stages
    for stage, compute_s, told in zip(plan.stages, planner.compute_s(plan, binding, {}), stages, strict=True):
        busy_s[stage.device] = busy_s.get(stage.device, 0.0) + compute_s + told.optimizer_s
    return busy_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--log", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/forecast_covariates.md"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = asked.log or record(Path(folder) / "run")
        scores: dict[str, dict[str, Score]] = {}
        for quantity, value, predicted in observations(path):
            known = scores.setdefault(quantity, {name: Score(f) for name, f in contenders().items()})
            for score in known.values():
                score.take(value, {"predicted": predicted})
    names = list(contenders())
    rows = [
        [
            quantity,
            *(f"{by[name].loss:.4f}" for name in names),
            f"{by[names[-1]].loss / by[names[0]].loss:.2f}",
        ]
        for quantity, by in sorted(scores.items())
    ]
    steps = sum(len(by[names[0]].came) for by in scores.values())
    spent = [sum(by[name].spent_s for by in scores.values()) / steps * 1e3 for name in names]
    rows.append(["ms per forecast", *(f"{time_ms:.3f}" for time_ms in spent), ""])
    title = "Forecasts of utilisation without and with the upcoming batch"
    measured_on = environment(steps=STEPS, lengths=LENGTHS, seed=5)
    write_table(asked.out, title, measured_on, ["one step ahead", *names, "ratio"], rows)


if __name__ == "__main__":
    main()
