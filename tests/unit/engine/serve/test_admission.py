"""What is predicted of a request, and what is learned from those before."""

from __future__ import annotations

import math

import numpy as np
import pytest

from forescale.engine.serve.admission import Admission
from forescale.engine.serve.balancing import ReplicaLoad
from forescale.engine.serve.policy import QueuePolicy
from forescale.engine.serve.queues import Entry, ModelQueue

ROW_S = 0.01


def replica() -> ReplicaLoad:
    """It takes ``ROW_S`` for a row, and is idle."""
    made = ReplicaLoad("r", max_rows=8)
    for rows in (2, 8):
        made.service.observe(rows, rows * ROW_S)
    return made


def entry(priority: int = 1) -> Entry[str]:
    return Entry("request", rows=1, arrived_s=0.0, deadline_s=1.0, priority=priority)


def predicted_s(admission: Admission, asked: Entry[str], waiting: int = 0) -> float:
    queue = ModelQueue[str](QueuePolicy(max_rows=8))
    for _ in range(waiting):
        queue.put(entry())
    return admission.predict_s(asked, queue, [replica()], 8)


def test_nothing_is_predicted_of_replicas_that_nobody_knows() -> None:
    asked = entry()
    new = ReplicaLoad("r", max_rows=8)
    assert Admission().predict_s(asked, ModelQueue(QueuePolicy()), [new], 8) == 0.0
    assert Admission().predict_s(asked, ModelQueue(QueuePolicy()), [], 8) == 0.0
    assert asked.predicted_s == 0.0


def test_what_waits_before_it_takes_its_time() -> None:
    assert predicted_s(Admission(), entry()) == pytest.approx(ROW_S)
    assert predicted_s(Admission(), entry(), waiting=3) == pytest.approx((3 + 4) * ROW_S)


def test_a_class_whose_requests_are_late_gets_a_reserve_up_to_a_bound_and_gives_it_back() -> None:
    admission = Admission()
    late, others = entry(priority=2), entry(priority=1)
    plain_s = predicted_s(admission, late)
    reserves: list[float] = []
    for took_s in [math.inf] * 1000 + [0.0] * 20_000:
        admission.learn(late, took_s)
        reserves.append(predicted_s(admission, late) / plain_s - 1)
    assert 0.9 < max(reserves) <= 1.0 + 1e-9
    assert reserves[-1] == pytest.approx(0.0)
    admission.learn(late, math.inf)
    assert predicted_s(admission, others) == pytest.approx(plain_s)


def test_the_reserve_becomes_what_all_but_a_few_need() -> None:
    admission, asked = Admission(), entry()
    plain_s = predicted_s(admission, asked)
    for excess in np.random.default_rng(0).uniform(0.0, 0.4, 20_000):
        admission.learn(asked, plain_s * (1 + excess))
    assert predicted_s(admission, asked) / plain_s - 1 == pytest.approx(0.4, abs=0.06)


def test_one_of_which_nothing_was_predicted_teaches_nothing() -> None:
    admission, asked = Admission(), entry()
    plain_s = predicted_s(admission, asked)
    admission.learn(entry(), math.inf)
    assert predicted_s(admission, asked) == plain_s
