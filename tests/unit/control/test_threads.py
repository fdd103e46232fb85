"""More threads or more replicas, case by case."""

from __future__ import annotations

from dataclasses import replace

import pytest

from forescale.control.capacity import BatchTimes, ThreadTimes
from forescale.control.scale import Load, ScalingRules, ScalingState
from forescale.control.scaling import step
from forescale.control.threads import Cores, Want, batch_rows, choose
from forescale.registry.records import DeploymentSpec

ROW_S = 0.01
ONE = ((1.0, ROW_S), (16.0, 16 * ROW_S))
WANT = Want(
    times={1: ONE},
    max_rows=16,
    latency_s=0.5,
    demand_per_s=150.0,
    least=1,
    most=4,
    most_threads=8,
    cores=8,
    start_s=5.0,
    start_core_s=5.0,
    withheld_cores=0.1,
    late_worth=6.0,
    horizon_s=30.0,
)


def faster(times: float) -> tuple[tuple[float, float], ...]:
    return tuple((rows, seconds / times) for rows, seconds in ONE)


def test_the_next_step_is_tried_first_and_the_reason_says_what_it_was_compared_with() -> None:
    assert choose(1, 1, replace(WANT, demand_per_s=1000.0))[0] == 2
    threads, reason = choose(1, 1, WANT)
    assert threads == 2
    assert reason == "for 30 s 1 replica of 2 threads cost 57 core-s, 2 replicas of 1 thread cost 71 core-s"


@pytest.mark.parametrize(
    ("changed", "threads"),
    [
        ({}, 2),
        ({"demand_per_s": 90.0}, 1),  # it does enough
        (
            {"start_s": 0.05, "start_core_s": 0.1, "withheld_cores": 0.0},
            1,
        ),  # a replica is nearly as soon there
        ({"start_s": 0.05, "start_core_s": 0.1, "withheld_cores": 1.0}, 2),  # but takes memory
        ({"most": 1, "start_s": 0.05, "withheld_cores": 0.0}, 2),  # and may not come
        ({"most_threads": 1}, 1),
        (
            {"latency_s": 0.035},
            1,
        ),  # single rows are just in time, and would not be if they took twice as long
        ({"times": {1: ONE, 2: ONE}}, 1),  # that did not help
        ({"times": {1: ONE, 2: faster(1.9)}}, 2),
        ({"times": {1: ONE, 2: faster(1.2), 4: faster(3.9)}}, 4),
        ({"latency_s": 0.0045}, 8),  # only with all of them may single rows be in time
        ({"latency_s": 0.004, "most_threads": 4}, 4),  # with none; then it is as little late as can be
    ],
)
def test_the_cheapest_is_taken(changed: dict[str, object], threads: int) -> None:
    assert choose(1, 1, replace(WANT, **changed))[0] == threads  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("demand_per_s", "threads"), [(150.0, 2), (90.0, 2), (75.0, 1), (0.0, 1)])
def test_fewer_threads_must_do_a_fifth_more_than_is_needed(demand_per_s: float, threads: int) -> None:
    want = replace(WANT, times={1: ONE, 2: faster(1.6)}, demand_per_s=demand_per_s)
    assert choose(2, 1, want)[0] == threads


def test_threads_are_given_back_where_others_need_the_cores() -> None:
    want = replace(WANT, times={1: ONE, 4: faster(3.0)}, most_threads=2)
    assert choose(4, 1, want) == (2, "others are busy on its cores, but for 2 each")


def test_batches_of_a_trial_are_in_time_though_they_take_twice_as_long() -> None:
    assert batch_rows({1: ONE}, 1, 32, 0.5) == 16
    assert batch_rows({1: ONE}, 2, 32, 0.5) == 8
    assert batch_rows({1: ONE, 2: faster(1.6)}, 2, 32, 0.5) == 32
    assert batch_rows({}, 2, 32, 0.5) is None


def test_what_one_model_takes_another_cannot() -> None:
    free = Cores({"cpu0": 4, "cpu1": 4}, [("a", 0.2, {"cpu0": 1}), ("b", 0.9, {"cpu0": 1, "cpu1": 2})])
    assert free.room("a") == (3, 3 + 2)
    free.take("b", 2.0, {"cpu0": 1})
    assert free.room("a") == (2, 2 + 4)
    assert free.room("c") == (4, 2 + 4)  # it has no replica yet, and would be put where most is free


def loads(now_s: float, *models: str, times: ThreadTimes) -> list[Load]:
    """Each has one replica, and is asked for 1,000 rows/s; the first class comes last."""
    return [
        Load(
            spec=DeploymentSpec(model=name, number=1, priority=len(models) - place),
            arrived_rows=round(1000 * now_s),
            waiting_rows=0,
            batch_times=times,
            max_rows=16,
            ready=1,
            start_s=1.0,
            busy_core_s=now_s,
            replicas={"cpu0": 1},
        )
        for place, name in enumerate(models)
    ]


def test_who_is_first_in_a_look_takes_cores_that_the_next_one_does_not_have() -> None:
    state = ScalingState()
    for now_s in (0.0, 1.0):
        each = loads(now_s, "last", "first", times={1: ONE})
        state, _ = step(state, each, now_s, 1, ScalingRules(), cores={"cpu0": 3})
    assert {name: scale.threads for name, scale in state.models.items()} == {"first": 2, "last": 1}


def test_what_came_of_threads_is_seen_before_they_are_changed_again() -> None:
    state, seen = ScalingState(), list[int | None]()
    times: dict[int, BatchTimes] = {1: ONE}
    for now_s in (0.0, 1.0, 2.0, 3.0, 4.0, 5.0):
        each = loads(now_s, "m", times=times)
        state, _ = step(state, each, now_s, 1, ScalingRules(), cores={"cpu0": 8})
        seen.append(state.models["m"].threads)
        if seen[-1] == 2:
            times[2], times[4] = faster(1.9), faster(3.6)
    assert seen == [1, 2, 2, 8, 8, 8]
