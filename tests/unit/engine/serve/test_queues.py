from __future__ import annotations

import math
from typing import Any

import pytest

from forescale.engine.serve.queues import Entry, ModelQueue, QueuePolicy


def entry(name: str, **changed) -> Entry[str]:
    fields: dict[str, Any] = {"rows": 1, "arrived_s": 0.0, "deadline_s": math.inf, "priority": 1, **changed}
    return Entry(name, **fields)


def queue(*entries: Entry[str], flow: str = "", **policy) -> ModelQueue[str]:
    made: ModelQueue[str] = ModelQueue(QueuePolicy(**policy))
    for waiting in entries:
        made.put(waiting, flow)
    return made


def take(waiting: ModelQueue[str], now_s: float = 0.0, *, max_rows: int = 4, row_s: float = 0.0, **more):
    batch, late = waiting.take(now_s, max_rows=max_rows, service_s=lambda rows: rows * row_s, **more)
    return [e.item for e in batch], [e.item for e in late]


def test_a_batch_is_filled_in_order() -> None:
    waiting = queue(*map(entry, "abcde"))
    assert take(waiting) == (["a", "b", "c", "d"], [])
    assert take(waiting) == (["e"], [])
    assert take(waiting) == ([], [])


def test_a_request_that_does_not_fit_is_not_overtaken() -> None:
    waiting = queue(entry("a", rows=2), entry("b", rows=3), entry("c"))
    assert take(waiting) == (["a"], [])
    assert take(waiting) == (["b", "c"], [])


def test_a_class_goes_before_all_behind_it_which_fill_what_is_left() -> None:
    waiting = queue(entry("low", priority=9), entry("high"), entry("middle", priority=5, rows=2))
    assert take(waiting, max_rows=3)[0] == ["high", "middle"]
    assert take(waiting)[0] == ["low"]


def test_requests_of_other_lengths_do_not_share_a_batch() -> None:
    waiting = queue(entry("a", alike=8), entry("b", alike=16), entry("c", alike=8))
    assert take(waiting)[0] == ["a", "c"]
    assert take(waiting)[0] == ["b"]


def test_a_flood_of_one_client_does_not_hold_up_another() -> None:
    waiting = queue(*(entry(f"flood{n}") for n in range(100)), flow="flood")
    waiting.put(entry("other0"), "other")
    waiting.put(entry("other1"), "other")
    assert take(waiting)[0] == ["flood0", "other0", "flood1", "other1"]


def test_weights_share_out_rows() -> None:
    waiting = queue(weights={"big": 3.0})
    for n in range(40):
        waiting.put(entry(f"big{n}"), "big")
        waiting.put(entry(f"small{n}"), "small")
    served = take(waiting, max_rows=40)[0]
    assert sum(name.startswith("big") for name in served) == 30


def test_a_client_that_was_away_saves_up_nothing() -> None:
    waiting = queue(*(entry(f"a{n}") for n in range(8)), flow="a")
    take(waiting)
    for n in range(4):
        waiting.put(entry(f"b{n}"), "b")
    assert take(waiting)[0] == ["b0", "a4", "b1", "a5"]


def test_the_forgotten_flows_of_a_busy_queue_are_not_kept() -> None:
    waiting = queue()
    waiting.put(entry("first"), "first")
    for n in range(11_000):
        waiting.put(entry(str(n)), f"client {n}")
        take(waiting, max_rows=1)
    assert len(waiting._classes[1].finish_tags) == 10_000


def test_who_cannot_be_in_time_is_told_at_once() -> None:
    waiting = queue(entry("late", deadline_s=1.0), entry("tight", deadline_s=3.0), entry("ok"))
    assert take(waiting, row_s=2.0) == (["tight"], ["late"])
    assert take(waiting, row_s=2.0) == (["ok"], [])


def test_a_batch_grows_only_while_all_in_it_are_in_time() -> None:
    waiting = queue(*(entry(name, deadline_s=2.5) for name in "abcd"))
    assert take(waiting, row_s=1.0) == (["a", "b"], [])
    assert take(waiting, 1.0, row_s=1.0) == (["c"], [])


def test_who_has_time_only_for_a_small_batch_does_not_make_all_others_late() -> None:
    waiting = queue(entry("tight", deadline_s=1.5), *(entry(name, deadline_s=9.0) for name in "abcd"))
    assert take(waiting, row_s=1.0) == (["a", "b", "c", "d"], [])
    assert take(waiting, 4.0, row_s=1.0) == ([], ["tight"])


def test_nobody_is_sacrificed_to_a_class_behind() -> None:
    waiting = queue(entry("tight", deadline_s=1.5), *(entry(name, priority=2) for name in "abcd"))
    assert take(waiting, row_s=1.0) == (["tight"], [])
    assert take(waiting, row_s=1.0) == (["a", "b", "c", "d"], [])


def test_who_is_late_here_but_not_elsewhere_stays() -> None:
    waiting = queue(entry("tight", deadline_s=1.0), entry("roomy", deadline_s=9.0))
    soon: dict[str, Any] = {"soonest_s": lambda rows: 0.1}
    assert take(waiting, row_s=2.0, **soon) == (["roomy"], [])
    assert take(waiting, row_s=2.0, **soon) == ([], [])
    assert waiting.requests == 1
    assert take(waiting, row_s=0.1) == (["tight"], [])


def test_a_probe_tries_what_the_prediction_calls_hopeless() -> None:
    waiting = queue(entry("a", deadline_s=1.0), entry("b", deadline_s=1.0))
    assert take(waiting, row_s=5.0, probe=True) == (["a"], ["b"])
    waiting = queue(entry("over", deadline_s=1.0))
    assert take(waiting, 1.0, probe=True) == ([], ["over"])


def test_what_is_put_back_keeps_its_place() -> None:
    waiting = queue(*map(entry, "abc"))
    batch, _ = waiting.take(0.0, max_rows=1, service_s=lambda rows: 0.0)
    waiting.put_back(batch[0], alone=False)
    assert take(waiting)[0] == ["a", "b", "c"]


def test_what_is_put_back_alone_shares_no_batch() -> None:
    waiting = queue(*map(entry, "abc"))
    batch, _ = waiting.take(0.0, max_rows=2, service_s=lambda rows: 0.0)
    for taken in batch:
        waiting.put_back(taken, alone=True)
    assert [take(waiting)[0] for _ in range(3)] == [["a"], ["b"], ["c"]]


def test_expired_requests_leave_wherever_they_stand() -> None:
    waiting = queue(entry("a"), entry("b", deadline_s=1.0, priority=7), entry("c", deadline_s=2.0, rows=3))
    assert waiting.next_deadline_s() == 1.0
    assert [e.item for e in waiting.expire(1.5)] == ["b"]
    assert (waiting.requests, waiting.rows) == (2, 4)
    assert take(waiting)[0] == ["a", "c"]
    assert waiting.expire(9.0) == []


def test_who_is_taken_and_put_back_can_still_expire_once() -> None:
    one = entry("a", deadline_s=1.0)
    waiting = queue(one)
    take(waiting)
    waiting.put_back(one, alone=True)
    assert [e.item for e in waiting.expire(1.0)] == ["a"]
    assert waiting.requests == 0


def test_a_removed_request_is_gone() -> None:
    entries = list(map(entry, "abc"))
    waiting = queue(*entries)
    waiting.remove(entries[1])
    waiting.remove(entries[1])
    assert take(waiting)[0] == ["a", "c"]
    assert waiting.requests == 0


def test_requests_that_expire_behind_a_busy_class_take_no_memory() -> None:
    waiting = queue(entry("kept", priority=2))
    for n in range(1000):
        waiting.put(entry(str(n), priority=2, deadline_s=float(n)))
        waiting.expire(float(n))
    assert sum(map(len, waiting._classes[2].lines.values())) < 200
    for _ in range(1000):
        waiting.put(entry("top", deadline_s=1e9))
        take(waiting, max_rows=1)
    assert len(waiting._deadlines) < 200


def test_batches_wait_for_company_only_as_long_as_told() -> None:
    assert queue().due_s() == math.inf
    assert queue(entry("a", arrived_s=5.0)).due_s() == -math.inf
    waiting = queue(entry("a", arrived_s=5.0), max_wait_s=0.25, max_rows=3)
    assert waiting.due_s() == 5.25
    waiting.put(entry("b", arrived_s=5.1, rows=2))
    assert waiting.due_s() == -math.inf


def test_the_room_for_requests_and_bytes_ends() -> None:
    waiting = queue(max_requests=2, max_waiting_bytes=100)
    assert waiting.has_room(100)
    waiting.put(entry("a", size_bytes=60))
    assert (waiting.has_room(40), waiting.has_room(41)) == (True, False)
    waiting.put(entry("b"))
    assert not waiting.has_room(0)
    take(waiting)
    assert waiting.has_room(100)


def test_rows_before_counts_this_class_and_those_ahead() -> None:
    waiting = queue(entry("a", rows=2), entry("b", priority=2), entry("c", priority=3, rows=7))
    assert [waiting.rows_before(priority) for priority in (1, 2, 3)] == [2, 3, 10]


def with_others_ahead(seconds: float) -> ModelQueue[str]:
    """2,000 rows wait, and 500 a second of a class ahead have come and gone for so long."""
    waiting = queue(*(entry("low", priority=2, rows=500) for _ in range(4)))
    for n in range(int(500 * seconds)):
        waiting.put(entry("high", priority=1, arrived_s=n / 500))
        waiting.take(n / 500, max_rows=1, service_s=lambda rows: 0.0)
    return waiting


def test_the_wait_counts_those_ahead_who_are_still_to_come() -> None:
    assert with_others_ahead(0.0).wait_s(2, 1000.0, 0.0) == 2.0
    waiting = with_others_ahead(12.0)
    assert waiting.wait_s(1, 1000.0, 12.0) == 0.0
    assert 4.0 < waiting.wait_s(2, 1000.0, 12.0) < 4.6  # a few more may come than did
    assert waiting.wait_s(2, 500.0, 12.0) > 100
    assert 2.0 <= waiting.wait_s(2, 1000.0, 30.0) < 2.01  # they come no more


@pytest.mark.parametrize("seconds", [0.05, 0.2, 1.0])
def test_those_ahead_who_have_just_begun_to_come_are_expected_to_go_on(seconds: float) -> None:
    waiting = with_others_ahead(seconds)
    assert 3.9 < waiting.wait_s(2, 1000.0, seconds) < 8.0
    for n in range(int(500 * seconds)):  # and anew after a silence
        waiting.put(entry("high", priority=1, arrived_s=60 + n / 500))
        waiting.take(60 + n / 500, max_rows=1, service_s=lambda rows: 0.0)
    assert 3.9 < waiting.wait_s(2, 1000.0, 60 + seconds) < 8.0
