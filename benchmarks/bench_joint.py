"""Joint plans of Piper's graphs: time per sample and the time to find it, beside equal stages.

    python benchmarks/bench_joint.py DATA_DIR [--out FILE.md]

``DATA_DIR`` holds graphs in the JSON format of Tarnawski et al., NeurIPS 2021 (github.com/msr-fiddle/piper,
inputs). Their experiments set 25 GiB/s and 1 GB = 2³⁰ bytes, whatever the files say; so does this.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

from table import environment, write_table

from forescale.core.errors import InfeasiblePlan, InvalidInput
from forescale.plan.joint.cost import cost
from forescale.plan.joint.piper import read_piper
from forescale.plan.joint.problem import JointPlan, JointProblem, JointStage
from forescale.plan.joint.search import JointAnswer, plan_joint
from forescale.plan.placement.problem import order_of

SEEDS = (0, 1, 2)
GIB = 2**30
BANDWIDTH_BYTES_PER_S = 25.0 * GIB
LIMITS = ((8, 4.0), (8, 8.0), (16, 2.0), (16, 4.0), (16, 8.0), (32, 1.5), (32, 2.0), (32, 4.0), (64, 2.0))
# Time per sample in Piper's own experiment, by graph, devices and memory.
PUBLISHED = {("piper_resnet", 16, 4.0): 35.333}


def equal_stages(problem: JointProblem) -> float | None:
    """The best with as many nodes and replicas in each stage, recomputing everywhere or nowhere."""
    ends = [(edge.source, edge.target) for edge in problem.edges]
    order = order_of(len(problem.nodes), ends, problem.nodes)
    found: list[float] = []
    for stages, replicas, option in product(range(1, problem.devices + 1), problem.replicas, (0, 1)):
        if stages * replicas > problem.most_replicas:
            continue
        cuts = [len(order) * number // stages for number in range(stages + 1)]
        groups = [tuple(order[a:b]) for a, b in pairwise(cuts)]
        plan = JointPlan(
            stages=tuple(
                JointStage(nodes=group, replicas=replicas, tensor_degree=1, options=(option,) * len(group))
                for group in groups
            )
        )
        figures = cost(problem, plan)
        if max(figures.memory_bytes) <= problem.memory_bytes:
            found.append(figures.objective)
    return min(found, default=None)


def row(name: str, problem: JointProblem, memory_gib: float) -> tuple[object, ...]:
    found: list[JointAnswer] = []
    seconds: list[float] = []
    start = (name, problem.devices, f"{memory_gib} GB")
    for seed in SEEDS:
        started_s = time.perf_counter()
        try:
            found.append(plan_joint(problem, seed=seed))
        except InfeasiblePlan as error:
            missing = f"{error.short_bytes / GIB:.2f} GB missing"
            return *start, "does not fit", missing, "", "", "", f"{time.perf_counter() - started_s:.2f} s"
        seconds.append(time.perf_counter() - started_s)
    times = [answer.objective for answer in found]
    equal = equal_stages(problem)
    published = PUBLISHED.get((name, problem.devices, memory_gib))
    return (
        *start,
        "does not fit" if equal is None else f"{equal:.3f}",
        f"{min(times):.3f} … {max(times):.3f}",
        f"{published:.3f}" if published else "",
        f"{found[0].lower_bound:.3f}",
        len(found[0].plan.stages),
        f"{max(seconds):.2f} s",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "joint.md")
    args = parser.parse_args()
    rows: list[tuple[object, ...]] = []
    for path in sorted(args.data.glob("*.json")):
        try:
            problem = read_piper(path.read_text(encoding="utf-8"))
        except InvalidInput as error:
            print(f"{path.name} is left out: {error}")
            continue
        for devices, memory_gib in LIMITS:
            limited = replace(
                problem,
                devices=devices,
                memory_bytes=memory_gib * GIB,
                bandwidth_bytes_per_time=BANDWIDTH_BYTES_PER_S,
            )
            rows.append(row(path.stem, limited, memory_gib))
    header = (
        "graph",
        "devices",
        "memory",
        "equal stages",
        "time per sample, 3 seeds",
        "published",
        "bound",
        "stages",
        "time",
    )
    write_table(args.out, "Joint plans of published graphs", environment(seed=SEEDS), header, rows)


if __name__ == "__main__":
    main()
