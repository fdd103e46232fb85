"""Recorded requests against replicas of virtual time: what a scaling rule decides, as those who ask see it.

The rule is the server's own (`control.scaling.step`); replicas, warm spares and their starts follow what the
server's crew does: a spare takes a model in ``load_s``, a process becomes a spare in ``warm_up_s``, one
process starts at a time, and spares wait while a model is loaded.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from forescale.control.scale import Load, ScalingRules, ScalingState
from forescale.control.scaling import step
from forescale.engine.serve.metrics import ModelMetrics
from forescale.registry.records import DeploymentSpec

LOOK_S = 0.25
MODEL = "m"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the replicas run on.

    Attributes:
        batch_s: what a batch takes besides its rows.
        row_s: what each row takes.
        load_s: from a warm spare to a replica.
        warm_up_s: from nothing to a warm spare.
        spares: warm processes that are kept.
    """

    batch_s: float
    row_s: float
    max_rows: int = 32
    load_s: float = 0.3
    warm_up_s: float = 0.1
    spares: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it.

    Attributes:
        violations: requests answered later than the target.
        replica_s: seconds of processes that load a model or serve it, and of those that start for one.
        changes: how often another number of replicas was wanted.
        wanted: when the number changed, and to what.
    """

    requests: int
    violations: int
    replica_s: float
    changes: int
    wanted: tuple[tuple[float, int], ...]
    waits_s: tuple[float, ...] = field(repr=False)


@dataclass(slots=True)
class _Replica:
    placed_s: float
    ready: bool = False
    loading: bool = False
    busy: bool = False
    leaving: bool = False


class Replay:
    """One model, asked at ``arrivals_s`` (ascending), one row a request."""

    def __init__(
        self, arrivals_s: Sequence[float], machine: Machine, spec: DeploymentSpec, rules: ScalingRules
    ) -> None:
        self._arrivals_s = arrivals_s
        self._machine = machine
        self._spec = spec
        self._rules = rules
        self._state = ScalingState()
        self._metrics = ModelMetrics()
        self._queue: deque[float] = deque()
        self._replicas: list[_Replica] = []
        self._arrived = 0
        self._warm, self._starting = machine.spares, 0
        self._events: list[tuple[float, int, str, object]] = []
        self._numbers = itertools.count()
        self._waits_s: list[float] = []
        self._replica_s, self._paid_until_s = 0.0, 0.0
        self._wanted: list[tuple[float, int]] = []

    def run(self) -> Outcome:
        end_s = self._arrivals_s[-1]
        self._at(0.0, "look", None)
        for arrived_s in self._arrivals_s:
            self._at(arrived_s, "arrival", arrived_s)
        now_s = 0.0
        while self._events:
            now_s, _, what, item = heapq.heappop(self._events)
            self._pay(min(now_s, end_s))
            if what == "look" and now_s > end_s:
                continue
            getattr(self, f"_{what}")(now_s, item)
            self._dispatch(now_s)
        latency_s = self._spec.latency_s or self._rules.latency_s
        return Outcome(
            requests=len(self._arrivals_s),
            violations=sum(wait_s > latency_s for wait_s in self._waits_s),
            replica_s=self._replica_s,
            changes=len(self._wanted) - 1,
            wanted=tuple(self._wanted),
            waits_s=tuple(self._waits_s),
        )

    def _at(self, time_s: float, what: str, item: object) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), what, item))

    def _pay(self, now_s: float) -> None:
        held = sum(replica.ready or replica.loading for replica in self._replicas)
        starting = self._starting and any(
            not replica.ready and not replica.loading for replica in self._replicas
        )
        self._replica_s += (held + starting) * (now_s - self._paid_until_s)
        self._paid_until_s = now_s

    def _arrival(self, _now_s: float, arrived_s: float) -> None:
        self._arrived += 1
        self._queue.append(arrived_s)

    def _dispatch(self, now_s: float) -> None:
        for replica in self._replicas:
            if not self._queue:
                return
            if replica.ready and not replica.busy and not replica.leaving:
                rows = min(len(self._queue), self._most_rows())
                batch = [self._queue.popleft() for _ in range(rows)]
                seconds = self._machine.batch_s + self._machine.row_s * rows
                replica.busy = True
                self._at(now_s + seconds, "answer", (replica, batch, seconds))

    def _most_rows(self) -> int:
        scale = self._state.models.get(MODEL)
        return min(self._machine.max_rows, (scale and scale.batch_rows) or self._machine.max_rows)

    def _answer(self, now_s: float, item: tuple[_Replica, list[float], float]) -> None:
        replica, batch, seconds = item
        replica.busy = False
        self._metrics.note_batch(len(batch), seconds)
        self._waits_s += [now_s - arrived_s for arrived_s in batch]

    def _look(self, now_s: float, _item: None) -> None:
        ready = sum(replica.ready for replica in self._replicas)
        load = Load(
            spec=self._spec,
            arrived_rows=self._arrived,
            waiting_rows=len(self._queue),
            batch_times=self._metrics.batch_times(),
            max_rows=self._machine.max_rows,
            ready=ready,
            start_s=self._machine.load_s + (0.0 if self._warm else self._machine.warm_up_s),
        )
        self._state, _ = step(self._state, [load], now_s, 64, self._rules)
        wanted = self._state.models[MODEL].wanted
        if not self._wanted or self._wanted[-1][1] != wanted:
            self._wanted.append((now_s, wanted))
        while len(self._replicas) < wanted:
            self._replicas.append(_Replica(now_s))
        # As the server does: those that are not ready cost least to lose; of the others the newest go.
        self._replicas.sort(key=lambda replica: (not replica.ready, replica.placed_s))
        for replica in self._replicas[wanted:]:
            replica.leaving = True
        del self._replicas[wanted:]
        self._staff(now_s)
        self._at(now_s + LOOK_S, "look", None)

    def _staff(self, now_s: float) -> None:
        waiting = [replica for replica in self._replicas if not replica.ready and not replica.loading]
        for replica in waiting[: self._warm]:
            replica.loading = True
            self._warm -= 1
            self._at(now_s + self._machine.load_s, "loaded", replica)
        waits = sum(not replica.ready and not replica.loading for replica in self._replicas)
        loads = any(replica.loading for replica in self._replicas)
        wanted = waits + (0 if loads else self._machine.spares)
        if not self._starting and self._warm < wanted:
            self._starting = 1
            self._at(now_s + self._machine.warm_up_s, "warmed", None)

    def _warmed(self, now_s: float, _item: None) -> None:
        self._starting = 0
        self._warm += 1
        self._staff(now_s)

    def _loaded(self, now_s: float, replica: _Replica) -> None:
        replica.ready, replica.loading = True, False
        self._staff(now_s)


def replay(
    arrivals_s: Sequence[float],
    rules: ScalingRules,
    machine: Machine,
    *,
    latency_s: float = 0.5,
    least: int = 1,
    most: int = 16,
) -> Outcome:
    """What a rule makes of recorded requests."""
    spec = DeploymentSpec(model=MODEL, number=1, min_replicas=least, max_replicas=most, latency_s=latency_s)
    return Replay(arrivals_s, machine, spec, rules).run()
