from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import Moment, Targets
from forescale.forecast.members.refitted import RefittedMembers, SlowMembers
from forescale.forecast.refit import SlowModel

TARGETS = Targets(lead_steps_J=np.array([1, 4]), peak_J=np.array([False, True]))
LEVELS = (0.5, 0.9)
BROKEN = 777.0


class ByHand(Executor):
    """Runs what it was given when told to."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: fn(*args, **kwargs)))
        return future

    def work(self) -> None:
        for future, task in self.waiting:
            try:
                future.set_result(task())
            except ValueError as error:
                future.set_exception(error)
        self.waiting = []


@dataclass(frozen=True)
class LastSeen:
    """Says the last value its fit has seen, and how long ago that was."""

    name: str = "last seen"
    history_steps: int = 20

    def fit(self, values_T: Array, targets: Targets, levels: Sequence[float]) -> LastSeenFit:
        if values_T[-1] < 0:
            raise ValueError("cannot fit that")
        return LastSeenFit(float(values_T[-1]))


@dataclass(frozen=True)
class LastSeenFit:
    seen: float

    def quantiles_JL(self, values_T: Array, elapsed: int) -> Array:
        if values_T[-1] == BROKEN:
            raise ValueError("cannot say that")
        return np.array([[self.seen, values_T[-1]], [elapsed, elapsed]])


class Known:
    def __init__(self, values_NT: Array) -> None:
        self._values_NT = values_NT
        self.steps = values_NT.shape[1]

    def last(self, steps: int) -> Array:
        return self._values_NT[:, -steps:].copy()


def moment(values_NT: Array) -> Moment:
    known: Any = Known(values_NT)
    newest = values_NT[:, -1]
    seen = np.full(2, float(values_NT.shape[1]))
    rest: dict[str, Any] = {"observed_N": newest, "values_N": newest, "seen_N": seen, "history": known}
    rest["due_NJ"] = np.full((2, 2), np.nan)
    return Moment(step=values_NT.shape[1], level_N=newest, scale_N=np.array([1.0, 10.0]), **rest)


def refitted(models: Sequence[SlowModel], executor: Executor, **options: Any) -> RefittedMembers:
    return RefittedMembers(2, TARGETS, LEVELS, SlowMembers(models=models, executor=executor, **options))


@pytest.fixture
def values() -> Array:
    return np.array([np.arange(60.0), 100.0 + np.arange(60.0)])


def test_fits_are_begun_in_the_background_and_used_when_done(values: Array) -> None:
    executor = ByHand()
    members = refitted([LastSeen()], executor, every_steps=10)
    members.update(moment(values[:, :20]))
    assert len(executor.waiting) == 2
    members.update(moment(values[:, :21]))
    assert len(executor.waiting) == 2  # one at a time for each series
    executor.work()
    now = moment(values[:, :23])
    members.update(now)
    assert np.array_equal(members.quantiles_NMJL(now)[0, 0], [[19, 22], [3, 3]])
    assert np.array_equal(members.quantiles_NMJL(now)[1, 0], [[119, 122], [3, 3]])


def test_series_are_fitted_anew_when_their_fit_is_old(values: Array) -> None:
    executor = ByHand()
    members = refitted([LastSeen()], executor, every_steps=10)
    begun: list[int] = []
    for steps in range(1, 60):
        members.update(moment(values[:, :steps]))
        if executor.waiting:
            begun.append(steps)
        executor.work()
    assert begun == [16, 26, 36, 46, 56]


def test_before_a_fit_the_level_with_a_spread_that_grows(values: Array) -> None:
    members = refitted([LastSeen(), LastSeen("other")], ByHand())
    now = moment(values[:, :5])
    members.update(now)
    quantiles = members.quantiles_NMJL(now)
    assert members.names == ("last seen", "other")
    assert quantiles.shape == (2, 2, 2, 2)
    assert quantiles[0, 0] == pytest.approx(
        np.array([[4.0, 4.0 + 1.2816], [4.0, 4.0 + 2 * 1.2816]]), abs=1e-3
    )
    assert quantiles[1, 1, 0] == pytest.approx([104.0, 104.0 + 12.816], abs=1e-2)


def test_failed_fit_is_logged_and_the_one_before_stays(values: Array) -> None:
    executor = ByHand()
    members = refitted([LastSeen()], executor, every_steps=5)
    members.update(moment(values[:, :20]))
    executor.work()
    members.update(moment(-values[:, :25]))
    executor.work()
    now = moment(values[:, :26])
    with capture_logs() as logs:
        members.update(now)
    assert [(log["event"], log["model"], log["reason"]) for log in logs] == [
        ("fit_failed", "last seen", "cannot fit that")
    ] * 2
    assert np.array_equal(members.quantiles_NMJL(now)[0, 0], [[19, 25], [6, 6]])
    assert not executor.waiting
    members.update(moment(values[:, :30]))
    assert len(executor.waiting) == 2


def test_a_replay_waits_for_its_fits(values: Array) -> None:
    with ThreadPoolExecutor(1) as executor:
        members = refitted([LastSeen()], executor, waits=True)
        members.update(moment(values[:, :20]))
        assert members.quantiles_NMJL(moment(values[:, :20]))[0, 0, 1, 1] > 19  # of its level, not of a fit
        now = moment(values[:, :21])
        members.update(now)
        assert np.array_equal(members.quantiles_NMJL(now)[0, 0], [[19, 20], [1, 1]])


def test_an_executor_that_was_shut_down_ends_the_fits_and_nothing_else(values: Array) -> None:
    executor = ThreadPoolExecutor(1)
    members = refitted([LastSeen()], executor, every_steps=5, waits=True)
    members.update(moment(values[:, :20]))
    members.update(moment(values[:, :21]))
    executor.shutdown()
    with capture_logs() as logs:
        for steps in range(22, 40):
            members.update(moment(values[:, :steps]))
    assert [log["event"] for log in logs] == ["fits_ended"]
    assert np.array_equal(members.quantiles_NMJL(moment(values[:, :39]))[0, 0], [[19, 38], [19, 19]])


def test_fits_cancelled_by_a_shutdown_are_none(values: Array) -> None:
    executor = ByHand()
    members = refitted([LastSeen()], executor)
    members.update(moment(values[:, :20]))
    for future, _ in executor.waiting:
        future.cancel()
    members.update(moment(values[:, :21]))
    assert members.quantiles_NMJL(moment(values[:, :21]))[0, 0, 0, 0] == 20.0


@pytest.mark.parametrize(("value", "reason"), [(BROKEN, "cannot say that"), (np.nan, "not finite")])
def test_a_fit_whose_forecast_fails_is_dropped(values: Array, value: float, reason: str) -> None:
    executor = ByHand()
    members = refitted([LastSeen()], executor)
    members.update(moment(values[:, :20]))
    executor.work()
    members.update(moment(values[:, :21]))
    now, after = moment(values[:, :21]), values[:, :21].copy()
    after[0, -1] = value
    known: Any = Known(after)
    with capture_logs() as logs:
        quantiles = members.quantiles_NMJL(replace(now, history=known))
    assert [log["event"] for log in logs] == ["fit_failed"]
    assert reason in logs[0]["reason"]
    assert np.isfinite(quantiles).all()
    assert quantiles[0, 0, 0, 0] == 20.0  # the level
    assert quantiles[1, 0, 0, 0] == 119.0  # the other series keeps its fit


def test_a_fit_that_does_not_end_is_reported_once(values: Array) -> None:
    members = refitted([LastSeen()], ByHand(), every_steps=5)
    with capture_logs() as logs:
        for steps in range(16, 50):
            members.update(moment(values[:, :steps]))
    assert [(log["event"], log["steps"]) for log in logs] == [("fit_late", 10)] * 2


def test_what_is_forgotten_is_fitted_anew(values: Array) -> None:
    executor = ByHand()
    members = refitted([LastSeen()], executor)
    members.update(moment(values[:, :50]))
    executor.work()
    members.update(moment(values[:, :51]))
    members.forget()
    now = moment(values[:, :20])  # the past that was restored is another one
    assert members.quantiles_NMJL(now)[0, 0, 0, 0] == 19.0
    members.update(now)
    assert len(executor.waiting) == 2
