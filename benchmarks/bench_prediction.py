"""Predicted step time and memory against measured, over splits nobody chose for being easy to predict.

Operators are timed once, as ``forescale train`` does; then the same workers run one split after the other.

    python benchmarks/bench_prediction.py [--out FILE.md]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from itertools import cycle
from pathlib import Path

from forced import ForcedRun, cut_plan
from table import environment, write_table
from workloads import gpt_task

from forescale.control.planner import Planner
from forescale.control.preparation import capture_task, prepare
from forescale.engine.train.engine import TrainingEngine
from forescale.plan.partition_plan import Schedule
from forescale.profile.devices import find_cluster

SIZES = {"width": 320, "layers": 6, "rows": 16, "length": 96}
SHARES = (0.25, 0.35, 0.42, 0.5, 0.58, 0.65, 0.75)
MICROBATCHES = (4, 8, 16)
SCHEDULES = (Schedule.ONE_F_ONE_B, Schedule.EAGER_1F1B)
STEPS, WARM_UP = 6, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "prediction.md")
    out = parser.parse_args().out
    cluster = find_cluster(2)
    task = gpt_task(**SIZES, count=400)
    rows, errors, memory_errors = [], [], []
    with tempfile.TemporaryDirectory() as folder, TrainingEngine(cluster, Path(folder)) as engine:
        prepared = prepare(task, iter(task.batches), cluster, engine, None, print)
        batches = list(prepared.batches)
        binding = prepared.describe(batches[0])
        run = ForcedRun(engine, capture_task(task, batches[0])[0], batches)
        planner = Planner(prepared.costs)
        count = len(run.graph.operators)
        plans = [
            replace(cut_plan(run.graph, cluster, (round(share * count),), microbatches), schedule=schedule)
            for microbatches in MICROBATCHES
            for share, schedule in zip(SHARES, cycle(SCHEDULES), strict=False)
        ]
        run.start(plans[0])
        for index, plan in enumerate(plans):
            first = index * (STEPS + 1)
            run.steps(STEPS, {first: plan} if index else None)
            measured_s = statistics.median(s.step_s for s in run.outcome.steps[first + WARM_UP :])
            predicted_s = planner.prediction(plan, binding, {}).step_s
            errors.append(predicted_s / measured_s - 1)
            run.steps(1, measure_memory=True)
            found = [stage.memory_bytes for stage in run.outcome.steps[-1].stages]
            memory = [p / m - 1 for p, m in zip(prepared.costs.peak_bytes(plan, binding), found, strict=True)]
            memory_errors += memory
            cut = len(plan.stages[0].operators)
            rows.append(
                (
                    f"{cut} of {count}",
                    plan.microbatches,
                    plan.schedule,
                    f"{predicted_s * 1e3:.0f}",
                    f"{measured_s * 1e3:.0f}",
                    f"{errors[-1]:+.1%}",
                    " / ".join(f"{size / 1e6:.1f}" for size in found),
                    " / ".join(f"{error:+.1%}" for error in memory),
                )
            )
        engine.close()
    for what, reduce in (("median", statistics.median), ("worst", max)):
        time_error, memory_error = reduce(map(abs, errors)), reduce(map(abs, memory_errors))
        rows.append(
            (f"{what} of {len(plans)} splits", "", "", "", "", f"{time_error:.1%}", "", f"{memory_error:.1%}")
        )
    rows.append(("asked", "", "", "", "", "median ≤ 8%", "", "≤ 3%"))
    header = (
        "operators on the first device",
        "microbatches",
        "schedule",
        "predicted, ms",
        "measured, ms",
        "error",
        "peak memory measured, MB a stage",
        "error of prediction",
    )
    write_table(out, "Predicted step time", environment(seed=0), header, rows)


if __name__ == "__main__":
    main()
