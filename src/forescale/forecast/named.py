"""Forecasts of series that have names, and come and go.

A series keeps its place in a bank of forecasters; when none is free, the place of one that is gone is used
again, or a second bank as large as all before is added.

Axes: N = place in all banks together, L = level.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import nan
from typing import Any, cast

import numpy as np

from forescale.core.errors import InvalidInput
from forescale.forecast.bank import ForecasterBank
from forescale.forecast.forecaster import Array
from forescale.forecast.snapshot import Snapshot, fork, size_bytes

_FIRST = 8
_LEVELS = (0.5, 0.75, 0.9, 0.95, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedForecasts:
    """Of values of at least 0, all with the same step. Nothing that it was made from is ever changed.

    Attributes:
        horizon_steps: ascending; peaks are forecast over up to the last.
    """

    step_s: float
    horizon_steps: tuple[int, ...]
    _banks: tuple[ForecasterBank, ...] = ()
    _sizes: tuple[int, ...] = ()
    _places: Mapping[str, int] = field(default_factory=dict[str, int])

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def taken_in(self, values: Mapping[str, float]) -> NamedForecasts:
        """After one more step; NaN where a value is not known. Series that are not told may be forgotten."""
        places = dict(self._places)
        banks, sizes = [fork(bank) for bank in self._banks], list(self._sizes)
        size = sum(sizes)
        gone = [name for name in places if name not in values]
        free = sorted(set(range(size)) - set(places.values()), reverse=True)
        for name in values.keys() - places.keys():
            if not free and gone:
                free.append(places.pop(gone.pop()))
            if not free:
                more = size or _FIRST
                banks.append(self._bank(more))
                sizes.append(more)
                free += range(size + more - 1, size - 1, -1)
                size += more
            places[name] = free.pop()
        if not size:
            return self
        values_N = np.full(size, nan)
        for name, value in values.items():
            values_N[places[name]] = value
        for bank, part_N in zip(banks, np.split(values_N, np.cumsum(sizes)[:-1]), strict=True):
            bank.update(part_N)
        return replace(self, _banks=tuple(banks), _sizes=tuple(sizes), _places=places)

    def skipped(self, steps: int) -> NamedForecasts:
        """After so many steps of which nothing is known."""
        if not steps:
            return self
        banks = tuple(fork(bank) for bank in self._banks)
        for bank in banks:
            bank.skip(steps)
        return replace(self, _banks=banks)

    def peaks(self, lead_s: float, levels: Sequence[float], names: Collection[str]) -> dict[str, Array]:
        """quantiles_L, of those that are known, of the largest value within the lead time."""
        known = [name for name in names if name in self._places]
        if not known:
            return {}
        peaks_NL = np.concatenate([bank.predict_peak(lead_s, levels) for bank in self._banks])
        return {name: peaks_NL[self._places[name]] for name in known}

    def state(self, most_bytes: int) -> dict[str, Any]:
        """A snapshot, arrays in nested dictionaries and lists; of as many banks as fit into so many bytes."""
        sizes, banks = list[int](), list[Snapshot]()
        for bank, size in zip(self._banks, self._sizes, strict=True):
            state = bank.state()
            most_bytes -= size_bytes(state)
            if most_bytes < 0:
                break
            sizes.append(size)
            banks.append(state)
        places = {name: place for name, place in self._places.items() if place < sum(sizes)}
        return {"sizes": sizes, "places": places, "banks": banks}

    def restored(self, state: Snapshot) -> NamedForecasts:
        """Those of a snapshot, instead of what is known here.

        Raises:
            InvalidInput: it is none of such forecasts.
        """
        try:
            sizes = tuple(int(size) for size in state["sizes"])
            places = {str(name): int(place) for name, place in cast(Snapshot, state["places"]).items()}
            banks = tuple(self._bank(size) for size in sizes)
            for bank, saved in zip(banks, state["banks"], strict=True):
                bank.restore(saved)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(f"this is no state of forecasts: {error!r}") from error
        taken = set(places.values())
        if len(taken) < len(places) or not taken <= set(range(sum(sizes))):
            raise InvalidInput("this is no state of forecasts: series share a place, or have none")
        return replace(self, _banks=banks, _sizes=sizes, _places=places)

    def _bank(self, size: int) -> ForecasterBank:
        return ForecasterBank(size, self.step_s, self.horizon_steps, _LEVELS)
