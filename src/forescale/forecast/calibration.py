"""calib"""
from __future__ import annotations

from statistics import NormalDist
import numpy as np
import os
R = eval(os.environ.get("R", "{}"))


class AdaptiveShift:
    """Quantile tracking in units of the forecast's own loss."""

    learned = ("_shift_NJL", "_unit_NJ", "_count_NJ")

    def __init__(self, shape, levels_L, targets):
        self._levels_L = levels_L.astype(np.float32)
        self._z_L = np.array([NormalDist().inv_cdf(t) for t in levels_L], dtype=np.float32)
        self._shift_NJL = np.zeros(shape, dtype=np.float32)  # in z
        lr = R.get("lr", 0.03)
        up = np.where(levels_L >= R.get("from", 0.0), 1.0, 0.0)
        self._rate_JL = (lr / targets.lead_steps_J ** R.get("lrpow", .5))[:, None] * up / (np.minimum(levels_L, 1 - levels_L)) ** R.get("taupow", .5)

    def learn(self, due_NJ, mixed_NJL, issued_NJL, step, scale_NJ):
        known_NJ = np.isfinite(due_NJ) & np.isfinite(issued_NJL[..., 0])
        miss_NJL = (due_NJ[..., None] > issued_NJL).astype(np.float32)
        self._shift_NJL += np.where(known_NJ[..., None], self._rate_JL * (miss_NJL - (1 - self._levels_L)), 0.0)

    def shifted(self, mixed_NJL, scale_NJ):
        z = self._z_L; zz = z + self._shift_NJL
        i = np.clip(np.searchsorted(z, zz) , 1, len(z) - 1)
        lo = np.take_along_axis(mixed_NJL, i - 1, axis=-1); hi = np.take_along_axis(mixed_NJL, i, axis=-1)
        return lo + (hi - lo) * (zz - z[i - 1]) / (z[i] - z[i - 1])
