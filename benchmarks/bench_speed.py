"""One device against the plain eager loop, and two devices against one.

The eager loop runs in a process of its own with the same microbatches, pinning and allocator settings as a
worker. Runs alternate, so that a slow minute of the machine hits every contender.

    python benchmarks/bench_speed.py [--out FILE.md]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from forced import cut_plan, forced_run
from table import environment, write_table
from workloads import gpt_task, parameters

import forescale as fs
from forescale.engine.train.crew import WORKER_ENVIRONMENT
from forescale.engine.train.task import microbatch_rows, split_rows
from forescale.profile.devices import find_cluster

SMALL = {"width": 320, "layers": 4, "rows": 16, "length": 128}  # 5.3 M parameters
LARGE = {"width": 512, "layers": 7, "rows": 32, "length": 128}  # 22 M
STEPS, WARM_UP, ROUNDS = 12, 3, 3
SMALL_MICROBATCHES = 4


def eager(core: int) -> None:
    """Plain PyTorch: the loop a user would write."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    task = gpt_task(**SMALL, count=STEPS)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=3e-4)
    seconds = []
    for batch in task.batches:
        start_s = time.perf_counter()
        parts = microbatch_rows(len(batch[0]), SMALL_MICROBATCHES)
        for ids, targets in split_rows(batch, parts):
            loss = task.loss(task.model(ids), (ids, targets)) * (len(ids) / len(batch[0]))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start_s)
    print(json.dumps(seconds[WARM_UP:]))


def eager_in_own_process(core: int) -> list[float]:
    settings = {**os.environ, **WORKER_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--eager", str(core)],
        env=settings,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


def trained(sizes: dict[str, int], devices: int, folder: str) -> fs.TrainingReport:
    cluster = find_cluster(2)
    if devices == 1:
        cluster = type(cluster)(devices=cluster.devices[:1], default_link=cluster.default_link)
    task = gpt_task(**sizes, count=STEPS)
    return fs.train(
        task, steps=STEPS, devices=cluster, adapt=False, directory=Path(folder) / f"{time.time_ns()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speed.md")
    parser.add_argument("--eager", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.eager is not None:
        eager(args.eager)
        return
    core = find_cluster(2).devices[0].cores[0]
    plain, one_small, one, two = [], [], [], []
    plans = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            plain += eager_in_own_process(core)
            one_small += _with_microbatches(SMALL_MICROBATCHES, folder)
            one += trained(LARGE, 1, folder).step_s[WARM_UP:]
            report = trained(LARGE, 2, folder)
            two += report.step_s[WARM_UP:]
            plans.append(report.plans[0])
    medians = [statistics.median(x) for x in (plain, one_small, one, two)]
    small, large = (parameters(gpt_task(**sizes, count=1).model) / 1e6 for sizes in (SMALL, LARGE))
    slower = medians[1] / medians[0] - 1
    rows = [
        (
            f"eager loop, {small:.1f} M parameters, {SMALL_MICROBATCHES} microbatches",
            f"{medians[0] * 1e3:.1f} ms a step",
            "",
        ),
        ("one device, the same", f"{medians[1] * 1e3:.1f} ms a step", ""),
        ("one device slower by", f"{slower:+.1%}", "≤ 3%"),
        (f"one device, {large:.1f} M parameters, its best plan", f"{medians[2] * 1e3:.0f} ms a step", ""),
        (
            f"two devices, its best plan ({plans[-1].microbatches} microbatches)",
            f"{medians[3] * 1e3:.0f} ms a step",
            "",
        ),
        ("speed-up", f"{medians[2] / medians[3]:.2f} ×", "≥ 1.7 ×"),
    ]
    write_table(
        args.out, "Speed on one and two devices", environment(seed=0), ("", "measured", "asked"), rows
    )


def _with_microbatches(count: int, folder: str) -> list[float]:
    cluster = find_cluster(2)
    cluster = type(cluster)(devices=cluster.devices[:1], default_link=cluster.default_link)
    with forced_run(gpt_task(**SMALL, count=STEPS), cluster, Path(folder) / f"{time.time_ns()}") as run:
        run.start(cut_plan(run.graph, cluster, (), count))
        return [step.step_s for step in run.steps(STEPS).steps[WARM_UP:]]


if __name__ == "__main__":
    main()
