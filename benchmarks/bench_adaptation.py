"""A device that slows down to 40%, steady steps with noise, and what the adaptation machinery costs.

The adaptive run is compared with the best static split, found by sweeping the cuts on the slowed device in
the same process.

    python benchmarks/bench_adaptation.py [--out FILE.md]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from forced import cut_plan, forced_run
from slowdown import slowed, worker_pid
from table import environment, write_table
from workloads import gpt_task, parameters

import forescale as fs
from forescale.engine.messages import Event, StepFinished
from forescale.plan.partition_plan import PartitionPlan
from forescale.profile.devices import find_cluster

SIZES = {"width": 320, "layers": 6, "rows": 16, "length": 96}
SPEED, SLOW_FROM, AFTER, MEASURED = 0.4, 15, 10, 25
SWEEP_STEPS, SWEEP_WARM_UP = 6, 2
STEADY_STEPS = 200
NOISE = """
import os, random, time
os.sched_setaffinity(0, {%d})
random.seed(0)
while os.getppid() == %d:
    time.sleep(random.expovariate(2.0))
    end = time.perf_counter() + random.choice([0.005, 0.01, 0.02, 0.1])
    while time.perf_counter() < end:
        pass
"""


def adaptive_run(folder: Path) -> fs.TrainingReport:
    """Trains while the second device slows down before step ``SLOW_FROM``."""
    steps = SLOW_FROM + AFTER + MEASURED
    with contextlib.ExitStack() as stack:

        def slow_down(event: Event) -> None:
            if isinstance(event, StepFinished) and event.step == SLOW_FROM - 1:
                device = find_cluster(2).devices[1]
                print("slowed:", stack.enter_context(slowed(worker_pid(device.name), device.cores[0], SPEED)))

        task = gpt_task(**SIZES, count=steps + 8)
        return fs.train(task, steps=steps, devices=2, directory=folder, on_event=slow_down)


def best_static(folder: Path, like: PartitionPlan) -> tuple[float, int, list[tuple[int, float]]]:
    """Median step time of the best cut with the second device slowed, the cut, and all that were tried.

    Args:
        like: its microbatches and schedule are those of every cut.
    """
    cluster = find_cluster(2)
    with forced_run(gpt_task(**SIZES, count=200), cluster, folder) as run:
        count = len(run.graph.operators)

        def cut_at(cut: int) -> PartitionPlan:
            return replace(cut_plan(run.graph, cluster, (cut,), like.microbatches), schedule=like.schedule)

        cuts = [round(count * share) for share in (0.5, 0.56, 0.6, 0.64, 0.68, 0.72, 0.76, 0.8, 0.84, 0.9)]
        run.start(cut_at(cuts[0]))
        run.steps(2)
        device = cluster.devices[1]
        tried = []
        with slowed(worker_pid(device.name), device.cores[0], SPEED):
            for index, cut in enumerate(cuts):
                first = 2 + index * SWEEP_STEPS
                run.steps(SWEEP_STEPS, {first: cut_at(cut)})
                seconds = [s.step_s for s in run.outcome.steps[first + SWEEP_WARM_UP :]]
                tried.append((cut, statistics.median(seconds)))
    cut, seconds = min(tried, key=lambda entry: entry[1])
    return seconds, cut, tried


def steady_run(folder: Path) -> fs.TrainingReport:
    """Many steps with bursts of another process on the first device's core."""
    core = find_cluster(2).devices[0].cores[0]
    noise = subprocess.Popen([sys.executable, "-c", NOISE % (core, os.getpid())])
    try:
        return fs.train(
            gpt_task(**SIZES, count=STEADY_STEPS), steps=STEADY_STEPS, devices=2, directory=folder
        )
    finally:
        noise.kill()
        noise.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "adaptation.md")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adaptive = adaptive_run(folder / "adaptive")
        static_s, cut, tried = best_static(folder / "static", adaptive.plans[-1])
        steady = steady_run(folder / "steady")
    adaptive_s = statistics.median(adaptive.step_s[SLOW_FROM + AFTER :])
    moved = [r.step for r in adaptive.repartitions]
    overhead = steady.overhead_s / sum(steady.step_s)
    rows = [
        ("model", f"{parameters(gpt_task(**SIZES, count=1).model) / 1e6:.1f} M parameters", ""),
        ("step before the slow-down", f"{statistics.median(adaptive.step_s[3:SLOW_FROM]) * 1e3:.0f} ms", ""),
        ("repartitioned before step", f"{moved} (slowed before step {SLOW_FROM})", ""),
        (f"step from {AFTER} steps after it", f"{adaptive_s * 1e3:.0f} ms", ""),
        (f"best of {len(tried)} static cuts, slowed (before operator {cut})", f"{static_s * 1e3:.0f} ms", ""),
        ("throughput against the best static split", f"{static_s / adaptive_s:.3f}", "≥ 0.95"),
        (f"repartitions in {STEADY_STEPS} steady steps with noise", len(steady.repartitions), "0"),
        ("adaptation machinery, share of step time", f"{overhead:.2%}", "≤ 1%"),
    ]
    write_table(out, "Adaptation", environment(seed=0), ("", "measured", "asked"), rows)
    print("swept:", ", ".join(f"{c}: {s * 1e3:.0f} ms" for c, s in tried))
    for repartition in adaptive.repartitions:
        print(f"step {repartition.step}: {repartition.reason}")


if __name__ == "__main__":
    main()
