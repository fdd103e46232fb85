"""What serving counts, and how Prometheus reads it (text format 0.0.4). All names and units are here."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from forescale import __version__

SECONDS = (
    *(0.0005, 0.00075, 0.001, 0.0015, 0.0025, 0.0035, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.035, 0.05),
    *(0.075, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 3.5, 5.0, 7.5, 10.0, 15.0, 30.0),
)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)

_NEWS = 0.1
"""Weight of a new batch against those before: about the last ten of its size count."""

Sample = tuple[Mapping[str, str], float]


class Histogram:
    """Counts of values up to each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)


class ModelMetrics:
    """What is counted for one version of a model.

    Attributes:
        outcomes: requests by how they ended: "ok", "invalid", "refused", "failed", "cancelled".
        latency_s: from a request's arrival at the queue to its answer, of those answered.
        waiting_s: from there to when it was sent to a replica.
        batch_rows: rows of the batches sent.
        busy_s: what replicas took for all batches together.
        busy_core_s: the same, for each of the threads that ran them.
        arrived_rows: of all requests that fit the model, whatever became of them.
    """

    def __init__(self) -> None:
        self.outcomes = dict.fromkeys(("ok", "invalid", "refused", "failed", "cancelled"), 0)
        self.latency_s = Histogram(SECONDS)
        self.waiting_s = Histogram(SECONDS)
        self.batch_rows = Histogram(ROWS)
        self.busy_s = 0.0
        self.busy_core_s = 0.0
        self.retries = 0
        self.arrived_rows = 0
        self._batches: dict[tuple[int, int], tuple[float, float]] = {}

    def note_batch(self, rows: int, seconds: float, threads: int = 1) -> None:
        """A replica answered a batch."""
        self.busy_s += seconds
        self.busy_core_s += seconds * threads
        size = threads, rows.bit_length()  # batches of 2^(n-1) up to 2^n rows are taken together
        known_rows, known_s = self._batches.get(size, (rows, seconds))
        self._batches[size] = (
            known_rows + (rows - known_rows) * _NEWS,
            known_s + (seconds - known_s) * _NEWS,
        )

    def batch_times(self) -> dict[int, tuple[tuple[float, float], ...]]:
        """Mean rows and seconds of the latest batches, by threads; by size, ascending."""
        times: dict[int, tuple[tuple[float, float], ...]] = {}
        for threads, size in sorted(self._batches):
            times[threads] = (*times.get(threads, ()), self._batches[threads, size])
        return times


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """A model's state at the moment."""

    waiting: int
    waiting_rows: int
    in_flight: int
    replicas: int


def exposition(models: Iterable[tuple[str, str, ModelMetrics, Gauges]]) -> bytes:
    """Everything as Prometheus reads it, of (model, version, counts, state)."""
    known = [({"model": model, "version": version}, metrics, now) for model, version, metrics, now in models]
    lines: list[str] = []
    lines += _family(
        "forescale_requests_total",
        "counter",
        "Inference requests by how they ended.",
        [
            ({**labels, "outcome": outcome}, count)
            for labels, metrics, _ in known
            for outcome, count in metrics.outcomes.items()
        ],
    )
    lines += _family(
        "forescale_retries_total",
        "counter",
        "Requests sent once more because their replica or their batch failed.",
        [(labels, metrics.retries) for labels, metrics, _ in known],
    )
    lines += _family(
        "forescale_request_rows_total",
        "counter",
        "Rows of the requests that fit the model, whatever became of them.",
        [(labels, metrics.arrived_rows) for labels, metrics, _ in known],
    )
    lines += _family(
        "forescale_replica_busy_seconds_total",
        "counter",
        "Time that replicas took for batches.",
        [(labels, metrics.busy_s) for labels, metrics, _ in known],
    )
    lines += _family(
        "forescale_replica_core_seconds_total",
        "counter",
        "The same, for each of the threads that ran them.",
        [(labels, metrics.busy_core_s) for labels, metrics, _ in known],
    )
    for name, text, what in (
        ("forescale_waiting_requests", "Requests in the queue.", "waiting"),
        ("forescale_waiting_rows", "Rows of the requests in the queue.", "waiting_rows"),
        ("forescale_in_flight_requests", "Requests that replicas have.", "in_flight"),
        ("forescale_replicas", "Replicas that take requests.", "replicas"),
    ):
        lines += _family(name, "gauge", text, [(labels, getattr(now, what)) for labels, _, now in known])
    for name, text, what in (
        ("forescale_request_duration_seconds", "From arrival to answer, of those answered.", "latency_s"),
        ("forescale_request_waiting_seconds", "From arrival until sent to a replica.", "waiting_s"),
        ("forescale_batch_rows", "Rows of a batch.", "batch_rows"),
    ):
        lines += [f"# HELP {name} {text}", f"# TYPE {name} histogram"]
        for labels, metrics, _ in known:
            lines += _histogram(name, labels, getattr(metrics, what))
    return ("\n".join(lines) + "\n").encode()


def process_exposition() -> bytes:
    """This process and its version, under the names that Prometheus' own clients use."""
    process = psutil.Process()
    with process.oneshot():
        times, open_files = process.cpu_times(), process.num_fds()
        figures = (
            ("forescale_build_info", "gauge", "Which Forescale this is.", {"version": __version__}, 1),
            (
                "process_cpu_seconds_total",
                "counter",
                "User and system CPU time.",
                {},
                times.user + times.system,
            ),
            ("process_open_fds", "gauge", "Open file descriptors.", {}, open_files),
            (
                "process_resident_memory_bytes",
                "gauge",
                "Memory in use.",
                {},
                process.memory_info().rss,
            ),
            (
                "process_start_time_seconds",
                "gauge",
                "When it began, since the epoch.",
                {},
                process.create_time(),
            ),
        )
    lines = [
        line
        for name, kind, text, labels, value in figures
        for line in _family(name, kind, text, [(labels, value)])
    ]
    return ("\n".join(lines) + "\n").encode()


def _family(name: str, kind: str, text: str, samples: Iterable[Sample]) -> list[str]:
    head = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    return head + [f"{name}{_labels(labels)} {value}" for labels, value in samples]


def _histogram(name: str, labels: Mapping[str, str], histogram: Histogram) -> list[str]:
    lines: list[str] = []
    total = 0
    for bound, count in zip((*histogram.bounds, "+Inf"), histogram.counts, strict=True):
        total += count
        lines.append(f"{name}_bucket{_labels({**labels, 'le': str(bound)})} {total}")
    lines.append(f"{name}_sum{_labels(labels)} {histogram.sum}")
    lines.append(f"{name}_count{_labels(labels)} {total}")
    return lines


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    quoted = (
        f'{name}="{value.replace(chr(92), chr(92) * 2).replace(chr(34), chr(92) + chr(34))}"'
        for name, value in labels.items()
    )
    return "{" + ",".join(quoted).replace("\n", "\\n") + "}"
