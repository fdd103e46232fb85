from __future__ import annotations

import numpy as np
import pytest

from forescale.engine.serve.balancing import (
    Balancing,
    LeastConnections,
    PowerOfTwo,
    PredictedCompletion,
    ReplicaLoad,
    RoundRobin,
    ServiceTime,
)

LEAD_S = 0.01


def replica(name: str, *, room: int = 2, row_s: float = 0.1, sent: tuple[int, ...] = ()) -> ReplicaLoad:
    """A replica that takes ``row_s`` a row and was given batches at time 0."""
    load = ReplicaLoad(name, max_rows=32)
    for rows in (1, 4, 8):
        load.service.observe(rows, rows * row_s)
    load.credits = room + len(sent)
    for number, rows in enumerate(sent):
        load.send(number, rows, 0.0)
    return load


def chosen(
    policy: Balancing, *replicas: ReplicaLoad, now_s: float = 0.0, rows: int = 1, lead_s: float = LEAD_S
) -> str | None:
    found = policy.choose(replicas, rows, now_s, lead_s)
    return found and found.name


def test_service_time_finds_what_a_batch_and_a_row_cost() -> None:
    service = ServiceTime()
    assert service.predict_s(8) == 0
    for rows in (1, 32, 7, 16):
        service.observe(rows, 0.01 + 0.002 * rows)
    assert service.predict_s(20) == pytest.approx(0.05)


def test_service_time_follows_a_replica_that_slows_down() -> None:
    service = ServiceTime()
    for step in range(400):
        rows = 1 + step % 8
        service.observe(rows, rows * (0.1 if step < 200 else 0.3))
    assert service.predict_s(4) == pytest.approx(1.2, rel=0.02)


def test_service_time_is_sane_when_all_batches_are_alike() -> None:
    service = ServiceTime()
    for _ in range(50):
        service.observe(8, 0.4)
    assert service.predict_s(8) == pytest.approx(0.4)
    assert 0.2 <= service.predict_s(1) < 0.4 < service.predict_s(16) < 0.8


def test_service_time_never_predicts_less_than_nothing() -> None:
    service = ServiceTime()
    for rows, seconds in ((1, 1.0), (2, 0.1), (3, 0.0)):
        service.observe(rows, seconds)
    assert all(service.predict_s(rows) >= 0 for rows in range(1, 100))


def test_a_replica_is_never_given_more_than_its_credits() -> None:
    load = replica("a", room=1)
    load.send(1, 1, 0.0)
    with pytest.raises(ValueError, match="no credit"):
        load.send(2, 1, 0.0)
    load.finish(1, 0.1)
    load.send(2, 1, 0.2)
    with pytest.raises(KeyError):
        load.finish(1, 0.3)


def test_a_busy_replica_is_open_shortly_before_it_is_done() -> None:
    load = replica("a", sent=(4,))
    assert load.free_s(0.0) == pytest.approx(0.4)
    assert not load.is_open(0.3, LEAD_S)
    assert load.is_open(0.395, LEAD_S)
    load.draining = True
    assert not load.is_open(0.395, LEAD_S)


def test_the_batch_behind_counts_from_when_its_turn_came() -> None:
    load = replica("a", sent=(4, 2))
    assert load.free_s(0.1) == pytest.approx(0.6)
    load.finish(0, 0.5)
    assert load.free_s(0.5) == pytest.approx(0.7, abs=0.05)
    load.finish(1, 0.7)
    assert load.service.predict_s(2) == pytest.approx(0.2, abs=0.05)


def test_a_replica_that_is_overdue_looks_worse_and_worse() -> None:
    load = replica("a", sent=(1,))
    assert load.free_s(0.2) == pytest.approx(0.3)
    assert load.free_s(1.1) == pytest.approx(2.1)


def test_round_robin_takes_turns_among_those_that_are_open() -> None:
    policy = RoundRobin()
    replicas = [replica("a"), replica("b", room=0), replica("c")]
    assert [chosen(policy, *replicas) for _ in range(4)] == ["a", "c", "a", "c"]
    assert chosen(policy, replica("b", room=0)) is None


def test_least_connections_counts_rows() -> None:
    policy = LeastConnections()
    assert chosen(policy, replica("a", sent=(2,)), replica("b", sent=(1,)), lead_s=1.0) == "b"
    assert chosen(policy) is None


def test_power_of_two_takes_the_less_loaded_of_two() -> None:
    policy = PowerOfTwo(np.random.default_rng(0))
    replicas = [replica("idle"), replica("busy", sent=(1,)), replica("busier", sent=(1, 1))]
    names = [chosen(policy, *replicas, lead_s=1.0) for _ in range(60)]
    assert set(names) == {"idle", "busy"}
    assert names.count("idle") > names.count("busy")


@pytest.mark.parametrize("now_s", [0.0, 0.2])
def test_predicted_completion_prefers_waiting_for_a_fast_replica(now_s: float) -> None:
    policy = PredictedCompletion()
    fast, slow = replica("fast", sent=(4,), row_s=0.1), replica("slow", row_s=2.0)
    assert chosen(policy, fast, slow, now_s=now_s, rows=4) is None
    assert chosen(policy, fast, slow, now_s=0.395, rows=4) == "fast"


def test_predicted_completion_uses_a_slow_replica_when_the_fast_one_has_enough_to_do() -> None:
    policy = PredictedCompletion()
    fast, slow = replica("fast", room=0, sent=(32, 32), row_s=0.1), replica("slow", row_s=0.3)
    assert chosen(policy, fast, slow, rows=4) == "slow"


def test_predicted_completion_counts_all_that_waits_not_one_batch_of_it() -> None:
    policy = PredictedCompletion()
    fast, slow = replica("fast", sent=(32,), row_s=0.1), replica("slow", row_s=0.4)
    assert chosen(policy, fast, slow, rows=32) is None
    assert chosen(policy, fast, slow, rows=200) == "slow"
    assert chosen(policy, fast, replica("slower", row_s=100.0), rows=10**6) == "slower"


def test_predicted_completion_gives_up_on_a_replica_that_hangs() -> None:
    policy = PredictedCompletion()
    hanging, slow = replica("hanging", sent=(1,), row_s=0.1), replica("slow", row_s=2.0)
    assert chosen(policy, hanging, slow, now_s=0.05) is None
    assert chosen(policy, hanging, slow, now_s=5.0) == "slow"


def test_predicted_completion_tries_who_is_new() -> None:
    new = ReplicaLoad("new", max_rows=8)
    assert chosen(PredictedCompletion(), replica("known"), new) == "known"
    new.credits = 1
    assert chosen(PredictedCompletion(), replica("known"), new) == "new"
