"""What batches take with threads that were measured, and with others."""

from __future__ import annotations

import pytest

from forescale.control.capacity import times_with

ONE = ((1.0, 0.1), (4.0, 0.4))


def test_what_was_measured_is_believed() -> None:
    assert times_with({1: ONE, 2: ((1.0, 0.05),)}, 1) == ONE
    assert times_with({}, 3) == ()
    assert times_with({2: ONE}, None) == ONE


def test_sizes_that_were_not_measured_with_these_threads_are_as_much_faster_as_the_others() -> None:
    assert times_with({1: ONE, 2: ((1.0, 0.05),)}, 2) == [(1.0, 0.05), (4.0, pytest.approx(0.2))]


def test_fewer_threads_take_at_most_in_proportion_longer() -> None:
    assert times_with({4: ONE}, 2) == [(1.0, 0.2), (4.0, 0.8)]
    assert times_with({1: ((1.0, 0.3),), 4: ONE}, 2) == [(1.0, 0.2), (4.0, 0.8)]


def test_more_threads_take_what_amdahls_law_says_of_those_measured() -> None:
    assert times_with({1: ONE}, 4) == [(1.0, pytest.approx(0.04)), (4.0, pytest.approx(0.16))]
    half_serial = {1: ((4.0, 1.0),), 2: ((4.0, 0.75),)}
    assert times_with(half_serial, 4) == [(4.0, pytest.approx(0.625))]
    slower = {1: ((4.0, 1.0),), 2: ((4.0, 1.5),)}
    ((_, taken_s),) = times_with(slower, 4)
    assert taken_s >= 1.0
