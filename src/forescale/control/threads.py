"""How many threads a model's replicas are to have: whether more of them are cheaper than more replicas. Pure.

Batches as large as the latency allows come first, since they cost nothing: what a replica can do is measured
with those. If that is not enough, each number of threads, with as many replicas as it needs then, is priced
in core-seconds: those that batches take, those that memory withholds from others, those that processes take
to start, and rows that are late until they have. More threads help at once, a replica when it has started.

A number of threads that was never measured is tried only if more is needed, one step at a time, and in
batches that are in time even if they take twice as long as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil

from forescale.control.capacity import (
    ThreadTimes,
    rows_in_time,
    rows_in_time_per_s,
    rows_per_s,
    seconds_of,
    times_with,
)

_RISK = 2.0  # times as long as before, which batches with threads never measured may take
_SLACK = 1.2  # times what is needed must be done with fewer threads
_WORST = 10.0  # times its price, at most, that a row has that is far too late
_TINY = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """What a model needs, and may have.

    Attributes:
        demand_per_s: rows to be answered within ``latency_s``.
        least, most: replicas.
        most_threads: that each of its replicas may have.
        cores: that all of them may keep busy.
        start_s: what a replica that is started now needs until it answers.
        start_core_s: what starting takes of cores.
        withheld_cores: cores that go with the memory that a replica takes.
        late_worth: a row that is late costs as much as so many that are answered.
        horizon_s: for how long it is priced.
    """

    times: ThreadTimes
    max_rows: int
    latency_s: float
    demand_per_s: float
    least: int
    most: int
    most_threads: int
    cores: int
    start_s: float
    start_core_s: float
    withheld_cores: float
    late_worth: float
    horizon_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A number of threads, with as many replicas as are needed then; ``core_s`` is its price."""

    threads: int
    replicas: int
    core_s: float

    def __str__(self) -> str:
        replicas = f"{self.replicas} replica{'s' * (self.replicas != 1)}"
        return f"{replicas} of {_threads(self.threads)} cost {self.core_s:.3g} core-s"


def choose(threads: int, replicas: int, want: Want) -> tuple[int, str | None]:
    """How many threads each replica is to have, and why, if not as many as now."""
    prices = Prices(want)
    is_enough = threads <= want.most_threads and prices.does(threads, replicas) >= want.demand_per_s - _TINY
    if is_enough and threads == 1:
        return threads, None
    stay = prices.of(threads, replicas, fixed=replicas)
    options = [prices.of(each, replicas) for each in sorted(_allowed(threads, prices))]
    if is_enough:
        options = [
            option
            for option in options
            if option.threads < threads
            and option.core_s <= stay.core_s
            and prices.does(option.threads, replicas) >= _SLACK * want.demand_per_s
        ]
    best = min(options, key=lambda option: (option.core_s, option.threads), default=stay)
    if best.threads == threads:
        return threads, None
    if threads > want.most_threads:
        return best.threads, f"others are busy on its cores, but for {want.most_threads} each"
    other = min((o for o in options if o.threads == threads), key=lambda o: o.core_s, default=stay)
    return best.threads, f"for {want.horizon_s:g} s {best}, {other}"


def batch_rows(times: ThreadTimes, threads: int | None, max_rows: int, latency_s: float) -> int | None:
    """Rows of the largest batch of which two fit in the latency; None: nothing was measured."""
    if threads is not None and times and threads > max(times):
        # Nobody knows what they take, but hardly more than twice as long.
        return rows_in_time(times_with(times, max(times)), max_rows, latency_s / _RISK)
    return rows_in_time(times_with(times, threads), max_rows, latency_s)


class Prices:
    """What numbers of threads and replicas cost a model that needs so much."""

    def __init__(self, want: Want) -> None:
        self.want = want
        self._speeds: dict[int, tuple[float, float]] = {}

    def of(self, threads: int, now: int, *, fixed: int | None = None) -> Option:
        """So many threads, with as many replicas as they need, or ``fixed``.

        Args:
            now: replicas that there are.
        """
        want = self.want
        any_per_s, in_time_per_s = self.speeds(threads)
        need = ceil(want.demand_per_s / (in_time_per_s or any_per_s) - _TINY)
        replicas = max(want.least, min(need, want.most)) if fixed is None else fixed
        work_cores = min(want.demand_per_s, replicas * any_per_s) * threads / any_per_s
        started = max(0, replicas - now)
        start_s = min(want.start_s, want.horizon_s) if started else 0.0
        # If none is in time, those that are not even answered count twice.
        late_rows = sum(
            max(0.0, want.demand_per_s - min(now, replicas) * per_s) * start_s
            + max(0.0, want.demand_per_s - replicas * per_s) * (want.horizon_s - start_s)
            for per_s in {any_per_s, in_time_per_s}
        )
        lateness = min(max(1.0, 2.0 * self.one_s(threads) / want.latency_s), _WORST)
        # A row is worth what it takes where that is least.
        row_core_s = min(each / self.speeds(each)[0] for each in want.times)
        late_core_s = want.late_worth * lateness * late_rows * row_core_s
        held_core_s = want.horizon_s * (work_cores + replicas * want.withheld_cores)
        core_s = held_core_s + started * want.start_core_s + late_core_s
        return Option(threads=threads, replicas=replicas, core_s=core_s)

    def does(self, threads: int, replicas: int) -> float:
        """Rows that are answered in a second, in time."""
        return replicas * self.speeds(threads)[1]

    def speeds(self, threads: int) -> tuple[float, float]:
        """Rows that a replica answers in a second: any, and within the latency."""
        if threads not in self._speeds:
            want = self.want
            times = times_with(want.times, threads)
            any_per_s = rows_per_s(times, want.max_rows, want.latency_s)
            assert any_per_s is not None, "nothing is decided before something was measured"
            in_time_per_s = rows_in_time_per_s(times, want.max_rows, want.latency_s)
            self._speeds[threads] = any_per_s, in_time_per_s
        return self._speeds[threads]

    def one_s(self, threads: int) -> float:
        """What a single row takes."""
        return seconds_of(times_with(self.want.times, threads), 1.0)


def _allowed(threads: int, prices: Prices) -> set[int]:
    """Numbers of threads that may be chosen: powers of two, the most, and those that were measured."""
    want = prices.want
    most, top = want.most_threads, max(want.times)
    levels = {1 << power for power in range(most.bit_length())} | {most, *want.times, threads}
    known = {level for level in levels if level <= min(most, top)}
    in_time, one_s = prices.does(top, 1) > 0.0, prices.one_s(top)
    if in_time and 2.0 * _RISK * one_s > want.latency_s:
        return known  # a trial could make requests late that are in time now
    trials = [level for level in sorted(levels) if top < level <= most]
    # If none is in time, those are passed over that would not be even if threads shared the work evenly.
    hopeful = [level for level in trials if in_time or 2.0 * one_s * top / level <= want.latency_s]
    tried = (hopeful or trials[-1:])[:1]
    return known | {
        level for level in tried if prices.of(level, 0).replicas * level <= max(want.cores, level)
    }


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


class Cores:
    """The cores of CPU devices, while models take theirs one after the other.

    Args:
        cores: of each device; those of others are not counted.
        busy: of each model, the cores that each of its replicas takes, and its replicas by device.
    """

    def __init__(
        self, cores: Mapping[str, int], busy: Iterable[tuple[str, float, Mapping[str, int]]]
    ) -> None:
        self._free: dict[str, float] = {**cores}
        self._taken: dict[str, tuple[float, Mapping[str, int]]] = {}
        for model, each, replicas in busy:
            self.take(model, each, replicas)

    def take(self, model: str, each: float, replicas: Mapping[str, int]) -> None:
        """A model's replicas keep so many cores busy each, instead of as many as before."""
        for sign, (cores, on) in ((1.0, self._taken.get(model, (0.0, {}))), (-1.0, (each, replicas))):
            for device, count in on.items():
                if device in self._free:
                    self._free[device] += sign * cores * count
        self._taken[model] = each, replicas

    def room(self, model: str) -> tuple[int, int] | None:
        """Threads that each of a model's replicas may have, and all may; None: its cores are not counted.

        A core that others keep busy for less than half of the time counts as idle.
        """
        each, replicas = self._taken.get(model, (0.0, {}))
        if not self._free or not replicas.keys() <= self._free.keys():
            return None
        free = {name: left + each * replicas.get(name, 0) + 0.5 for name, left in self._free.items()}
        shares = [int(free[name] / count) for name, count in replicas.items()]
        most = min(shares) if shares else int(max(free.values()))
        return max(1, most), sum(_whole(free.values()))


def _whole(cores: Iterable[float]) -> Iterator[int]:
    return (max(0, int(each)) for each in cores)
