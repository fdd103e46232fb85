"""Speed and memory of a bank of forecasters, measured in a process of its own.

    python benchmarks/forecast_bank.py SERIES SEASON_STEPS BUDGET_S

Prints one line of JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import numpy as np

from forescale.forecast.bank import ForecasterBank

ROUNDS = 70  # until every horizon has forecasts that came due
LAST = 5  # rounds whose mean counts


def main() -> None:
    series, season_steps, budget_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    rng = np.random.default_rng(0)
    bank = ForecasterBank(series, 60.0, season_steps=season_steps)
    begun_s = time.perf_counter()
    taken_s: list[float] = []
    while len(taken_s) < ROUNDS and time.perf_counter() - begun_s < budget_s:
        values_N = rng.poisson(100.0, series).astype(float)
        before_s = time.process_time()
        bank.update(values_N)
        bank.predict()
        taken_s.append(time.process_time() - before_s)
    memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {"rounds": len(taken_s), "round_s": float(np.mean(taken_s[-LAST:])), "memory_bytes": memory_bytes}
        )
    )


if __name__ == "__main__":
    main()
