"""How many replicas it would have been worth to keep."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from forescale.control.hindsight import Hindsight, Look

QUIET = Look(rows=0, elapsed_s=1.0, asked=1, start_s=5.0, capacity_per_s=10.0, latency_s=0.5, most=4)
WORTH = 12.0
BURST = replace(QUIET, rows=40, asked=4)


def seen(*looks: Look, memory_s: float = 50.0) -> Hindsight:
    found = Hindsight()
    for look in looks:
        found = found.after(look, memory_s)
    return found


def test_nothing_is_kept_for_demand_that_is_met() -> None:
    assert Hindsight().best(10.0, WORTH) == (1, 0.0)
    assert seen(*[replace(QUIET, rows=9)] * 100).best(10.0, WORTH) == (1, 0.0)


def test_rows_are_late_that_more_replicas_would_have_answered_in_time() -> None:
    late_N = seen(BURST, memory_s=1e9).late_per_s_N * 1e9
    # Of 40 rows in a second n replicas answer 10 n, and 5 n more in time; the second comes after 5 s.
    came = 1.2
    expected_N = [40.0 - 15.0 * n for n in (came, 2.0)] + [0.0, 0.0]
    assert late_N == pytest.approx(expected_N, rel=1e-6)


def test_kept_are_as_many_as_pay() -> None:
    often, seldom = [BURST, *[QUIET] * 9], [BURST, *[QUIET] * 190]
    assert seen(*often * 10).best(10.0, WORTH)[0] == 3
    assert seen(*often * 10).best(10.0, 0.1)[0] == 1
    assert seen(*seldom * 3).best(10.0, WORTH)[0] == 1


def test_bursts_are_forgotten() -> None:
    kept, late_per_s = seen(*[BURST, *[QUIET] * 9] * 10).best(10.0, WORTH)
    assert kept > 1
    assert late_per_s > 0.0
    assert seen(*[BURST, *[QUIET] * 9] * 10, *[QUIET] * 300).best(10.0, WORTH)[0] == 1


def test_what_is_asked_for_in_time_is_not_kept_as_well() -> None:
    foreseen = [*[replace(QUIET, asked=4)] * 20, BURST]
    assert seen(*foreseen * 5).best(10.0, WORTH)[0] == 1


def test_another_limit_keeps_what_is_known() -> None:
    found = seen(*[BURST, *[QUIET] * 9] * 10)
    fewer = found.after(replace(QUIET, most=2), 50.0)
    assert np.all(fewer.late_per_s_N > 0.0)
    assert fewer.best(10.0, WORTH)[0] == 2
    assert len(fewer.after(replace(QUIET, most=6), 50.0).idle_N) == 6
