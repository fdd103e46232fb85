"""How an operator's time follows its size: a roofline fitted to measured operators.

Williams, Waterman, Patterson: *Roofline: an insightful visual performance model for multicore
architectures*, CACM 2009. Here as a sum, because an operator's arithmetic and its memory traffic
overlap only in part, with the time of starting an operator added:

    time = dispatch_s + flops / flops_per_s + bytes / bytes_per_s
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Effective rates of a device kind on a model's operators; a rate is ``inf`` where it never limited."""

    dispatch_s: float
    flops_per_s: float
    bytes_per_s: float

    def seconds(self, flops: Array, size_bytes: Array) -> Array:
        return self.dispatch_s + flops / self.flops_per_s + size_bytes / self.bytes_per_s

    def to_json(self) -> Mapping[str, float]:
        return asdict(self)


def fit_roofline(seconds: Array, flops: Array, size_bytes: Array) -> Roofline:
    """The non-negative least-squares fit of the three terms to measured operators.

    Residuals count relative to the root of the measured time: in absolute terms the largest operator
    alone would decide, in relative ones the many that hardly do anything.

    Args:
        seconds, flops, size_bytes: one entry per measured operator; those with 0 s are left out.
    """
    ran = seconds > 0
    if not ran.any():
        return Roofline(dispatch_s=0.0, flops_per_s=np.inf, bytes_per_s=np.inf)
    weights = 1 / np.sqrt(seconds[ran])
    columns = np.stack([np.ones(int(ran.sum())), flops[ran], size_bytes[ran]], axis=1)
    scale = np.maximum(columns.max(axis=0), 1e-300)
    coefficients = _non_negative(columns / scale * weights[:, None], seconds[ran] * weights) / scale
    dispatch_s, per_flop_s, per_byte_s = (float(c) for c in coefficients)
    return Roofline(
        dispatch_s=dispatch_s,
        flops_per_s=1 / per_flop_s if per_flop_s else np.inf,
        bytes_per_s=1 / per_byte_s if per_byte_s else np.inf,
    )


def _non_negative(matrix: Array, target: Array) -> Array:
    """Least squares with coefficients >= 0: of three, the best over all subsets that come out positive."""
    count = matrix.shape[1]
    best, least = np.zeros(count), np.inf
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            found = np.linalg.lstsq(matrix[:, chosen], target, rcond=None)[0]
            error = float(((matrix[:, chosen] @ found - target) ** 2).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(count), error
                best[list(chosen)] = found
    return best
