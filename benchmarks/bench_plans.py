"""The plan chosen for a model against alternatives that are run for real, with equal and unequal devices.

Operators are timed once, as ``forescale train`` does; then the second device is slowed, and its speed is
what it is seen to be in a few steps of the plan made before, as in training. The same workers run all plans
in turn, several times over, so that what else the host does strikes all of them alike. The chosen one and
those that were fastest are then measured again, for longer: the fastest of many was lucky, too.

    python benchmarks/bench_plans.py [--out FILE.md]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from forced import ForcedRun, cut_plan
from slowdown import slowed, worker_pid
from table import environment, write_table
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification
from workloads import gpt_task

import forescale as fs
from forescale.control.planner import Planner, same_split
from forescale.control.preparation import capture_task, prepare
from forescale.core.cluster import Cluster
from forescale.engine.train.engine import TrainingEngine
from forescale.graph.model import ModelGraph
from forescale.plan.partition_plan import PartitionPlan, Schedule, Stage, replica_groups
from forescale.plan.replicas import changed_buffer
from forescale.profile.devices import find_cluster

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from models import UNet

SPEEDS = (1.0, 0.4)
SHARES = {
    1.0: (0.3, 0.38, 0.44, 0.5, 0.56, 0.62, 0.7, 0.78),
    0.4: (0.5, 0.58, 0.64, 0.7, 0.76, 0.82, 0.88, 0.94),
}
MICROBATCHES = (4, 8)
SEEN = 8
ROUNDS, STEPS = 3, 4
FINALISTS, FINAL_ROUNDS, FINAL_STEPS = 4, 6, 6
WARM_UP = 2


def resnet18() -> torch.nn.Module:
    """He et al., *Deep Residual Learning for Image Recognition*, CVPR 2016, with random weights."""
    return ResNetForImageClassification(
        ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    )


def images_task(model: torch.nn.Module, rows: int, size: int, *, per_pixel: bool) -> fs.TrainingTask:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(rows, 3, size, size, generator=generator)
    shape = (rows, size, size) if per_pixel else (rows,)
    labels = torch.randint(0, 2, shape, generator=generator)

    def loss(output: Any, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(getattr(output, "logits", output), batch[1])

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-3)

    return fs.TrainingTask(model, loss, optimizer, [(pictures, labels)] * 8)


def tasks() -> dict[str, Callable[[], fs.TrainingTask]]:
    return {
        "GPT": lambda: gpt_task(width=256, layers=6, rows=16, length=64, count=8),
        "ResNet-18": lambda: images_task(resnet18(), 16, 64, per_pixel=False),
        "U-Net": lambda: images_task(UNet(width=32), 16, 64, per_pixel=True),
    }


def wording(plan: PartitionPlan) -> str:
    """Operators of every stage (× share of a replica, / part of a shard), microbatches, schedule."""
    replicated = len(replica_groups(plan.stages)) < len(plan.stages)

    def spell(stage: Stage) -> str:
        if stage.shard is not None:
            parts = stage.shard.weights
            return f"{len(stage.operators)} / {parts[stage.shard.index]} of {sum(parts)}"
        return f"{len(stage.operators)}" + (f" × {stage.share}" if replicated else "")

    return f"{' + '.join(map(spell, plan.stages))}, {plan.microbatches} microbatches, {plan.schedule}"


def measured(run: ForcedRun, plans: list[PartitionPlan], rounds: int, steps: int) -> list[float]:
    """Median step time of each plan, over rounds through all of them."""
    times: list[list[float]] = [[] for _ in plans]
    step = len(run.outcome.steps)
    for _ in range(rounds):
        for times_s, plan in zip(times, plans, strict=True):
            run.steps(steps, {step: plan})
            times_s += [done.step_s for done in run.outcome.steps[step + WARM_UP :]]
            step += steps
    return [statistics.median(times_s) for times_s in times]


def same_run(a: PartitionPlan, b: PartitionPlan) -> bool:
    """Whether two plans do the same: schedules differ in pipelines alone."""
    pipeline = len(replica_groups(a.stages)) > 1
    return same_split(a, b if pipeline else replace(b, schedule=a.schedule))


def names(plan: PartitionPlan) -> list[str]:
    """The devices of a plan of one stage each."""
    return [stage.device for stage in plan.stages]


def observed_s(run: ForcedRun, device: str) -> float:
    """Median over the last steps of the seconds in which a device computed."""
    return statistics.median(
        sum(report.forward_s + report.backward_s for report in done.stages if report.device == device)
        for done in run.outcome.steps[-SEEN:]
    )


def alternatives(graph: ModelGraph, cluster: Cluster, speed: float) -> list[PartitionPlan]:
    """Two stages cut at many places, one device, and where the model allows it, two replicas."""
    count = len(graph.operators)
    plans = [
        replace(cut_plan(graph, cluster, cuts, microbatches), schedule=Schedule.EAGER_1F1B)
        for microbatches in MICROBATCHES
        for cuts in ((), *((round(share * count),) for share in SHARES[speed]))
    ]
    if changed_buffer(graph, range(count)) is None:
        one = plans[0].stages[0]
        shares = {1.0: ((1, 1), (2, 2)), 0.4: ((3, 1), (5, 2))}[speed]
        plans += [
            replace(
                plans[0],
                stages=tuple(
                    replace(one, device=device.name, share=share)
                    for device, share in zip(cluster.devices, pair, strict=True)
                ),
                microbatches=sum(pair),
            )
            for pair in shares
        ]
    return plans


def compare(task: fs.TrainingTask, speed: float, folder: Path) -> tuple[Any, ...]:
    cluster = find_cluster(2)
    slow = cluster.devices[1]
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(TrainingEngine(cluster, folder))
        prepared = prepare(task, iter(task.batches), cluster, engine, None, lambda _: None)
        batch = next(iter(prepared.batches))
        binding = prepared.describe(batch)
        batches = (batch for _ in iter(int, 1))
        run = ForcedRun(engine, capture_task(task, batch)[0], batches)
        planner, speeds = Planner(prepared.costs), dict[str, float]()
        before = planner.best(binding, speeds)
        run.start(before)
        run.steps(2)
        if speed < 1.0:
            stack.enter_context(slowed(worker_pid(slow.name), slow.cores[0], speed))
            run.steps(SEEN)
            profiled_s = dict(zip(names(before), planner.compute_s(before, binding, {}), strict=True))
            speeds = {slow.name: profiled_s[slow.name] / observed_s(run, slow.name)}
        chosen = planner.best(binding, speeds)
        others = alternatives(run.graph, cluster, speed)
        plans = [chosen, *(plan for plan in others if not same_run(plan, chosen))]
        times_s = measured(run, plans, ROUNDS, STEPS)
        fastest = sorted(range(1, len(plans)), key=times_s.__getitem__)[:FINALISTS]
        final = [0, *fastest]
        again_s = measured(run, [plans[i] for i in final], FINAL_ROUNDS, FINAL_STEPS)
        for index, time_s in zip(final, again_s, strict=True):
            times_s[index] = time_s
        engine.close()
    predicted_s = [planner.prediction(plan, binding, speeds).step_s for plan in plans]
    errors = [abs(p / t - 1) for p, t in zip(predicted_s, times_s, strict=True)]
    best = min(final, key=times_s.__getitem__)
    return (
        f"1 : {speed:g}" + (f" (seen {speeds[slow.name]:.2f})" if speeds else ""),
        wording(chosen),
        f"{predicted_s[0] * 1e3:.0f}",
        f"{times_s[0] * 1e3:.0f}",
        f"{predicted_s[0] / times_s[0] - 1:+.1%}",
        f"{statistics.median(errors):.1%}",
        f"{times_s[best] * 1e3:.0f}: {wording(plans[best])}",
        len(plans) - 1,
        f"{times_s[0] / times_s[best]:.3f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plans.md")
    out = parser.parse_args().out
    rows: list[tuple[Any, ...]] = []
    with tempfile.TemporaryDirectory() as name:
        for (model, make), speed in product(tasks().items(), SPEEDS):
            rows.append((model, *compare(make(), speed, Path(name) / f"{model}-{speed}")))
            print(*rows[-1], flush=True)
    rows.append(("asked", "", "", "", "", "≤ 8%", "", "", "≥ 15", "≤ 1.03"))
    header = (
        "model",
        "speeds",
        "chosen plan",
        "predicted, ms",
        "measured, ms",
        "error",
        "median error of all plans",
        "best measured, ms",
        "alternatives",
        "chosen / best",
    )
    write_table(out, "Chosen plans against measured alternatives", environment(seed=0), header, rows)


if __name__ == "__main__":
    main()
