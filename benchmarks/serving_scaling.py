"""Scaling ahead against scaling after, on recorded requests: who is late, and what it takes.

Replays a recorded trace, faster than it was, against a model whose seconds are measured here (on an idle
machine, or else given by --row-ms), on replicas of virtual time (`serving_replay.py`). Both contenders are
the server's own step and differ in `ScalingRules.level` alone: None is the reactive rule. Run it with the
folder of the Azure LLM inference traces of 2023
(https://github.com/Azure/AzurePublicDataset):

    python benchmarks/serving_scaling.py traces/

With --live the code trace goes to a real server, with one rule after the other; see `serving_live.py`:

    python benchmarks/serving_scaling.py traces/ --live [--minutes 2] [--row-ms 20]

On a machine with fewer cores than the replicas need, --row-ms says what a row takes, by waiting.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch
from serving_live import RULES as LIVE_RULES
from serving_live import LiveOutcome, live
from serving_replay import Machine, Outcome, replay
from table import environment, write_table
from torch import nn

from forescale.control.scale import ScalingRules
from serving_processes import Processes

RESULTS = Path(__file__).parent / "results"
FASTER = 10.0
LATENCY_S = 0.5
WIDTH, LAYERS = 256, 8
TOKENS = (64, 128, 256)
DEVICES = max(2, os.cpu_count() or 1)  # of the live server
RULES = {"reactive": ScalingRules(level=None), "ahead": ScalingRules()}


def arrivals_s(path: Path) -> list[float]:
    """When requests came, from the first one on, with time run faster."""
    with path.open(newline="") as file:
        # Seven digits of a second are one more than Python reads.
        times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in csv.DictReader(file)]
    first = min(times)
    return sorted((at - first).total_seconds() / FASTER for at in times)


def measured(tokens: int) -> Machine:
    """Seconds of a transformer of 25 MB on one core: a straight line through two sizes of batch."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).eval()
    one_s, eight_s = (_seconds(model, torch.randn(rows, tokens, WIDTH)) for rows in (1, 8))
    row_s = (eight_s - one_s) / 7
    return Machine(batch_s=max(one_s - row_s, 0.0), row_s=row_s)


def _seconds(model: nn.Module, inputs: torch.Tensor) -> float:
    taken_s: list[float] = []
    with torch.inference_mode():
        for _ in range(12):
            begin_s = time.perf_counter()
            model(inputs)
            taken_s.append(time.perf_counter() - begin_s)
    return statistics.median(taken_s[2:])


def compared(
    trace: str, times_s: Sequence[float], machine: Machine, what: str, latency_s: float
) -> list[object]:
    """A row of the table."""
    outcomes = {name: replay(times_s, rules, machine, latency_s=latency_s) for name, rules in RULES.items()}
    after, ahead = outcomes["reactive"], outcomes["ahead"]
    return [
        trace,
        what,
        _late(after),
        _late(ahead),
        f"{ahead.violations / max(after.violations, 1):.2f}",
        f"{after.replica_s:.0f}",
        f"{ahead.replica_s:.0f}",
        f"{ahead.replica_s / after.replica_s:.3f}",
        f"{after.changes} / {ahead.changes}",
    ]


def _late(outcome: Outcome) -> str:
    return f"{outcome.violations} ({outcome.violations / outcome.requests:.1%})"


def compare_live(times_s: Sequence[float], row_ms: float | None, minutes: float | None) -> None:
    """Print and keep what came of both rules, one after the other."""
    asked_s = [at_s for at_s in times_s if minutes is None or at_s < 60.0 * minutes]
    most = DEVICES * ScalingRules().places_per_device
    found: dict[str, LiveOutcome] = {}
    load_before = os.getloadavg()[0]
    for rule in LIVE_RULES:
        with tempfile.TemporaryDirectory() as folder, Processes(Path(folder)) as processes:
            found[rule] = live(
                processes,
                rule,
                asked_s,
                row_s=row_ms and row_ms / 1e3,
                latency_s=LATENCY_S,
                devices=DEVICES,
                most=most,
            )
        print(rule, found[rule], flush=True)
    shown = {
        "requests": "{:d}",
        "late": "{:d}",
        "refused": "{:d}",
        "failed": "{:d}",
        "replica_s": "{:.0f}",
        "process_s": "{:.0f}",
        "most": "{:d}",
        "lag_s": "{:.4f}",
    }
    rows: list[list[object]] = []
    for name, form in shown.items():
        after, ahead = (getattr(found[rule], name) for rule in ("reactive", "ahead"))
        rows.append([name, form.format(after), form.format(ahead), f"{ahead / after:.3f}" if after else ""])
    write_table(
        RESULTS / "serving_scaling_live.md",
        "Scaling ahead against scaling after, live",
        environment(
            replay=f"code trace as recorded, {FASTER:g} times faster, its first {asked_s[-1]:.0f} s",
            model=f"{row_ms:g} ms a row, by waiting" if row_ms else "transformer of 25 MB",
            replicas=f"1 to {most} on {DEVICES} devices, answers within {LATENCY_S * 1e3:g} ms",
            process_s="seconds of all processes for replicas, spares included",
            lag_s="how much later than recorded 99% of the requests were sent",
            load=f"average of the machine before: {load_before:.2f}",
        ),
        ["", "reactive", "ahead", "ratio"],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "traces", type=Path, help="folder of azure_llm_2023_code.csv and azure_llm_2023_conv.csv"
    )
    parser.add_argument(
        "--row-ms",
        type=float,
        nargs="+",
        default=(),
        help="take this as the model's time per row instead of measuring",
    )
    parser.add_argument("--live", action="store_true", help="on a real server instead of in virtual time")
    parser.add_argument("--minutes", type=float, help="of the live replay; default: all of it")
    options = parser.parse_args()
    if options.live:
        times_s = arrivals_s(options.traces / "azure_llm_2023_code.csv")
        compare_live(times_s, next(iter(options.row_ms), None), options.minutes)
        return
    traces = {name: arrivals_s(options.traces / f"azure_llm_2023_{name}.csv") for name in ("code", "conv")}
    machines = {f"{row_ms:g} ms a row": Machine(batch_s=0.0, row_s=row_ms / 1e3) for row_ms in options.row_ms}
    if not machines:
        for tokens in TOKENS:
            machine = measured(tokens)
            machines[f"{tokens} tokens, {machine.row_s * 1e3:.1f} ms a row"] = machine
    rows = [
        compared(trace, times_s, machine, f"{what}, {latency_s * 1e3:g} ms", latency_s)
        for trace, times_s in traces.items()
        for what, machine in machines.items()
        for latency_s in (LATENCY_S, 0.25)
    ]
    write_table(
        RESULTS / "serving_scaling.md",
        "Scaling ahead against scaling after, on recorded requests",
        environment(
            replay=f"arrivals as recorded, {FASTER:g} times faster; 1 to 16 replicas in virtual time, "
            "one warm spare, 0.3 s to load from a spare, 0.1 s to start a process, one at a time",
            late="requests answered after the target",
        ),
        [
            "trace",
            "model and target",
            "late: reactive",
            "late: ahead",
            "ratio",
            "replica-s: reactive",
            "replica-s: ahead",
            "ratio",
            "changes",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
