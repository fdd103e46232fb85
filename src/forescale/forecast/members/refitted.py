"""Slow models as members of a bank: fitted in the background, never while a forecast is waited for.

Axes: N = series, M = forecast of the family, J = target, L = level.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from importlib import import_module
from statistics import NormalDist

import numpy as np

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import Moment, Targets
from forescale.forecast.refit import FEW, Fit, SlowModel

_LATE = 2  # times as long as a fit may be old, after which one that is under way is reported


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowMembers:
    """Models to be members of a bank, and who fits them when.

    Attributes:
        models: one for each member.
        executor: threads or processes of the caller's, who shuts them down; fits beyond their number wait.
            `forescale.forecast.background` has processes that suit.
        every_steps: values after which a series is fitted anew.
        waits: whether the value after the one that a fit was begun with waits for it, as one wants it where
            the past is replayed in a moment; else a fit counts from when it happens to be done.
    """

    models: Sequence[SlowModel]
    executor: Executor
    every_steps: int = 60
    waits: bool = False


@dataclass(slots=True)
class _Slot:
    """The newest fit of a model to a series, and the one under way."""

    begun: int | None = None  # step at which the last fit was begun
    underway: Future[Fit] | None = None
    fit: Fit | None = None
    fitted: int = 0  # step of the last value it has seen
    late: bool = False  # the one under way was reported

    def take(self, name: str, *, waits: bool) -> None:
        """Go over to the fit under way if it is done; the one before stays if it failed."""
        if not self.underway or not (waits or self.underway.done()):
            return
        done, self.underway, self.late = self.underway, None, False
        if done.cancelled():
            return
        if error := done.exception():
            _report("fit_failed", model=name, reason=str(error))
            return
        assert self.begun is not None
        self.fit, self.fitted = done.result(), self.begun

    def quantiles_JL(self, name: str, values_T: Array, step: int) -> Array | None:
        """What the fit says; None if there is none. One that fails is dropped."""
        if not self.fit:
            return None
        try:
            found_JL = self.fit.quantiles_JL(values_T, step - self.fitted)
        except Exception as error:  # noqa: BLE001 - whatever a model does, a forecast is waited for
            reason = str(error)
        else:
            if np.isfinite(found_JL).all():
                return found_JL
            reason = "its forecast is not finite"
        self.fit = None
        _report("fit_failed", model=name, reason=reason)
        return None

    def is_due(self, step: int, every_steps: int) -> bool:
        return not self.underway and (self.begun is None or step - self.begun >= every_steps)

    def watch(self, name: str, step: int, every_steps: int) -> None:
        """Report, once, a fit that does not end."""
        if self.underway and self.begun is not None and step - self.begun >= _LATE * every_steps:
            if not self.late:
                _report("fit_late", model=name, steps=step - self.begun)
            self.late = True


class RefittedMembers:
    """One member for each slow model.

    Fits are not kept in the bank's state: after a restart a member forecasts the local level, with a spread
    that grows with the square root of the lead time, as it does before the first fit is done. A fit
    that fails is logged, and tried again when the next is due. Once the executor takes none any more, because
    it was shut down or its processes died, the last fits stay.

    Args:
        series: how many series there are.
        targets: what is forecast.
        levels: quantile levels.
        slow: the models.
    """

    learned: tuple[str, ...] = ()

    def __init__(self, series: int, targets: Targets, levels: Sequence[float], slow: SlowMembers) -> None:
        self._targets = targets
        self._levels = tuple(levels)
        self._models = tuple(slow.models)
        self._slow = slow
        self._ended = False  # the executor takes no more fits
        import_module("structlog")  # takes 0.3 s, which no decision should wait for when it has to report
        self._slots_NM = [[_Slot() for _ in self._models] for _ in range(series)]
        self._spread_JL = np.sqrt(targets.lead_steps_J)[:, None] * [NormalDist().inv_cdf(q) for q in levels]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(model.name for model in self._models)

    def forget(self) -> None:
        """Drop all fits: the values to come follow others than they were made of."""
        self._slots_NM = [[_Slot() for _ in self._models] for _ in self._slots_NM]

    def update(self, now: Moment) -> None:
        if now.history.steps < FEW:
            return
        for m, model in enumerate(self._models):
            slots_N = [slots_M[m] for slots_M in self._slots_NM]
            for slot in slots_N:
                slot.take(model.name, waits=self._slow.waits)
                slot.watch(model.name, now.step, self._slow.every_steps)
            due = [n for n, slot in enumerate(slots_N) if slot.is_due(now.step, self._slow.every_steps)]
            if due and not self._ended:
                self._begin(model, slots_N, due, now)

    def quantiles_NMJL(self, now: Moment, upcoming_NJK: Array | None = None) -> Array:  # noqa: ARG002 - the protocol's
        level_N11, scale_N11 = now.level_N[:, None, None], now.scale_N[:, None, None]
        unfitted_NJL = level_N11 + scale_N11 * self._spread_JL
        quantiles_NMJL = np.repeat(unfitted_NJL[:, None], len(self._models), axis=1)
        for m, model in enumerate(self._models):
            fitted = [n for n, slots_M in enumerate(self._slots_NM) if slots_M[m].fit]
            values_NT = now.history.last(model.history_steps) if fitted else np.empty((0, 0))
            for n in fitted:
                found_JL = self._slots_NM[n][m].quantiles_JL(model.name, values_NT[n], now.step)
                if found_JL is not None:
                    quantiles_NMJL[n, m] = found_JL
        return quantiles_NMJL

    def _begin(self, model: SlowModel, slots_N: Sequence[_Slot], due: Sequence[int], now: Moment) -> None:
        values_NT = now.history.last(model.history_steps)
        for n in due:
            try:
                fit = self._slow.executor.submit(model.fit, values_NT[n].copy(), self._targets, self._levels)
            except RuntimeError as error:  # it was shut down, or its processes died
                self._ended = True
                _report("fits_ended", reason=str(error))
                return
            slots_N[n].underway, slots_N[n].begun = fit, now.step


def _report(event: str, **facts: str | int) -> None:
    import structlog  # noqa: PLC0415 - only those who have slow models need it

    structlog.get_logger().warning(event, **facts)
