"""Models on the cores of one device, in virtual time: threads and replicas as scaling decides them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from forescale.control.scale import Load, ScalingRules, ScalingState
from forescale.control.scaling import step
from forescale.engine.serve.metrics import ModelMetrics
from forescale.registry.records import DeploymentSpec

TICK_S = 0.25
START_S = 5.0
MAX_ROWS = 32


@dataclass(kw_only=True)
class Model:
    """A model and what is asked of it.

    Attributes:
        row_s: what a row takes with one thread; a batch takes as much as its rows.
        serial_share: of that, what more threads do not shorten.
        demand_per_s: rows, at each tick.
    """

    spec: DeploymentSpec
    row_s: float
    serial_share: float
    demand_per_s: Sequence[float]
    withheld_cores: float = 0.1
    metrics: ModelMetrics = field(default_factory=ModelMetrics)
    waiting: float = 0.0
    arrived: int = 0
    late: float = 0.0
    core_s: float = 0.0
    since_s: list[float] = field(default_factory=lambda: [-START_S])
    threads: int | None = None
    rows: int | None = None
    wanted: list[tuple[int, int | None]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    slowest_s: list[float] = field(default_factory=list)

    def ready(self, now_s: float) -> int:
        return sum(now_s - since_s >= START_S for since_s in self.since_s)

    def batch_s(self, rows: int) -> float:
        return self.row_s * rows * (self.serial_share + (1.0 - self.serial_share) / (self.threads or 1))

    def load(self, now_s: float) -> Load:
        return Load(
            spec=self.spec,
            arrived_rows=self.arrived,
            waiting_rows=round(self.waiting),
            batch_times=self.metrics.batch_times(),
            max_rows=MAX_ROWS,
            ready=self.ready(now_s),
            start_s=START_S,
            start_core_s=START_S,
            threads=self.threads,
            busy_core_s=self.metrics.busy_core_s,
            replicas={"cpu0": len(self.since_s)},
            withheld_cores=self.withheld_cores,
        )

    def serve(self, tick: int, rng: np.random.Generator, stretch: float) -> None:
        """Answer what one tick has time for; each batch takes ``stretch`` times as long as on idle cores."""
        rows = int(rng.poisson(self.demand_per_s[tick] * TICK_S))
        self.arrived += rows
        ready = self.ready(tick * TICK_S)
        most = min(self.rows or MAX_ROWS, MAX_ROWS)
        batch = max(1, min(most, round((self.waiting + rows) / max(ready, 1))))
        taken_s = self.batch_s(batch) * stretch
        per_s = ready * batch / taken_s
        done = min(self.waiting + rows, per_s * TICK_S)
        if done > 0.0:
            for size in {1, batch // 2 or 1, batch}:  # some are smaller
                self.metrics.note_batch(size, self.batch_s(size) * stretch, self.threads or 1)
        self.core_s += done / batch * self.batch_s(batch) * (self.threads or 1)
        self.slowest_s.append(taken_s)
        latency_s = self.spec.latency_s or 0.5
        in_time = max(0.0, per_s * (latency_s - taken_s) + per_s * TICK_S - self.waiting)
        self.late += max(0.0, rows - in_time)
        self.waiting += rows - done


def serve(
    models: Sequence[Model],
    cores: int,
    *,
    seed: int,
    rules: ScalingRules | None = None,
    vertical: bool = True,
    after: Callable[[int], None] = lambda _: None,
) -> None:
    """Run them until the demand of the first ends; ``after`` each tick."""
    rng, state = np.random.default_rng(seed), ScalingState()
    for tick in range(len(models[0].demand_per_s)):
        now_s = tick * TICK_S
        known = {"cpu0": cores} if vertical else None
        loads = [model.load(now_s) for model in models]
        state, decisions = step(state, loads, now_s, 8, rules or ScalingRules(), cores=known)
        for model in models:
            scale = state.models[model.spec.model]
            model.threads, model.rows = scale.threads, scale.batch_rows
            model.wanted.append((scale.wanted, scale.threads))
            lacking = scale.wanted - len(model.since_s)
            model.since_s = [*model.since_s, *[now_s] * lacking][: scale.wanted]
            model.reasons += [each.scale.reason for each in decisions if each.model == model.spec.model]
        after(tick)
        # Batches share the cores that there are.
        busy = sum(model.ready(now_s) * (model.threads or 1) * _is_busy(model, tick) for model in models)
        for model in models:
            model.serve(tick, rng, max(1.0, busy / cores))


def _is_busy(model: Model, tick: int) -> float:
    per_s = model.ready(tick * TICK_S) * MAX_ROWS / model.batch_s(MAX_ROWS)
    return 1.0 if model.waiting >= 1.0 else min(1.0, model.demand_per_s[tick] / max(per_s, 1e-9))
