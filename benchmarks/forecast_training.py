"""Forecasts of what training steps use of the devices, with and without what is known of their batches.

Runs are recorded first, of two models whose sequences change their length in blocks, at random, and slowly.
Then busy share, busy seconds and memory of every device are forecast from every step of each run on, twice:
by the default forecaster from their past alone, and, as the training controller does, by a light one that
also knows what the planner predicts for the batches in view.

    python benchmarks/forecast_training.py [RUN_DIR ...] [--steps N] [--out FILE.md]

Axes: T = step, N = figure of a device (device by device), H = horizon, L = level, K = covariate.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from forced import ForcedRun
from table import environment, write_table
from workloads import GPT, VOCABULARY, next_token_loss

import forescale as fs
from forescale.cli.demo_task import CharacterGpt, Shape
from forescale.control.costs import ProfiledCosts
from forescale.control.deviation import compared
from forescale.control.log import Header, decode
from forescale.control.planner import Planner
from forescale.control.preparation import capture_task, prepare
from forescale.control.utilisation import FIGURES, covariates_NK, log_ratios_N, use_forecaster
from forescale.engine.messages import Repartitioned, RunStarted, StepFinished
from forescale.engine.runlog import read_run_log
from forescale.engine.train.engine import TrainingEngine
from forescale.forecast.bank import ForecasterBank
from forescale.forecast.forecaster import Array
from forescale.forecast.scoring import coverage, weighted_quantile_loss
from forescale.plan.partition_plan import PartitionPlan
from forescale.profile.devices import find_cluster

HORIZON_STEPS = (1, 2, 3, 4, 5, 6, 7, 8)  # the batches of 8 steps are in view
SHOWN_STEPS = (1, 4, 8)
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
WARM_UP = 40  # steps seen before the first forecast
ROWS, LONGEST, BLOCK = 8, 192, 25
MEMORY_STEPS = 100

Batch = tuple[torch.Tensor, torch.Tensor]


def in_blocks(chance: torch.Generator) -> Iterator[int]:
    """Lengths that stay for some steps."""
    while True:
        length = int(torch.randint(2, LONGEST // 16 + 1, (), generator=chance)) * 16
        yield from [length] * int(torch.randint(BLOCK // 2, 2 * BLOCK, (), generator=chance))


def at_random(chance: torch.Generator) -> Iterator[int]:
    """Another length for every batch."""
    while True:
        yield int(torch.randint(2, LONGEST // 16 + 1, (), generator=chance)) * 16


def growing(chance: torch.Generator) -> Iterator[int]:  # noqa: ARG001 - nothing is left to chance
    """A curriculum: from short to long, and again."""
    for step in count():
        yield 32 + (step * 2 // 3) % (LONGEST - 32)


KINDS: Mapping[str, Callable[[torch.Generator], Iterator[int]]] = {
    "in blocks": in_blocks,
    "at random": at_random,
    "growing": growing,
}


def gpt() -> torch.nn.Module:
    return GPT(width=128, layers=4, heads=4, context=LONGEST)


def convolutions_and_attention() -> torch.nn.Module:
    return CharacterGpt(Shape(channels=128, heads=4, convolutions=3, attentions=3, length=LONGEST // 2))


MODELS: Mapping[str, Callable[[], torch.nn.Module]] = {
    "GPT": gpt,
    "convolutions, attention": convolutions_and_attention,
}


def batches(lengths: Iterator[int], chance: torch.Generator) -> Iterator[Batch]:
    symbols = min(VOCABULARY, 100)
    for length in lengths:
        ids = torch.randint(0, symbols, (ROWS, length + 1), generator=chance)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def task(model: Callable[[], torch.nn.Module], kind: str, steps: int) -> fs.TrainingTask:
    torch.manual_seed(0)
    chance = torch.Generator().manual_seed(1)
    return fs.TrainingTask(
        model(),
        next_token_loss,
        partial(torch.optim.AdamW, lr=3e-4),
        list(islice(batches(KINDS[kind](chance), chance), steps)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One run, in logarithms: what its steps used, NaN where not measured, and what was predicted.

    Attributes:
        figures_N: which of ``FIGURES`` each is.
        used_TN: of each step.
        predicted_THN: for the step itself and for those ``HORIZON_STEPS`` later, all under the step's plan.
    """

    name: str
    figures_N: tuple[str, ...]
    used_TN: Array
    predicted_THN: Array


def recording(name: str, planner: Planner, steps: Sequence[tuple[PartitionPlan, StepFinished]]) -> Recording:
    devices = planner.cluster(steps[0][1].binding).devices
    used: list[Array] = []
    predicted: list[list[Array]] = []
    for number, (plan, event) in enumerate(steps):
        demand = planner.demand(plan, event.binding)
        later = [steps[min(number + ahead, len(steps) - 1)][1].binding for ahead in (0, *HORIZON_STEPS)]
        asked = [planner.demand(plan, binding) for binding in later]
        predicted.append([covariates_NK(one, devices)[:, 0] for one in asked])
        of_plan = compared(plan, event, planner) is not None  # else a step of the plan before
        used.append(log_ratios_N(event, demand if of_plan else {}, {}, devices) + predicted[-1][0])
    return Recording(
        name=name,
        figures_N=FIGURES * len(devices),
        used_TN=np.array(used),
        predicted_THN=np.array(predicted),
    )


def read_run(name: str, directory: Path) -> Recording:
    """A run that `forescale train` has recorded."""
    plan: PartitionPlan | None = None
    planner: Planner | None = None
    steps: list[tuple[PartitionPlan, StepFinished]] = []
    for record in map(decode, read_run_log(directory / "log.jsonl")):
        if isinstance(record, Header):
            planner = Planner(ProfiledCosts.from_json(record.run))
        elif isinstance(record, RunStarted):
            plan = record.plan
        elif isinstance(record, Repartitioned):
            plan = record.after
        elif isinstance(record, StepFinished) and plan is not None:
            steps.append((plan, record))
    if planner is None or len(steps) < 2 * WARM_UP:
        raise SystemExit(f"{directory} holds no run of at least {2 * WARM_UP} steps")
    return recording(name, planner, steps)


def record_runs(model: str, steps: int, folder: Path) -> Iterator[Recording]:
    for kind in KINDS:
        name = f"{model}, {kind}"
        fs.train(task(MODELS[model], kind, steps), steps=steps, devices=2, directory=folder / kind)
        yield read_run(name, folder / kind)


def record_memory(model: str, steps: int, folder: Path) -> Iterator[Recording]:
    """Runs with the memory of every step, which CPU workers do not measure in passing: it takes too long."""
    cluster = find_cluster(2)
    tasks = {kind: task(MODELS[model], kind, steps) for kind in KINDS}
    first = next(iter(tasks.values()))
    with TrainingEngine(cluster, folder) as engine:
        prepared = prepare(first, iter(first.batches), cluster, engine, None, lambda _: None)
        planner = Planner(prepared.costs)
        batch = next(iter(first.batches))
        every = [batch for one in tasks.values() for batch in one.batches]
        run = ForcedRun(engine, capture_task(first, batch)[0], every)
        plan = planner.best(prepared.describe(batch), {})
        run.start(plan)
        for number, kind in enumerate(tasks):
            finished = run.steps(steps, measure_memory=True).steps[number * steps :]
            found = recording(f"{model}, {kind}", planner, [(plan, step) for step in finished])
            # Measuring takes time itself: of these steps, seconds and shares say nothing.
            memory_N = np.array(found.figures_N) == "memory"
            yield replace(found, used_TN=np.where(memory_N, found.used_TN, np.nan))
        engine.close()


def alone_THNL(run: Recording) -> Array:
    """Forecasts from the past of each figure alone."""
    bank = ForecasterBank(len(run.figures_N), 1.0, HORIZON_STEPS, LEVELS)
    said: list[Array] = []
    for used_N in run.used_TN:
        bank.update(np.exp(used_N))
        said.append(bank.predict().swapaxes(0, 1))
    return np.array(said)


def with_batches_THNL(run: Recording) -> Array:
    """Forecasts as the training controller makes them, from what is predicted for the batches as well."""
    bank = use_forecaster(len(run.figures_N), HORIZON_STEPS, LEVELS)
    said: list[Array] = []
    for used_N, predicted_HN in zip(run.used_TN, run.predicted_THN, strict=True):
        bank.update(used_N - predicted_HN[0], predicted_HN[0][:, None])
        ratios_HNL = bank.predict(predicted_HN[1:].T[..., None]).swapaxes(0, 1)
        said.append(ratios_HNL + predicted_HN[1:, :, None])
    return np.exp(np.array(said))


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Of one figure of one device at one horizon, without and with what is known of the batches."""

    run: str
    figure: str
    horizon: int
    losses: tuple[float, float]
    covered: tuple[float, float]


def scores(run: Recording) -> Iterator[Score]:
    said = [forecasts_THNL(run) for forecasts_THNL in (alone_THNL, with_batches_THNL)]
    for horizon in SHOWN_STEPS:
        h = HORIZON_STEPS.index(horizon)
        for n, figure in enumerate(run.figures_N):
            targets_T = np.exp(run.used_TN[WARM_UP + horizon :, n])
            if figure == "deviation" or np.isnan(targets_T).all():
                continue
            quantiles = [said_THNL[WARM_UP:-horizon, h, n] for said_THNL in said]
            shares = [coverage(targets_T, quantiles_TL) for quantiles_TL in quantiles]
            without, informed = (weighted_quantile_loss(targets_T, q_TL, LEVELS) for q_TL in quantiles)
            yield Score(
                run=run.name,
                figure=figure,
                horizon=horizon,
                losses=(without, informed),
                covered=(shares[0][-1] - shares[0][0], shares[1][-1] - shares[1][0]),
            )


def summary(found: Sequence[Score]) -> tuple[str, ...]:
    """Means over runs and devices, and what is left of the loss."""
    without, informed = np.mean([one.losses for one in found], axis=0)
    covered = np.mean([one.covered for one in found], axis=0)
    return (f"{without:.4f}", f"{informed:.4f}", f"{informed / without:.2f}", *(f"{c:.1%}" for c in covered))


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as name:
        runs = list(_recordings(options, Path(name)))
    found = [score for run in runs for score in scores(run)]
    measured_on = environment(
        seed=0,
        runs=f"{len(runs)}, {sum(len(run.used_TN) for run in runs)} steps; forecast from step {WARM_UP} on",
        loss=f"weighted quantile loss, levels {', '.join(map(str, LEVELS))}; mean over runs and devices",
        asked="with / without below 1 for every figure",
    )
    header = ("loss without", "with", "with / without", "in the 90% range without", "with")
    figures = dict.fromkeys(score.figure for score in found)
    of_horizons = [
        (figure, str(horizon), *summary([s for s in found if (s.figure, s.horizon) == (figure, horizon)]))
        for figure in figures
        for horizon in SHOWN_STEPS
    ]
    title = "Forecasts of device use, without and with what is known of the batches"
    write_table(options.out, title, measured_on, ("figure", "steps ahead", *header), of_horizons)
    of_runs = [
        (figure, run, *summary([s for s in found if (s.figure, s.run) == (figure, run)]))
        for figure in figures
        for run in dict.fromkeys(score.run for score in found if score.figure == figure)
    ]
    by_run = options.out.with_stem(f"{options.out.stem}_runs")
    write_table(by_run, f"{title}, by run", measured_on, ("figure", "run", *header), of_runs)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="*", help="recorded runs; none: record some first")
    parser.add_argument("--steps", type=int, default=200, help="of each run that is recorded")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / "forecast_training.md")
    return parser.parse_args()


def _recordings(options: argparse.Namespace, folder: Path) -> Iterator[Recording]:
    if options.run:
        for directory in options.run:
            yield read_run("/".join(directory.parts[-2:]), directory)
        return
    for model in MODELS:
        yield from record_runs(model, options.steps, folder / model)
    yield from record_memory("GPT", MEMORY_STEPS, folder / "memory")


if __name__ == "__main__":
    main()
