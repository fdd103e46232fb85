"""The requests to one model that wait for a replica: who is next, with whom, and who cannot be in time.

Pure: the time is an argument. Priorities are strict: a class is served before all classes behind it, which
only fill rows that it leaves free in a batch. Inside a class, flows (clients) share the rows by their
weights: start-time fair queueing (P. Goyal, H. M. Vin, H. Cheng, "Start-time fair queuing", IEEE/ACM
Transactions on Networking 5(5), 1997). Inside a flow, who came first goes first.

Requests whose free axes have other lengths never share a batch, so that nothing is padded.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from forescale.engine.serve.policy import QueuePolicy

T = TypeVar("T")

_SLACK = 64  # stale entries that a heap may hold before it is worth rebuilding


class Entry(Generic[T]):
    """A request in the queue, or taken from it.

    Attributes:
        item: what the queue's owner put in.
        deadline_s: when an answer is of no use any more.
        alike: requests of equal ``alike`` can share a batch.
        waiting: whether it is in the queue.
        predicted_s: seconds that it was to take when it was let in; 0: nothing was predicted.
    """

    __slots__ = (
        "alike",
        "arrived_s",
        "deadline_s",
        "item",
        "number",
        "predicted_s",
        "priority",
        "rows",
        "size_bytes",
        "tag",
        "waiting",
    )

    def __init__(
        self,
        item: T,
        *,
        rows: int,
        arrived_s: float,
        deadline_s: float,
        priority: int = 1,
        size_bytes: int = 0,
        alike: Hashable = (),
    ) -> None:
        self.item = item
        self.rows = rows
        self.size_bytes = size_bytes
        self.priority = priority
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s
        self.alike = alike
        self.waiting = False
        self.tag = 0.0  # when its service starts, in the virtual time of its class
        self.number = 0
        self.predicted_s = 0.0


_LOOKED_AT = 1024
"""Requests that are looked at for one batch."""

_RATE_MEMORY_S = 1.0
"""Arrivals of about that long make the rate of a class."""

_FORGOTTEN_S = 5.0  # after so much silence a class begins to come anew
_LEAST_SEEN_S = 0.02

_DEVIATIONS = 2.0
"""Standard deviations of rows that come independently, by which their rate may be higher than it was."""

_FLOWS_KNOWN = 10_000
"""Beyond, the flow that has been quiet for longest is forgotten and may start afresh."""

_Line = list[tuple[float, int, Entry[T]]]
"""A heap of (tag, number, entry); it may hold entries that wait no more."""


class _Class(Generic[T]):
    """The requests of one priority."""

    def __init__(self) -> None:
        self.lines: dict[Hashable, _Line[T]] = {}
        self.finish_tags: dict[str, float] = {}
        self.virtual_time = 0.0  # tag of whoever was served last
        self.rows = 0
        self.requests = 0
        self._recent_rows = 0.0  # at the last arrival; what came before it counts the less the older it is
        self._arrived_s = self._since_s = -math.inf

    def rate_rows_per_s(self, now_s: float) -> float:
        """Rows that are coming, by those that came lately: hardly ever more."""
        rows = self._recent_rows * math.exp((self._arrived_s - now_s) / _RATE_MEMORY_S)
        # Who has begun to come has not come for all of the time that is remembered.
        share = -math.expm1(-max(now_s - self._since_s, _LEAST_SEEN_S) / _RATE_MEMORY_S)
        seen_s = share * _RATE_MEMORY_S
        return (rows + _DEVIATIONS * math.sqrt(rows / 2)) / seen_s

    def count(self, entry: Entry[T]) -> None:
        """It came just now."""
        now_s = entry.arrived_s
        if self.is_silent(now_s):
            self._since_s, self._recent_rows = now_s, 0.0
        self._recent_rows *= math.exp((self._arrived_s - now_s) / _RATE_MEMORY_S)
        self._recent_rows += entry.rows
        self._arrived_s = now_s

    def is_silent(self, now_s: float) -> bool:
        """Whether it has come no more for so long that it would begin anew."""
        return now_s - self._arrived_s > _FORGOTTEN_S

    def tag(self, entry: Entry[T], flow: str, weight: float) -> None:
        if not self.requests:
            self.virtual_time = 0.0
            self.finish_tags.clear()
        entry.tag = max(self.virtual_time, self.finish_tags.pop(flow, 0.0))
        self.finish_tags[flow] = entry.tag + entry.rows / weight
        if len(self.finish_tags) > _FLOWS_KNOWN:
            del self.finish_tags[next(iter(self.finish_tags))]

    def put(self, entry: Entry[T]) -> None:
        self.push(entry)
        self.rows += entry.rows
        self.requests += 1

    def push(self, entry: Entry[T]) -> None:
        """Give it its place in line."""
        heapq.heappush(self.lines.setdefault(entry.alike, []), (entry.tag, entry.number, entry))

    def pop(self, alike: Hashable) -> Entry[T] | None:
        """Take the next of those alike out of its line; it still counts as waiting."""
        head = self._head(alike)
        if head is not None:
            heapq.heappop(self.lines[alike])
        return head

    def pop_first(self) -> Entry[T] | None:
        """The same with the next of all."""
        first = self.first()
        return first and self.pop(first.alike)

    def first(self) -> Entry[T] | None:
        """Who is next of all."""
        heads = (self._head(alike) for alike in tuple(self.lines))
        return min(
            (head for head in heads if head is not None),
            key=lambda head: (head.tag, head.number),
            default=None,
        )

    def _head(self, alike: Hashable) -> Entry[T] | None:
        line = self.lines.get(alike)
        if line is None:
            return None
        while line and not line[0][2].waiting:
            heapq.heappop(line)
        if not line:
            del self.lines[alike]
            return None
        return line[0][2]

    def sweep(self) -> None:
        """Forget entries that left in the middle of a line, if they are many."""
        if sum(map(len, self.lines.values())) > 2 * self.requests + _SLACK:
            alive = {
                alike: [place for place in line if place[2].waiting] for alike, line in self.lines.items()
            }
            self.lines = {alike: line for alike, line in alive.items() if line}
            for line in self.lines.values():
                heapq.heapify(line)


class ModelQueue(Generic[T]):
    """The queue of one model."""

    def __init__(self, policy: QueuePolicy) -> None:
        self.policy = policy
        self._classes: dict[int, _Class[T]] = {}
        self._order: list[int] = []  # the classes' priorities, first class first
        self._deadlines: list[tuple[float, int, Entry[T]]] = []
        self._numbers = itertools.count()
        self.requests = 0
        self.rows = 0
        self.waiting_bytes = 0

    def rows_before(self, priority: int) -> int:
        """Rows that are served before a request of this class that came now."""
        return sum(waiting.rows for number, waiting in self._classes.items() if number <= priority)

    def wait_s(self, priority: int, rows_per_s: float, now_s: float) -> float:
        """Seconds until all is served that goes before a request of this class that came now.

        That is what waits, and what is to be expected of the classes ahead while it waits.

        Args:
            rows_per_s: what the replicas can do.
        """
        ahead_rows_per_s = sum(
            waiting.rate_rows_per_s(now_s) for number, waiting in self._classes.items() if number < priority
        )
        return self.rows_before(priority) / max(rows_per_s - ahead_rows_per_s, 0.01 * rows_per_s)

    def has_room(self, size_bytes: int) -> bool:
        policy = self.policy
        return (
            self.requests < policy.max_requests
            and self.waiting_bytes + size_bytes <= policy.max_waiting_bytes
        )

    def put(self, entry: Entry[T], flow: str = "") -> None:
        """Add a request of a client (flow)."""
        waiting = self._class(entry)
        entry.number = next(self._numbers)
        waiting.count(entry)
        waiting.tag(entry, flow, self.policy.weights.get(flow, 1.0))
        self._enter(waiting, entry)

    def put_back(self, entry: Entry[T], *, alone: bool) -> None:
        """Add a request again that was taken but not answered; it keeps its place.

        Args:
            alone: it shares no batch any more, because it may be the one that others failed with.
        """
        if alone:
            entry.alike = ("alone", entry.number)
        self._enter(self._class(entry), entry)

    def remove(self, entry: Entry[T]) -> None:
        """Take a request out that nobody waits for any more; harmless if it is not in the queue."""
        if entry.waiting:
            waiting = self._classes[entry.priority]
            self._leave(waiting, entry)
            waiting.sweep()

    def due_s(self) -> float:
        """When the next batch may leave: at once if it is full; infinity if nothing waits."""
        if not self.requests:
            return math.inf
        if self.policy.max_wait_s <= 0 or self.rows >= self.policy.full_rows:
            return -math.inf
        for priority in self._order:
            head = self._classes[priority].first()
            if head is not None:
                return head.arrived_s + self.policy.max_wait_s
        return math.inf

    def take(
        self,
        now_s: float,
        *,
        max_rows: int,
        service_s: Callable[[int], float],
        soonest_s: Callable[[int], float] | None = None,
        probe: bool = False,
    ) -> tuple[list[Entry[T]], list[Entry[T]]]:
        """Form the next batch for a replica.

        Args:
            max_rows: most rows; a request of more of them goes alone.
            service_s: from now to the replica's answer to a batch of so many rows, as predicted.
            soonest_s: the same of the best of all replicas; None: this is the only one.
            probe: try the first request even if it is predicted to be late, so that a prediction that
                is wrong is found out.

        Returns:
            The batch, and those that cannot be in time any more. Both have left the queue.
        """
        soonest_s = soonest_s or service_s
        full_rows = min(max_rows, self.rows)
        full_s = now_s + service_s(full_rows)
        found: list[Entry[T]] = []
        late: list[Entry[T]] = []
        rows = 0
        for priority in self._order:
            waiting = self._classes[priority]
            while rows < max_rows and len(found) < _LOOKED_AT:
                entry = waiting.pop(found[0].alike) if found else waiting.pop_first()
                if entry is None:
                    break
                in_time = now_s + soonest_s(entry.rows) <= entry.deadline_s or (probe and not found)
                if in_time and now_s < entry.deadline_s:
                    found.append(entry)
                    rows += entry.rows if entry.deadline_s >= full_s else 0
                else:
                    late.append(entry)
                    self._leave(waiting, entry)
        batch = _full(found, full_rows, max_rows, full_s) or _growing(
            found, max_rows, now_s, service_s, probe=probe
        )
        for entry in batch:
            waiting = self._classes[entry.priority]
            waiting.virtual_time = max(waiting.virtual_time, entry.tag)
            self._leave(waiting, entry)
        for entry in found:
            if entry.waiting:
                self._classes[entry.priority].push(entry)
        return batch, late

    def expire(self, now_s: float) -> list[Entry[T]]:
        """Remove the requests whose deadline has passed."""
        expired: list[Entry[T]] = []
        while self._deadlines and (self._deadlines[0][0] <= now_s or not self._deadlines[0][2].waiting):
            _, _, entry = heapq.heappop(self._deadlines)
            if entry.waiting:
                expired.append(entry)
                self._leave(self._classes[entry.priority], entry)
        if expired:
            for waiting in self._classes.values():
                waiting.sweep()
        return expired

    def next_deadline_s(self) -> float:
        """When ``expire`` has something to do, or earlier; infinity if nothing waits."""
        return self._deadlines[0][0] if self._deadlines else math.inf

    def _class(self, entry: Entry[T]) -> _Class[T]:
        known = self._classes.get(entry.priority)
        if known is None:
            now_s = entry.arrived_s
            alive = {
                n: each for n, each in self._classes.items() if each.requests or not each.is_silent(now_s)
            }
            known = alive[entry.priority] = _Class()
            self._classes, self._order = alive, sorted(alive)
        return known

    def _enter(self, waiting: _Class[T], entry: Entry[T]) -> None:
        entry.waiting = True
        waiting.put(entry)
        # A number of its own: an entry that was put back may still have its old place here.
        heapq.heappush(self._deadlines, (entry.deadline_s, next(self._numbers), entry))
        self.requests += 1
        self.rows += entry.rows
        self.waiting_bytes += entry.size_bytes
        if len(self._deadlines) > 2 * self.requests + _SLACK:
            self._deadlines = [place for place in self._deadlines if place[2].waiting]
            heapq.heapify(self._deadlines)

    def _leave(self, waiting: _Class[T], entry: Entry[T]) -> None:
        entry.waiting = False
        waiting.rows -= entry.rows
        waiting.requests -= 1
        self.requests -= 1
        self.rows -= entry.rows
        self.waiting_bytes -= entry.size_bytes


def _full(found: list[Entry[T]], full_rows: int, max_rows: int, full_s: float) -> list[Entry[T]]:
    """A batch of those that have time for a full one, if they are enough for half of one; else nothing.

    Whoever has less time is sacrificed: served, it would make the batch small, and so all who come after it
    late as well (the early drop of H. Shen et al., "Nexus", SOSP 2019). It is not for a class behind its own.
    """
    roomy: list[Entry[T]] = []
    rows = rows_of_first = 0
    is_tight = False
    for entry in found:
        if entry.deadline_s < full_s:
            is_tight |= entry.priority == found[0].priority
            continue
        if roomy and rows + entry.rows > max_rows:
            break
        roomy.append(entry)
        rows += entry.rows
        rows_of_first += entry.rows if entry.priority == found[0].priority else 0
    return roomy if 2 * (rows_of_first if is_tight else rows) >= full_rows else []


def _growing(
    found: list[Entry[T]], max_rows: int, now_s: float, service_s: Callable[[int], float], *, probe: bool
) -> list[Entry[T]]:
    """A batch that grows until it is full, the next does not fit, or one in it would miss its deadline."""
    batch: list[Entry[T]] = []
    rows, deadline_s = 0, math.inf
    for entry in found:
        answer_s = now_s + service_s(rows + entry.rows)
        if batch and (rows + entry.rows > max_rows or answer_s > min(deadline_s, entry.deadline_s)):
            break
        if answer_s > entry.deadline_s and not probe:
            continue  # another replica may be in time
        batch.append(entry)
        rows += entry.rows
        deadline_s = max(min(deadline_s, entry.deadline_s), answer_s)
    return batch
