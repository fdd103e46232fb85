"""Slow models as members of a bank: fitted in the background, never while a forecast is waited for.

Axes: N = series, M = forecast of the family, J = target, L = level.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import Moment, Targets
from forescale.forecast.refit import FEW, Fit, SlowModel


@dataclass(slots=True)
class _Slot:
    """The newest fit of a model to a series, and the one under way."""

    begun: int | None = None  # step at which the last fit was begun
    underway: Future[Fit] | None = None
    fit: Fit | None = None
    fitted: int = 0  # step of the last value it has seen

    def take(self, name: str) -> None:
        """Go over to the fit under way if it is done; the one before stays if it failed."""
        if not self.underway or not self.underway.done():
            return
        error = self.underway.exception()
        if error:
            import structlog  # noqa: PLC0415 - a failed fit is rare, its import is not free

            structlog.get_logger().warning("fit_failed", model=name, reason=str(error))
        else:
            assert self.begun is not None
            self.fit, self.fitted = self.underway.result(), self.begun
        self.underway = None

    def is_due(self, step: int, every_steps: int) -> bool:
        return not self.underway and (self.begun is None or step - self.begun >= every_steps)


class RefittedMembers:
    """One member for each slow model.

    Fits are not kept in the bank's state: after a restart a member forecasts the local level, with a spread
    that grows with the square root of the lead time, as it does before the first fit is done. A fit
    that fails is logged, and tried again when the next is due.

    Args:
        series: how many series there are.
        targets: what is forecast.
        levels: quantile levels.
        models: one for each member.
        executor: threads or processes of the caller's, who shuts them down; fits beyond their number wait.
        every_steps: values after which a series is fitted anew.
    """

    learned: tuple[str, ...] = ()

    def __init__(
        self,
        series: int,
        targets: Targets,
        levels: Sequence[float],
        models: Sequence[SlowModel],
        executor: Executor,
        *,
        every_steps: int = 60,
    ) -> None:
        self._targets = targets
        self._levels = tuple(levels)
        self._models = tuple(models)
        self._executor = executor
        self._every = every_steps
        self._slots_NM = [[_Slot() for _ in self._models] for _ in range(series)]
        self._spread_JL = np.sqrt(targets.lead_steps_J)[:, None] * [NormalDist().inv_cdf(q) for q in levels]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(model.name for model in self._models)

    def update(self, now: Moment) -> None:
        if now.history.steps < FEW:
            return
        for m, model in enumerate(self._models):
            slots_N = [slots_M[m] for slots_M in self._slots_NM]
            for slot in slots_N:
                slot.take(model.name)
            due = [n for n, slot in enumerate(slots_N) if slot.is_due(now.step, self._every)]
            values_NT = now.history.last(model.history_steps) if due else np.empty((0, 0))
            for n in due:
                fit = self._executor.submit(model.fit, values_NT[n].copy(), self._targets, self._levels)
                slots_N[n].underway, slots_N[n].begun = fit, now.step

    def quantiles_NMJL(self, now: Moment, upcoming_NJK: Array | None = None) -> Array:  # noqa: ARG002 - the protocol's
        level_N11, scale_N11 = now.level_N[:, None, None], now.scale_N[:, None, None]
        unfitted_NJL = level_N11 + scale_N11 * self._spread_JL
        quantiles_NMJL = np.repeat(unfitted_NJL[:, None], len(self._models), axis=1)
        for m, model in enumerate(self._models):
            values_NT = now.history.last(model.history_steps)
            for n, slots_M in enumerate(self._slots_NM):
                fit = slots_M[m].fit
                if fit:
                    elapsed = now.step - slots_M[m].fitted
                    quantiles_NMJL[n, m] = fit.quantiles_JL(values_NT[n], elapsed)
        return quantiles_NMJL
