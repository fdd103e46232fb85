"""Which replica gets the next batch. Pure: time and chance are arguments.

A replica is given a batch only when it can run it at once, or is about to finish the one before: until then
requests wait in the queue, where they can still go elsewhere, be overtaken or be dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

_FORGETTING = 0.97
"""Weight of the past at each new observation: about the last 33 batches count."""

_DOUBT = 0.03
"""Weight of all the past when a replica has other threads than before: about that of one batch."""


_BATCHES_AHEAD = 8
"""Batches per replica that are given out in thought; if more wait, everybody is needed."""


class ServiceTime:
    """Seconds that a replica takes for a batch, fitted as ``fixed + per row x rows`` while it works.

    Least squares with exponential forgetting. A replica that has not answered yet is taken to need no time.
    """

    def __init__(self) -> None:
        self._weight = 0.0
        self._rows = 0.0
        self._seconds = 0.0
        self._rows_rows = 0.0
        self._rows_seconds = 0.0
        self.fixed_s = 0.0
        self.per_row_s = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        self._weight = self._weight * _FORGETTING + 1
        self._rows = self._rows * _FORGETTING + rows
        self._seconds = self._seconds * _FORGETTING + seconds
        self._rows_rows = self._rows_rows * _FORGETTING + rows * rows
        self._rows_seconds = self._rows_seconds * _FORGETTING + rows * seconds
        mean_rows, mean_s = self._rows / self._weight, self._seconds / self._weight
        variance = self._rows_rows / self._weight - mean_rows**2
        covariance = self._rows_seconds / self._weight - mean_rows * mean_s
        # All batches alike: their time is shared half and half, so that larger ones take longer.
        slope = covariance / variance if variance > 1e-6 * mean_rows**2 else mean_s / mean_rows / 2
        self.per_row_s = min(max(slope, 0.0), mean_s / mean_rows)
        self.fixed_s = mean_s - self.per_row_s * mean_rows

    def doubt(self) -> None:
        """What is seen next counts most: the replica has become another one."""
        self._weight *= _DOUBT
        self._rows *= _DOUBT
        self._seconds *= _DOUBT
        self._rows_rows *= _DOUBT
        self._rows_seconds *= _DOUBT

    def predict_s(self, rows: int) -> float:
        return self.fixed_s + self.per_row_s * rows


class ReplicaLoad:
    """What the gateway knows of a replica.

    Attributes:
        credits: batches that it may be given now.
        max_rows: most rows that it takes in a batch.
        batch_rows: most rows that it is given in one.
        in_flight: batches it was given and has not answered, with their rows, in order.
        draining: whether it gets no more batches.
        observed_s: when it last answered.
    """

    def __init__(self, name: str, *, max_rows: int) -> None:
        self.name = name
        self.max_rows = self.batch_rows = max_rows
        self.credits = 0
        self.in_flight: dict[int, int] = {}
        self.draining = False
        self.service = ServiceTime()
        self.observed_s = -math.inf
        self._threads: int | None = None
        self._began_s = 0.0  # when the batch that it runs now was sent, or reached its turn

    def send(self, batch: int, rows: int, now_s: float) -> None:
        """It is given a batch.

        Raises:
            ValueError: it has no credit.
        """
        if self.credits < 1:
            raise ValueError(f"{self.name} has no credit")
        if not self.in_flight:
            self._began_s = now_s
        self.credits -= 1
        self.in_flight[batch] = rows

    def finish(self, batch: int, now_s: float, *, failed: bool = False, threads: int | None = None) -> None:
        """It answered a batch, which gives the credit back.

        Raises:
            KeyError: it was not given this batch.
        """
        rows = self.in_flight.pop(batch)
        self.credits += 1
        if not failed:
            if threads != self._threads:
                self._threads = threads
                self.service.doubt()
            self.service.observe(rows, now_s - self._began_s)
            self.observed_s = now_s
        self._began_s = now_s

    def free_s(self, now_s: float) -> float:
        """When it is predicted to have answered all it was given.

        Once a batch is overdue it is expected to take as long again as it is late: a replica that hangs looks
        worse and worse.
        """
        if not self.in_flight:
            return now_s
        turns_s = [self.service.predict_s(rows) for rows in self.in_flight.values()]
        running_end_s = self._began_s + turns_s[0]
        if running_end_s < now_s:
            running_end_s = now_s + (now_s - running_end_s)
        return running_end_s + sum(turns_s[1:])

    def is_open(self, now_s: float, lead_s: float) -> bool:
        """Whether it can take a batch: it has a credit, and nothing to do in ``lead_s`` from now."""
        return (
            self.credits > 0
            and not self.draining
            and (not self.in_flight or self.free_s(now_s) <= now_s + lead_s)
        )


class Balancing(Protocol):
    """Chooses a replica for a batch.

    ``choose`` is told how many rows wait in all.
    """

    def choose(
        self, replicas: Sequence[ReplicaLoad], rows: int, now_s: float, lead_s: float, /
    ) -> ReplicaLoad | None:
        """One of ``replicas`` that is open; None if there is none, or waiting for another one is better."""
        ...


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._last = ""

    def choose(
        self, replicas: Sequence[ReplicaLoad], _rows: int, now_s: float, lead_s: float, /
    ) -> ReplicaLoad | None:
        ready = [replica for replica in replicas if replica.is_open(now_s, lead_s)]
        if not ready:
            return None
        chosen = min(ready, key=lambda replica: (replica.name <= self._last, replica.name))
        self._last = chosen.name
        return chosen


class LeastConnections:
    """Whoever has the fewest rows to answer."""

    def choose(
        self, replicas: Sequence[ReplicaLoad], _rows: int, now_s: float, lead_s: float, /
    ) -> ReplicaLoad | None:
        ready = [replica for replica in replicas if replica.is_open(now_s, lead_s)]
        return min(ready, key=_rows_in_flight, default=None)


class PowerOfTwo:
    """The less loaded of two drawn at random (M. Mitzenmacher, IEEE TPDS 12(10), 2001)."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def choose(
        self, replicas: Sequence[ReplicaLoad], _rows: int, now_s: float, lead_s: float, /
    ) -> ReplicaLoad | None:
        ready = [replica for replica in replicas if replica.is_open(now_s, lead_s)]
        if len(ready) > 2:
            ready = [ready[number] for number in self._rng.choice(len(ready), 2, replace=False)]
        return min(ready, key=_rows_in_flight, default=None)


class PredictedCompletion:
    """Whoever is predicted to answer first, though it may be busy still: then the batch waits for it.

    All that waits is given out in thought, batch after batch, until one falls to a replica that is open. So a
    slow replica gets work only when the fast ones have that much to do.
    """

    def choose(
        self, replicas: Sequence[ReplicaLoad], rows: int, now_s: float, lead_s: float, /
    ) -> ReplicaLoad | None:
        ready = {replica.name for replica in replicas if replica.is_open(now_s, lead_s)}
        if not ready:
            return None
        usable = [
            replica
            for replica in replicas
            if not replica.draining and replica.credits + len(replica.in_flight) > 0
        ]
        free_s = {replica.name: replica.free_s(now_s) for replica in usable}
        for _ in range(_BATCHES_AHEAD * len(usable)):
            if rows <= 0:
                return None
            end_s, best = min(
                ((free_s[r.name] + r.service.predict_s(min(rows, r.batch_rows)), r) for r in usable),
                key=lambda pair: pair[0],
            )
            if best.name in ready:
                return best
            free_s[best.name] = end_s
            rows -= best.batch_rows
        return min(
            (replica for replica in usable if replica.name in ready),
            key=lambda replica: replica.service.predict_s(replica.batch_rows),
        )


def _rows_in_flight(replica: ReplicaLoad) -> int:
    return sum(replica.in_flight.values())
