"""Forecasts of many series at once: members, weighed online, calibrated.

Axes: N = series, H = horizon, L = level, M = point forecast, V = its variant, J = target.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forescale.forecast.calibration import AdaptiveShift
from forescale.forecast.errors import ErrorWindows
from forescale.forecast.forecaster import Array
from forescale.forecast.history import RecentValues
from forescale.forecast.members.levels import DampedTrends, RunningMedians, SmoothedLevels
from forescale.forecast.members.member import Moment, PointMember, Targets
from forescale.forecast.members.regression import RidgeRegression
from forescale.forecast.members.season import Cycles, Seasons
from forescale.forecast.spread import LocalScale
from forescale.forecast.waiting import Waiting
from forescale.forecast.weights import PinballWeights

KINDS = ("slow", "fast", "root", "level", "const")
import os
R = eval(os.environ.get("R", "{}"))


def peak_leads(longest):
    leads = [1]
    while leads[-1] * 2 < longest:
        leads.append(leads[-1] * 2)
    return [*leads, longest] if longest > 1 else leads


class ForecasterBank:
    learned = ("_step", "_seen_N", "_history", "_local", "_anchor_NRA", "_observed_NR", "_points", "_mixed", "_issued",
               "_errors", "_weights", "_shift", "members", "_stale")

    def __init__(
        self,
        series: int,
        step_s: float,
        horizon_steps: Sequence[int] = (1, 5, 15, 60),
        levels: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99),
        season_steps: int | None = None,
        lower: float | None = 0.0,
        variants=None,
    ) -> None:
        if season_steps is None:
            season_steps = round(86400 / step_s)
        self._step_s = step_s
        self._lower = lower
        self._levels_L = np.asarray(levels)
        self.horizons = len(horizon_steps)
        peaks = peak_leads(max(horizon_steps)) if R.get("peaks", 1) else []
        self._targets = targets = Targets(
            lead_steps_J=np.array([*horizon_steps, *peaks]), peak_J=np.array([False] * self.horizons + [True] * len(peaks))
        )
        seasons = {n: round(s / step_s) for n, s in (("hour", 3600), ("day", 86400), ("week", 604800))}
        capacity = R.get("capacity", 12000)
        seasons = {n: p for n, p in seasons.items() if 4 <= p and p + 100 < capacity}
        self._depth = max(horizon_steps) + 1
        self._step = 0
        self._seen_N = np.zeros(series)
        self._history = RecentValues(series, capacity)
        self._local = LocalScale(series)
        self._anchor_NRA = np.full((series, self._depth, 4), np.nan)  # level, scale, fast, size
        self._observed_NR = np.full((series, self._depth), np.nan)
        self.members: list[PointMember] = [
            SmoothedLevels(series, targets, weights=(1.0, 0.6, 0.3, 0.12, 0.05, 0.02, 0.005)),
            DampedTrends(series, targets),
            *[Seasons(series, targets, name=n, period_steps=p) for n, p in seasons.items()],
            Cycles(series, targets),
            RidgeRegression(series, targets, season_steps=season_steps),
        ]
        self.point_names = [name for member in self.members for name in member.names]
        variants = variants or R.get("variants") or [(n, k) for n in self.point_names for k in R.get("kinds", ("slow", "root"))]
        self.names = ["/".join(v) for v in variants]
        self._point_V = np.array([self.point_names.index(n) for n, _ in variants])
        self._kind_V = np.array([KINDS.index(k) for _, k in variants])
        J, L, V = len(targets.lead_steps_J), len(levels), len(variants)
        self._points = Waiting(series, targets, (len(self.point_names),))
        self._mixed = Waiting(series, targets, (L,))
        self._issued = Waiting(series, targets, (L,))
        self._errors = ErrorWindows(series, V, targets, self._levels_L, window=R.get("W", 128), density=R.get("density", 8))
        self._weights = PinballWeights((series, V, J, L), self._levels_L, decay=R.get("decay", .997), rate=R.get("rate", 30.), patience=R.get("patience", 20.))
        self._shift = AdaptiveShift((series, J, L), self._levels_L, targets)
        self._stale = False
        self._final_NJL = np.zeros((series, J, L))

    def update(self, values_N, covariates_NK=None):
        if self._stale:
            self._forecast()
        observed_N = np.where(np.isfinite(values_N), values_N, np.nan)
        self._step += 1
        first_N = (self._seen_N == 0) & np.isfinite(observed_N)
        self._seen_N = self._seen_N + np.isfinite(observed_N)
        seen_N = np.maximum(self._seen_N, 1.0)
        values_N = np.where(np.isfinite(observed_N), observed_N, self._local.level_N)
        self._history.append(values_N, first_N)
        self._observed_NR[:, self._step % self._depth] = observed_N
        due_NJ, anchor_NJA = self._due()
        self._learn(due_NJ, anchor_NJA)
        self._local.update(observed_N, seen_N)
        now = Moment(step=self._step, seen_N=seen_N, observed_N=observed_N, values_N=values_N, level_N=self._local.level_N,
                     scale_N=self._local.scale_N, due_NJ=due_NJ, history=self._history, covariates_NK=covariates_NK)
        self._anchor_NRA[:, self._step % self._depth] = np.stack(
            (now.level_N, now.scale_N, self._local.fast_N, self._local.size_N), axis=1)
        for member in self.members:
            member.update(now)
        self._now = now
        self._stale = True

    def _due(self):
        leads_J = self._targets.lead_steps_J
        anchor_NJA = self._anchor_NRA[:, (self._step - leads_J) % self._depth]
        recent_NR = self._observed_NR[:, (self._step - np.arange(self._depth - 1)) % self._depth]
        peak_NR = np.fmax.accumulate(recent_NR, axis=1)
        target_NJ = np.where(self._targets.peak_J, peak_NR[:, leads_J - 1], recent_NR[:, :1])
        return (target_NJ - anchor_NJA[..., 0]) / anchor_NJA[..., 1], anchor_NJA

    def _spread(self, points_NVJ, anchor_NJA):
        level, scale, fast, size = (anchor_NJA[:, None, :, i] for i in range(4))
        size = size + 0.1 * scale
        out = np.ones(points_NVJ.shape, dtype=np.float32)
        c = np.abs(level + points_NVJ * scale)
        for k, kind in enumerate(KINDS):
            v = np.flatnonzero(self._kind_V == k)
            if not len(v) or kind == "slow":
                continue
            if kind == "fast":
                out[:, v] = fast / scale
            elif kind == "root":
                out[:, v] = np.sqrt((c[:, v] + 0.1 * size) * size) / scale
            elif kind == "level":
                out[:, v] = (c[:, v] + 0.1 * size) / scale
            else:
                out[:, v] = size / scale
        return out

    def _learn(self, due_NJ, anchor_NJA):
        due_NJ = due_NJ.astype(np.float32)
        points_NVJ = self._points.due(self._step)[:, :, self._point_V].swapaxes(1, 2)
        spread_NVJ = self._spread(points_NVJ, anchor_NJA)
        error_NVJ = due_NJ[:, None] - points_NVJ
        over_NVJL = error_NVJ[..., None] - spread_NVJ[..., None] * self._errors.quantiles_NVJL
        self._weights.learn(over_NVJL, anchor_NJA[..., 1])
        self._shift.learn(due_NJ, self._mixed.due(self._step), self._issued.due(self._step), self._step, anchor_NJA[..., 1])
        floor_NJ = (0.1 * self._local.scale_N[:, None] / anchor_NJA[..., 1]).astype(np.float32)
        self._errors.append((error_NVJ / np.maximum(spread_NVJ, floor_NJ[:, None])).clip(-R.get("clip", 50), R.get("clip", 50)), self._step)

    def _forecast(self, upcoming=None):
        now = self._now
        points_NMJ = np.concatenate([m.points_NMJ(now, upcoming) for m in self.members], axis=1)
        points_NMJ = (points_NMJ - now.level_N[:, None, None]) / now.scale_N[:, None, None]
        points_NMJ = points_NMJ.clip(-1e6, 1e6).astype(np.float32)
        self._points.put(self._step, points_NMJ.swapaxes(1, 2))
        anchor_NJA = np.broadcast_to(self._anchor_NRA[:, None, self._step % self._depth], (len(points_NMJ), points_NMJ.shape[2], 4))
        points_NVJ = points_NMJ[:, self._point_V]
        quantiles_NVJL = points_NVJ[..., None] + self._spread(points_NVJ, anchor_NJA)[..., None] * self._errors.quantiles_NVJL
        mixed_NJL = np.sort(np.einsum("nvjl,nvjl->njl", self._weights.weights_NVJL, quantiles_NVJL), axis=-1)
        issued_NJL = np.sort(self._shift.shifted(mixed_NJL, anchor_NJA[..., 1]), axis=-1)
        self._mixed.put(self._step, mixed_NJL)
        final_NJL = now.level_N[:, None, None] + issued_NJL * now.scale_N[:, None, None]
        if self._lower is not None:
            final_NJL = np.maximum(final_NJL, self._lower)
        self._issued.put(self._step, (final_NJL - now.level_N[:, None, None]) / now.scale_N[:, None, None])
        self._final_NJL = final_NJL
        self._stale = False

    def predict(self, covariates=None):
        if self._stale:
            self._forecast()
        return self._final_NJL[:, : self.horizons]

    def peaks(self):
        self.predict()
        return self._final_NJL[:, self.horizons:]
