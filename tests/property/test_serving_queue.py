"""Nothing is lost, answered twice, or out of order, whatever comes."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

from hypothesis import given
from hypothesis import strategies as st

from forescale.engine.serve.queues import Entry, ModelQueue, QueuePolicy

PUTS = st.tuples(
    st.just("put"),
    st.integers(1, 5),  # rows
    st.sampled_from([1, 1, 1, 2, 7]),  # priority
    st.sampled_from("abc"),  # flow
    st.sampled_from([0, 0, 1]),  # alike
    st.sampled_from([math.inf, math.inf, 0.5, 2.0, 8.0]),  # seconds until its deadline
)
STEPS = st.lists(
    st.one_of(
        PUTS,
        PUTS,
        st.tuples(st.just("take"), st.integers(1, 8), st.sampled_from([0.0, 0.1])),
        st.tuples(st.just("return"), st.booleans()),
        st.tuples(st.just("remove"), st.integers(0, 50)),
        st.tuples(st.just("expire")),
        st.tuples(st.just("wait"), st.floats(0.1, 3.0)),
    ),
    max_size=80,
)


class Run:
    """A queue, and what should be in it."""

    def __init__(self) -> None:
        self.queue: ModelQueue[int] = ModelQueue(QueuePolicy())
        self.now_s = 0.0
        self.waiting: dict[int, Entry[int]] = {}
        self.entries: list[Entry[int]] = []
        self.flows: list[str] = []
        self.taken: list[Entry[int]] = []
        self.left: Counter[int] = Counter()

    def put(self, rows: int, priority: int, flow: str, alike: int, patience_s: float) -> None:
        entry = Entry(
            len(self.entries),
            rows=rows,
            priority=priority,
            alike=alike,
            arrived_s=self.now_s,
            deadline_s=self.now_s + patience_s,
            size_bytes=rows,
        )
        self.queue.put(entry, flow)
        self.entries.append(entry)
        self.flows.append(flow)
        self.waiting[entry.item] = entry

    def take(self, max_rows: int, row_s: float) -> None:
        batch, late = self.queue.take(self.now_s, max_rows=max_rows, service_s=lambda rows: rows * row_s)
        for entry in (*batch, *late):
            assert self.waiting.pop(entry.item) is entry
            self.left[entry.item] += 1
        for entry in late:
            assert self.now_s + entry.rows * row_s > entry.deadline_s or self.now_s >= entry.deadline_s
        rows = sum(entry.rows for entry in batch)
        assert rows <= max_rows or len(batch) == 1
        assert len({entry.alike for entry in batch}) <= 1
        assert all(self.now_s + rows * row_s <= entry.deadline_s for entry in batch)
        if batch:
            # Strict classes: nobody who could have been in time and is left goes before the first one.
            assert batch[0].priority == min(e.priority for e in (*batch, *self.waiting.values()))
        self.check_order(batch, self.now_s + row_s * max_rows)
        self.taken += batch

    def check_order(self, batch: list[Entry[int]], full_s: float) -> None:
        """In a flow of a class, those alike who have time enough leave in the order they came."""
        for entry in batch:
            assert not any(
                other.item < entry.item
                and other.deadline_s >= full_s
                and self.flows[other.item] == self.flows[entry.item]
                and (other.priority, other.alike) == (entry.priority, entry.alike)
                for other in self.waiting.values()
            )

    def give_back(self, alone: bool) -> None:
        if self.taken:
            entry = self.taken.pop()
            self.left[entry.item] -= 1
            self.waiting[entry.item] = entry
            self.queue.put_back(entry, alone=alone)

    def remove(self, item: int) -> None:
        if item < len(self.entries):
            self.queue.remove(self.entries[item])
            if self.waiting.pop(item, None) is not None:
                self.left[item] += 1

    def expire(self) -> None:
        for entry in self.queue.expire(self.now_s):
            assert self.waiting.pop(entry.item) is entry
            assert entry.deadline_s <= self.now_s
            self.left[entry.item] += 1
        assert all(entry.deadline_s > self.now_s for entry in self.waiting.values())

    def check(self) -> None:
        rows = sum(entry.rows for entry in self.waiting.values())
        assert (self.queue.requests, self.queue.rows) == (len(self.waiting), rows)
        assert self.queue.waiting_bytes == rows
        assert self.queue.rows_before(10**6) == rows
        assert self.queue.next_deadline_s() <= min(
            (entry.deadline_s for entry in self.waiting.values()), default=math.inf
        )
        assert (self.queue.due_s() == math.inf) == (not self.waiting)


@given(STEPS)
def test_every_request_leaves_exactly_once_and_in_order(steps: list[tuple]) -> None:
    run = Run()
    for what, *arguments in steps:
        match what:
            case "put":
                run.put(*arguments)
            case "take":
                run.take(*arguments)
            case "return":
                run.give_back(*arguments)
            case "remove":
                run.remove(*arguments)
            case "expire":
                run.expire()
            case "wait":
                run.now_s += arguments[0]
            case _:
                raise AssertionError(what)
        run.check()
    while run.waiting:
        before = len(run.waiting)
        run.take(8, 0.0)
        assert len(run.waiting) < before
    assert all(count == 1 for count in run.left.values())
    assert len(run.left) == len(run.entries)


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 4)), min_size=20, max_size=60),
    st.sampled_from([0.5, 1.0, 4.0]),
)
def test_flows_that_all_wait_get_rows_by_their_weights(puts: list[tuple[str, int]], weight: float) -> None:
    """Goyal et al., theorem 1: weighted service of two flows differs by at most their largest requests."""
    weights = {"a": weight, "b": 1.0}
    queue: ModelQueue[str] = ModelQueue(QueuePolicy(weights=weights))
    left: dict[str, int] = defaultdict(int)
    for flow, rows in puts:
        queue.put(Entry(flow, rows=rows, arrived_s=0.0, deadline_s=math.inf), flow)
        left[flow] += 1
    served: dict[str, float] = defaultdict(float)
    while left["a"] and left["b"]:
        (entry,), _ = queue.take(0.0, max_rows=1, service_s=lambda rows: 0.0)
        served[entry.item] += entry.rows / weights[entry.item]
        left[entry.item] -= 1
        assert abs(served["a"] - served["b"]) <= 4 / weight + 4
