"""What is asked of each model, and how much that may become while a replica starts. Pure.

One bank of forecasters knows all models. A model keeps its place in it; when none is free, the place of a
model that is gone is used again, or a second bank as large as all before is added.

Axes: N = place in all banks together, L = level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, nan

import numpy as np

from forescale.forecast.bank import ForecasterBank
from forescale.forecast.snapshot import fork

STEP_S = 1.0
LONGEST_LEAD_S = 30.0
_FIRST = 8
_HORIZON_STEPS = (1, 3, 10, 30)
_LEVELS = (0.5, 0.75, 0.9, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class DemandForecast:
    """Values are rows per second, one each ``STEP_S``. Nothing that it was made from is ever changed."""

    _banks: tuple[ForecasterBank, ...] = ()
    _sizes: tuple[int, ...] = ()
    _places: Mapping[str, int] = field(default_factory=dict[str, int])

    def taken_in(self, rates_per_s: Mapping[str, float]) -> DemandForecast:
        """After one more step; NaN where a model's rate is not known."""
        places = dict(self._places)
        size = sum(self._sizes)
        banks, sizes = [fork(bank) for bank in self._banks], list(self._sizes)
        for model in rates_per_s.keys() - places.keys():
            free = set(range(size)) - set(places.values())
            if not free and (gone := next((name for name in places if name not in rates_per_s), None)):
                free.add(places.pop(gone))
            if not free:
                more = size or _FIRST
                banks.append(ForecasterBank(more, STEP_S, _HORIZON_STEPS, _LEVELS))
                sizes.append(more)
                free.add(size)
                size += more
            places[model] = min(free)
        rates_N = np.full(size, nan)
        for model, rate_per_s in rates_per_s.items():
            rates_N[places[model]] = rate_per_s
        for bank, part_N in zip(banks, np.split(rates_N, np.cumsum(sizes)[:-1]), strict=True):
            bank.update(part_N)
        return DemandForecast(tuple(banks), tuple(sizes), places)

    def peaks_per_s(self, leads_s: Mapping[str, float], levels: Sequence[float]) -> dict[str, list[float]]:
        """What each model's demand stays below within its lead time, with probabilities of ``levels``."""
        whole = {model: min(ceil(lead_s), LONGEST_LEAD_S) for model, lead_s in leads_s.items()}
        peaks_NL = {
            lead_s: np.concatenate([bank.predict_peak(lead_s, levels) for bank in self._banks])
            for lead_s in set(whole.values())
        }
        return {model: peaks_NL[lead_s][self._places[model]].tolist() for model, lead_s in whole.items()}
