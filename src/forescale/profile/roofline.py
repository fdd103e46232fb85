"""How an operator's time follows its size: a roofline fitted to measured operators.

Williams, Waterman, Patterson: *Roofline: an insightful visual performance model for multicore
architectures*, CACM 2009. Here as a sum, because an operator's arithmetic and its memory traffic
overlap only in part, with the time of starting an operator added:

    time = dispatch_s + flops / flops_per_s + bytes / bytes_per_s
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

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
    """The roofline of measured operators.

    ``dispatch_s`` is the median of operators that neither compute nor move anything (without any, of the
    fastest tenth). The rates are the non-negative least-squares fit, by relative error, to what the
    operators take beyond it: fitted together, the three could trade places, because all operators of
    one microbatch grow with it.

    Args:
        seconds, flops, size_bytes: one entry per measured operator; those with 0 s are left out.
    """
    ran = seconds > 0
    if not ran.any():
        return Roofline(dispatch_s=0.0, flops_per_s=np.inf, bytes_per_s=np.inf)
    seconds, flops, size_bytes = seconds[ran], flops[ran], size_bytes[ran]
    free = seconds[(flops == 0) & (size_bytes == 0)]
    dispatch_s = float(np.median(free) if free.size else np.quantile(seconds, 0.1))
    work = (seconds > 2 * dispatch_s) & ((flops > 0) | (size_bytes > 0))
    per_flop_s, per_byte_s = _non_negative_pair(flops[work], size_bytes[work], seconds[work] - dispatch_s)
    return Roofline(
        dispatch_s=dispatch_s,
        flops_per_s=1 / per_flop_s if per_flop_s else np.inf,
        bytes_per_s=1 / per_byte_s if per_byte_s else np.inf,
    )


def _non_negative_pair(first: Array, second: Array, target: Array) -> tuple[float, float]:
    """Coefficients >= 0 of two columns with the least relative squared error, if need be of one alone."""
    columns = np.stack([first, second], axis=1) / target[:, None]
    scale = np.maximum(columns.max(axis=0, initial=0.0), 1e-300)
    columns = columns / scale
    best, least = np.zeros(2), np.inf
    for chosen in ([0, 1], [0], [1]):
        found = np.linalg.lstsq(columns[:, chosen], np.ones(len(target)), rcond=None)[0]
        error = float(((columns[:, chosen] @ found - 1) ** 2).sum())
        if (found >= 0).all() and error < least:
            best, least = np.zeros(2), error
            best[chosen] = found
    per_first, per_second = best / scale
    return float(per_first), float(per_second)
