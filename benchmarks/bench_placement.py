"""Placements of published graphs: the longest load and the time to find it, beside an even split.

    python benchmarks/bench_placement.py DATA_DIR [--out FILE.md]

``DATA_DIR`` holds graphs in the JSON format of Tarnawski et al., NeurIPS 2020
(github.com/msr-fiddle/dnn-partitioning, throughput-inputs).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from table import environment, write_table

from forescale.core.errors import InvalidInput
from forescale.plan.placement.device_placement import read_device_placement
from forescale.plan.placement.loads import loads
from forescale.plan.placement.place import Placement, place
from forescale.plan.placement.problem import PlacementProblem, order_of

SEEDS = (0, 1, 2)
# Longest loads: the exact contiguous optimum, and the best known for any placement.
ASKED = {
    "layer_bert24_inference": (17.790, 17.715),
    "layer_gnmt_inference": (32.911, 31.783),
    "layer_resnet50_training": (78.632, 77.390),
    "op_bert3_inference": (27.919, 21.908),
    "op_bert3_training": (65.303, 54.208),
    "op_resnet50_training": (255.194, 255.194),
}


def even_split(problem: PlacementProblem) -> float:
    """Longest load when a topological order is cut into as much work for each accelerator."""
    order = order_of(len(problem.nodes), problem.edges, problem.nodes)
    accelerators = problem.kinds[0].count
    done = np.cumsum(problem.work_KN[0, order])
    device = np.empty(len(order), dtype=np.int64)
    device[order] = np.minimum((done - 1e-12) / done[-1] * accelerators, accelerators - 1).astype(np.int64)
    return float(loads(problem, device).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "placement.md")
    args = parser.parse_args()
    rows: list[tuple[object, ...]] = []
    for path in sorted(args.data.glob("*.json")):
        try:
            problem = read_device_placement(path.read_text(encoding="utf-8"))
        except InvalidInput as error:
            print(f"{path.name} is left out: {error}")
            continue
        for kind, asked in zip(("contiguous", "free"), ASKED.get(path.stem, ("", "")), strict=True):
            found: list[Placement] = []
            seconds: list[float] = []
            for seed in SEEDS:
                started_s = time.perf_counter()
                found.append(place(problem, contiguous=kind == "contiguous", seed=seed))
                seconds.append(time.perf_counter() - started_s)
            longest = [placement.objective for placement in found]
            rows.append(
                (
                    path.stem,
                    len(problem.nodes),
                    kind,
                    f"{even_split(problem):.3f}",
                    f"{min(longest):.3f} … {max(longest):.3f}",
                    asked and f"{asked:.3f}",
                    f"{found[0].lower_bound:.3f}",
                    f"{max(seconds):.2f} s",
                )
            )
    header = ("graph", "nodes", "placement", "even split", "longest load, 3 seeds", "asked", "bound", "time")
    write_table(args.out, "Placement of published graphs", environment(seed=SEEDS), header, rows)


if __name__ == "__main__":
    main()
