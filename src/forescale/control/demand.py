"""What is asked of each model, and how much that may become while a replica starts. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, isfinite, nan
from typing import Any, cast

import numpy as np

from forescale.core.errors import InvalidInput
from forescale.forecast.forecaster import Array
from forescale.forecast.named import NamedForecasts
from forescale.forecast.snapshot import Snapshot

STEP_S = 1.0
LONGEST_LEAD_S = 30.0
MINUTE_S = 60.0
_GROWTH = 3.0  # times what was ever asked: forecasts of models that are new say anything
_REMEMBERED_S = 7200.0  # after which a model that nobody asks for is forecast by the second no more
_KNOWN_S = 6 * 86400.0  # after which it is not forecast at all
_TAUGHT_S = 86400.0  # after which minutes say what seconds do not
_RISE = 1.5  # times the minute before: less than that is seen by the second as well, and better
_SHARE = 0.9  # of a minute's seconds that stay below its value; so does the highest of three with 73%
_SECONDS = NamedForecasts(step_s=STEP_S, horizon_steps=(1, 3, 10, 30))
_MINUTES = NamedForecasts(step_s=MINUTE_S, horizon_steps=(1, 2))


@dataclass(frozen=True, slots=True)
class Asked:
    """What a model was asked for: the most, and when there was anything at first and last."""

    highest_per_s: float
    first_s: float
    last_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Minute:
    """Its seconds so far.

    Attributes:
        number: since the Unix epoch; None: none has begun.
        seconds: that are known.
        busy: of each model, those of them in which it was asked, as rows.
    """

    number: int | None = None
    seconds: int = 0
    busy: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])

    def taken_in(self, rates_per_s: Mapping[str, float]) -> Minute:
        came = {name: (*self.busy.get(name, ()), rate) for name, rate in rates_per_s.items() if rate > 0.0}
        return replace(self, seconds=self.seconds + 1, busy={**self.busy, **came})

    def values(self, models: Iterable[str]) -> dict[str, float]:
        """What most of its seconds stayed below, of each model; NaN if less than half of them are known."""
        if self.seconds < 0.5 * MINUTE_S / STEP_S:
            return dict.fromkeys(models, nan)
        above = int((1.0 - _SHARE) * self.seconds)  # seconds that may be busier
        found = ((model, sorted(self.busy.get(model, ()), reverse=True)) for model in models)
        return {model: busy[above] if above < len(busy) else 0.0 for model, busy in found}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandForecast:
    """Rows per second, a value each ``STEP_S``. Nothing that it was made from is ever changed.

    Seconds are remembered for two hours, which no day fits in. So what nine of ten seconds of a minute stayed
    below is remembered for five days, and forecast from what it was at the same time of other days and hours.
    It counts where it is far above the minute before, as when work begins in the morning.

    Of thousands of models most sleep: those that nobody has asked for in two hours are forecast by the minute
    alone.

    Attributes:
        epoch_s: what ``now_s`` was, as it is told, when the Unix epoch began. What is known holds times since
            then: it may be taken up by another process.
    """

    epoch_s: float = 0.0
    _asked: Mapping[str, Asked] = field(default_factory=dict[str, Asked])
    _seconds: NamedForecasts = _SECONDS
    _minutes: NamedForecasts = _MINUTES
    _before: Mapping[str, float] = field(default_factory=dict[str, float])  # the last whole minute
    _minute: Minute = field(default_factory=Minute)
    _taken_s: float = 0.0

    def __contains__(self, model: str) -> bool:
        """Whether it was asked for in the last days, and so must be told of."""
        return model in self._asked

    def taken_in(self, rates_per_s: Mapping[str, float], now_s: float) -> DemandForecast:
        """After one more step; NaN where a model's rate is not known. Models that are not told are gone."""
        at_s = now_s - self.epoch_s
        asked = dict[str, Asked]()
        for model, rate_per_s in rates_per_s.items():
            known = self._asked.get(model)
            if rate_per_s > 0.0:
                known = known or Asked(0.0, at_s, at_s)
                asked[model] = Asked(max(rate_per_s, known.highest_per_s), known.first_s, at_s)
            elif known and at_s - known.last_s < _KNOWN_S:
                asked[model] = known
        awake = {name: rates_per_s[name] for name, one in asked.items() if at_s - one.last_s < _REMEMBERED_S}
        minutes, before, minute = self._minutes, self._before, self._minute
        if (number := int(at_s // MINUTE_S)) != minute.number:
            if minute.number is not None:
                before = minute.values(asked)
                minutes = minutes.taken_in(before).skipped(max(0, number - minute.number - 1))
            minute = Minute(number=number)
        return replace(
            self,
            _asked=asked,
            _seconds=self._seconds.taken_in(awake) if awake else self._seconds,
            _minutes=minutes,
            _before=before,
            _minute=minute.taken_in(awake),
            _taken_s=at_s,
        )

    def peaks_per_s(self, leads_s: Mapping[str, float], levels: Sequence[float]) -> dict[str, list[float]]:
        """What the demand of models that are known stays below within its lead time.

        Args:
            levels: with which probabilities; ascending.
        """
        awake, taught = defaultdict[int, list[str]](list), defaultdict[int, list[str]](list)
        for model, lead_s in leads_s.items():
            asked = self._asked.get(model)
            if asked and self._taken_s - asked.last_s < _REMEMBERED_S:
                awake[ceil(min(lead_s, LONGEST_LEAD_S))].append(model)
            if asked and self._taken_s - asked.first_s >= _TAUGHT_S:
                ends_s = self._taken_s % MINUTE_S + min(lead_s, LONGEST_LEAD_S)
                taught[ceil(ends_s / MINUTE_S)].append(model)
        peaks = dict[str, Array]()
        for lead_s, models in awake.items():
            peaks |= self._seconds.peaks(lead_s, levels, models)
        for lead, models in taught.items():
            for model, peaks_L in self._minutes.peaks(lead * MINUTE_S, levels, models).items():
                if not peaks_L[-1] <= _RISE * self._before.get(model, nan):
                    peaks[model] = np.maximum(peaks.get(model, 0.0), peaks_L)
        return {
            model: peaks_L.clip(max=self._asked[model].highest_per_s * _GROWTH).tolist()
            for model, peaks_L in peaks.items()
        }

    def state(self, most_bytes: int) -> dict[str, Any]:
        """A snapshot, arrays and JSON values in nested dictionaries, of no more than about so many bytes."""
        asked = {model: [one.highest_per_s, one.first_s, one.last_s] for model, one in self._asked.items()}
        return {
            "taken_s": self._taken_s,
            "minute": self._minute.number,
            "asked": asked,
            "seconds": self._seconds.state(most_bytes // 2),
            "minutes": self._minutes.state(most_bytes // 2),
        }

    def restored(self, state: Snapshot, now_s: float) -> DemandForecast:
        """What a snapshot holds, after the time since then, of which nothing is known.

        Raises:
            InvalidInput: it is none.
        """
        at_s = now_s - self.epoch_s
        try:
            elapsed_s = max(0.0, at_s - float(state["taken_s"]))
            number = int(at_s // MINUTE_S)
            missed = 0 if state["minute"] is None else max(0, number - int(state["minute"]))
            asked = {
                model: Asked(float(highest_per_s), float(first_s), min(float(last_s), at_s))
                for model, (highest_per_s, first_s, last_s) in cast(Snapshot, state["asked"]).items()
            }
            seconds, minutes = _SECONDS.restored(state["seconds"]), _MINUTES.restored(state["minutes"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(f"this is no state of forecasts: {error!r}") from error
        if not all(isfinite(one.highest_per_s) for one in asked.values()) or not isfinite(elapsed_s):
            raise InvalidInput("this is no state of forecasts: it has values that are no numbers")
        return replace(
            self,
            _asked=asked,
            _seconds=seconds.skipped(round(elapsed_s / STEP_S)) if elapsed_s < _REMEMBERED_S else _SECONDS,
            _minutes=minutes.skipped(missed),
            _minute=Minute(number=number),
            _taken_s=at_s,
        )
