"""Moves from one contiguous placement to another.

Axes: B = block, D = device, E = edge between blocks, X = its producer, its reader.
"""

from __future__ import annotations

import numpy as np

from forescale.plan.placement.line import orders
from forescale.plan.placement.problem import IntArray, readers_of

_EXCHANGES = 0.1
_LONGEST = 6
"""Binary logarithm of the most blocks that are moved at once."""
_ORDERS = 8
_LONG = 400
"""Blocks beyond which no order is drawn at random."""


class CutMoves:
    """Every device holds an interval of some topological order, before a move and after it."""

    def __init__(self, count: int, edge_XE: IntArray, devices: int, rng: np.random.Generator) -> None:
        self._rng, self._devices, self._edge_XE = rng, devices, edge_XE
        self._orders = [*orders(count, edge_XE, _ORDERS, rng, long=count > _LONG)]

    def moved(self, device_B: IntArray) -> IntArray | None:
        """A boundary between two devices shifted, or two devices exchanged; None if nothing would change."""
        rng, count = self._rng, self._devices
        if rng.random() < _EXCHANGES:
            renamed_D = np.arange(count)
            a, b = rng.choice(count, 2, replace=False)
            renamed_D[[a, b]] = b, a
            return renamed_D[device_B]
        row = self._row(device_B)
        rank_D = np.empty(count, dtype=np.int64)
        rank_D[row] = np.arange(count)
        position_B = np.empty(len(device_B), dtype=np.int64)
        position_B[self._orders[int(rng.integers(len(self._orders)))]] = np.arange(len(device_B))
        line_B = np.lexsort((position_B, rank_D[device_B]))
        size_D = np.bincount(rank_D[device_B], minlength=count)
        left = int(rng.integers(count - 1))
        shift = (1 << int(rng.integers(_LONGEST))) * int(rng.choice((-1, 1)))
        shift = min(max(shift, -int(size_D[left])), int(size_D[left + 1]))
        size_D[left] += shift
        size_D[left + 1] -= shift
        moved_B = np.empty_like(device_B)
        moved_B[line_B] = np.repeat(row, size_D)
        return moved_B if shift else None

    def _row(self, device_B: IntArray) -> list[int]:
        """Devices in any order in which every tensor goes forward."""
        ends_XE = device_B[self._edge_XE]
        apart_XE = np.unique(ends_XE[:, ends_XE[0] != ends_XE[1]], axis=1)
        readers = readers_of(self._devices, apart_XE)
        missing = np.bincount(apart_XE[1], minlength=self._devices).tolist()
        ready = [device for device, count in enumerate(missing) if not count]
        row: list[int] = []
        while ready:
            row.append(device := ready.pop(int(self._rng.integers(len(ready)))))
            for reader in readers[device]:
                missing[reader] -= 1
                if not missing[reader]:
                    ready.append(reader)
        return row
