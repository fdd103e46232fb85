"""Placement of one transformer, tiled finer and finer: time, memory and distance from the lower bound.

    python benchmarks/bench_placement_scale.py [--out FILE.md]

The graph is made, not captured: 96 layers of width 12,288 for 2,048 tokens (Brown et al., 2020, §2.1),
forward, in half precision. Every operator is cut into tiles of tokens, heads and hidden columns. Each size
runs in a process of its own; its time is that of building the problem, which checks it, and of planning.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from table import environment, write_table

from forescale.plan.placement.place import place
from forescale.plan.placement.problem import DeviceKind, Nets, PlacementProblem

SEED = 0
LAYERS, WIDTH, TOKENS, BYTES = 96, 12_288, 2_048, 2
FLOPS_PER_S, MEMORY_BYTES_PER_S, LINK_BYTES_PER_S = 300e12, 2e12, 200e9
NOISE = 0.15  # of the logarithm of every tile's time
DEVICES, MEMORY_SLACK = 64, 1.2
# Tiles of tokens, heads, and hidden columns of the feed-forward network.
TILES = {"1k": (1, 1, 1), "10k": (2, 4, 10), "100k": (8, 16, 16), "1M": (16, 48, 136)}


@dataclass
class Layer:
    """Tiles of one layer; node -1 - r is the r-th token tile of the layer before."""

    flops: list[float] = field(default_factory=list)
    out_bytes: list[float] = field(default_factory=list)
    weight_bytes: list[float] = field(default_factory=list)
    sources: list[list[int]] = field(default_factory=list)

    def add(self, sources: list[int], *, flops: float, out: float, weights: float = 0.0) -> int:
        self.flops.append(flops)
        self.out_bytes.append(out * BYTES)
        self.weight_bytes.append(weights * BYTES)
        self.sources.append(sources)
        return len(self.flops) - 1


def layer(token_tiles: int, head_tiles: int, hidden_tiles: int) -> Layer:
    """Attention, then the feed-forward network, both with a residual; the last nodes are the output."""
    tiles = Layer()
    rows, columns, hidden = TOKENS / token_tiles, WIDTH / head_tiles, 4 * WIDTH / hidden_tiles
    row = rows * WIDTH
    norm = [tiles.add([-1 - r], flops=0, out=row) for r in range(token_tiles)]
    summed: list[list[int]] = [[] for _ in range(token_tiles)]  # the last partial sum, to which the next adds
    for _ in range(head_tiles):
        weights = WIDTH * columns / token_tiles
        qkv = [
            tiles.add([norm[r]], flops=6 * row * columns, out=3 * rows * columns, weights=3 * weights)
            for r in range(token_tiles)
        ]
        for r in range(token_tiles):
            seen, pairs = qkv[: r + 1], rows * rows * (r + 1)
            scores = tiles.add(seen, flops=2 * pairs * columns, out=pairs)
            softmax = tiles.add([scores], flops=0, out=pairs)
            context = tiles.add([softmax, *seen], flops=2 * pairs * columns, out=rows * columns)
            summed[r] = [tiles.add([context, *summed[r]], flops=2 * row * columns, out=row, weights=weights)]
    outputs: list[list[int]] = []
    for r in range(token_tiles):
        attended = tiles.add([*summed[r], -1 - r], flops=0, out=row)
        normed = tiles.add([attended], flops=0, out=row)
        total = [attended]
        for _ in range(hidden_tiles):
            weights = WIDTH * hidden / token_tiles
            up = tiles.add([normed], flops=2 * row * hidden, out=rows * hidden, weights=weights)
            active = tiles.add([up], flops=0, out=rows * hidden)
            total = [tiles.add([active, *total], flops=2 * row * hidden, out=row, weights=weights)]
        outputs.append(total)
    for total in outputs:
        tiles.add(total, flops=0, out=row)
    return tiles


def transformer(token_tiles: int, head_tiles: int, hidden_tiles: int) -> PlacementProblem:
    """Times in milliseconds. The first nodes are the embedded tokens, of no work."""
    one = layer(token_tiles, head_tiles, hidden_tiles)
    size = len(one.flops)
    source_E = np.array([s if s >= 0 else -token_tiles - 1 - s for row in one.sources for s in row])
    reader_E = np.array([reader for reader, row in enumerate(one.sources) for _ in row])
    shift_L = token_tiles + size * np.arange(LAYERS)[:, None]
    source_E, reader_E = (shift_L + source_E).ravel(), (shift_L + reader_E).ravel()
    along = np.argsort(source_E, kind="stable")
    source, reader = source_E[along], reader_E[along]
    producers, first_H, readers_H = np.unique(source, return_index=True, return_counts=True)
    node_P = np.insert(reader, first_H, producers)
    tokens = np.full(token_tiles, TOKENS / token_tiles * WIDTH * BYTES)
    out_bytes_N = np.concatenate([tokens, np.tile(one.out_bytes, LAYERS)])
    weight_bytes_N = np.concatenate([0 * tokens, np.tile(one.weight_bytes, LAYERS)])
    flops_N = np.concatenate([0 * tokens, np.tile(one.flops, LAYERS)])
    seconds_N = flops_N / FLOPS_PER_S + (weight_bytes_N + 2 * out_bytes_N) / MEMORY_BYTES_PER_S
    seconds_N *= np.random.default_rng(SEED).lognormal(0.0, NOISE, len(seconds_N))
    memory_bytes_N = weight_bytes_N + out_bytes_N
    return PlacementProblem(
        nodes=tuple(map(str, range(len(seconds_N)))),
        work_KN=1000 * seconds_N[None],
        memory_bytes_N=memory_bytes_N,
        nets=Nets(
            cost_H=1000 * out_bytes_N[producers] / LINK_BYTES_PER_S, size_H=readers_H + 1, node_P=node_P
        ),
        together=(),
        backward_N=np.zeros(len(seconds_N), dtype=bool),
        kinds=(
            DeviceKind(
                name="acc",
                count=DEVICES,
                memory_bytes=MEMORY_SLACK * float(memory_bytes_N.sum()) / DEVICES,
                pays_transfers=True,
            ),
        ),
    )


def measure(tiles: tuple[int, int, int], *, contiguous: bool) -> Mapping[str, float]:
    """In this process alone."""
    started_s = time.perf_counter()
    problem = transformer(*tiles)
    built_s = time.perf_counter()
    placement = place(problem, contiguous=contiguous, seed=SEED)
    return {
        "nodes": len(problem.nodes),
        "pins": len(problem.pins.node_P),
        "built_s": built_s - started_s,
        "planned_s": time.perf_counter() - built_s,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "ratio": placement.objective / placement.lower_bound,
        "load": placement.objective,
        "transfers": float((placement.load_D - placement.work_D).max() / placement.objective),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--free", action="store_true", help="with --one: devices may hold any nodes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "placement_scale.md")
    parser.add_argument("--one", choices=TILES, help="measure one size here and print it as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(TILES[args.one], contiguous=not args.free)))
        return
    rows: list[tuple[object, ...]] = []
    for contiguous in (True, False):
        first: float | None = None
        for size in TILES:
            command = [sys.executable, __file__, "--one", size, *([] if contiguous else ["--free"])]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout)
            seconds = found["built_s"] + found["planned_s"]
            per_n_log_n = seconds / (found["nodes"] * math.log2(found["nodes"]))
            first = first or per_n_log_n
            rows.append(
                (
                    f"{found['nodes']:,}",
                    f"{found['pins']:,}",
                    "contiguous" if contiguous else "free",
                    f"{found['built_s']:.2f} s",
                    f"{found['planned_s']:.2f} s",
                    f"{per_n_log_n / first:.3f}",
                    f"{found['peak_bytes'] / 2**30:.2f} GiB",
                    f"{found['load']:.3f} ms",
                    f"{found['ratio']:.4f}",
                    f"{found['transfers']:.1%}",
                )
            )
    header = (
        "nodes", "pins", "placement", "built", "planned", "time / n log n, first = 1", "peak memory",
        "longest load", "of the bound", "most transfers",
    )  # fmt: skip
    title = f"Placement of a tiled transformer on {DEVICES} devices"
    write_table(args.out, title, environment(seed=SEED), header, rows)


if __name__ == "__main__":
    main()
