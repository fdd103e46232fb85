"""Differences that are there are found, those that are not are not, however often one looks."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest

from forescale.control.evidence import ALPHA, interval, proven_worse, seems_worse
from forescale.registry.rollout import Counts

BOUNDS_S = (0.01, 0.02, 0.04, 0.08)
LIMITS = {"max_error_fraction": 0.01, "max_slowdown": 1.5}


def counts(ok: int, errors: int = 0, quick: float = 1.0) -> Counts:
    """Answers take 10 ms to 20 ms, but for a fraction that is not quick: those take 40 ms to 80 ms."""
    slow = round(ok * (1.0 - quick))
    return Counts(requests=ok + errors, errors=errors, answers=(0, ok - slow, 0, slow, 0))


def test_an_interval_holds_a_proportion_all_the_time() -> None:
    rng = np.random.default_rng(1)
    missed = 0
    for share in (0.02, 0.3, 0.9):
        for hits in (rng.random((70, 400)) < share).cumsum(axis=1):
            # Looked at after every tenth request.
            looks = [(n + 1, int(hits[n])) for n in range(9, 400, 10)]
            found = [interval(hit, n, alpha=0.1) for n, hit in looks]
            missed += not all(low <= share <= high for low, high in found)
    assert missed <= 0.1 * 210


def test_an_interval_gets_narrow() -> None:
    widths = [high - low for low, high in (interval(n // 10, n, ALPHA) for n in (100, 1000, 10_000, 100_000))]
    assert all(wide > 2.5 * narrow for wide, narrow in pairwise(widths))
    assert interval(0, 0, ALPHA) == (0.0, 1.0)
    assert interval(0, 50, ALPHA)[0] == 0.0
    assert interval(50, 50, ALPHA)[1] == 1.0


def test_a_version_that_fails_is_found_out_with_its_first_requests() -> None:
    needed = next(n for n in range(100) if proven_worse(counts(1000), counts(0, n), BOUNDS_S, **LIMITS))
    assert needed <= 6


def test_more_errors_than_allowed() -> None:
    said = proven_worse(counts(1000, 2), counts(900, 100), BOUNDS_S, **LIMITS)
    assert said == "100 of 1000 requests to the new version got no answer, of the old one's 2 of 1002"
    assert proven_worse(counts(1000, 2), counts(997, 3), BOUNDS_S, **LIMITS) is None
    # Bad luck so far, perhaps.
    assert proven_worse(counts(1000, 2), counts(97, 3), BOUNDS_S, **LIMITS) is None
    assert seems_worse(counts(1000, 2), counts(97, 3), BOUNDS_S, **LIMITS)


def test_errors_that_the_old_version_has_as_well_are_not_held_against_the_new_one() -> None:
    assert proven_worse(counts(700, 300), counts(700, 300), BOUNDS_S, **LIMITS) is None
    assert seems_worse(counts(700, 300), counts(700, 300), BOUNDS_S, **LIMITS) is None


def test_without_an_old_one_errors_alone_count() -> None:
    assert proven_worse(Counts(), counts(900, 100), BOUNDS_S, **LIMITS)
    assert proven_worse(Counts(), counts(1000, quick=0.0), BOUNDS_S, **LIMITS) is None


def test_slow_answers() -> None:
    said = proven_worse(counts(1000), counts(200, quick=0.7), BOUNDS_S, **LIMITS)
    assert (
        said
        == "30% of the new version's answers took longer than 30 ms, 0% of the old one's longer than 20 ms"
    )
    assert proven_worse(counts(1000), counts(1000, quick=0.97), BOUNDS_S, **LIMITS) is None
    assert proven_worse(counts(1000, quick=0.7), counts(200, quick=0.7), BOUNDS_S, **LIMITS) is None
    # Twice to eight times as long; no two bounds tell it from three times.
    assert (
        proven_worse(counts(1000), counts(200, quick=0.7), BOUNDS_S, **{**LIMITS, "max_slowdown": 5.0})
        is None
    )


@pytest.mark.parametrize("share", [0.001, 0.05])
def test_equal_versions_are_seldom_told_apart_by_looking_again_and_again(share: float) -> None:
    rng = np.random.default_rng(2)
    found = 0
    for _ in range(100):
        old, new = ((rng.random(1000) < share).cumsum() for _ in range(2))
        found += any(
            proven_worse(
                counts(n - int(old[n - 1]), int(old[n - 1])),
                counts(n - int(new[n - 1]), int(new[n - 1])),
                BOUNDS_S,
                max_error_fraction=0.0,
                max_slowdown=1.5,
            )
            for n in accumulate([1] * 50, lambda n, _: n + 20)
        )
    assert found <= 2
