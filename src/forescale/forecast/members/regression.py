"""Ridge regression of every target on smoothed levels, trends and seasons; direct, with forgetting.

The features of an autoregression, but on several scales of time instead of lags, which are few and smooth
(as in HAR: Corsi, "A simple approximate long-memory model", J. Financial Econometrics, 2009). Sufficient
statistics are discounted sums; the ridge pulls to weights that are good to start with.

Axes: N = series, J = target, F = feature.
"""

from __future__ import annotations

import numpy as np

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import Moment, Targets
from forescale.forecast.waiting import Waiting

_SPEEDS = (1.0, 0.5, 0.2, 0.08, 0.03, 0.01)
_CLIP = 10.0  # scales; larger features and targets are outliers


class RidgeRegression:
    """One forecast.

    Args:
        series: N.
        targets: what is forecast.
        season_steps: length of a season whose past value is a feature; None without.
        discount: of what was learned, per step.
        ridge: pull towards the first weights, in observations.
    """

    names = ("ridge",)
    learned = ("_level_NF", "_product_NJFF", "_moment_NJF", "_waiting")

    def __init__(
        self,
        series: int,
        targets: Targets,
        *,
        season_steps: int | None,
        discount: float = 0.998,
        ridge: float = 10.0,
    ) -> None:
        leads_J = targets.lead_steps_J
        self._season_steps = season_steps
        self._discount = discount
        self._ridge = ridge
        self._ago_J = None if season_steps is None else season_steps - leads_J % season_steps
        features = len(_SPEEDS) + 1 + 2 * (season_steps is not None)
        self._first_JF = np.zeros((len(leads_J), features))
        self._first_JF[:, 1:4] = 1.0 / 3.0
        self._level_NF = np.zeros((series, len(_SPEEDS)))
        self._product_NJFF = np.zeros((series, len(leads_J), features, features), dtype=np.float32)
        self._moment_NJF = np.zeros((series, len(leads_J), features), dtype=np.float32)
        self._waiting = Waiting(series, targets, (features,))

    def update(self, now: Moment) -> None:
        self._learn(now)
        weights_F = np.maximum(_SPEEDS, 1.0 / now.seen_N[:, None])
        self._level_NF += weights_F * (now.values_N[:, None] - self._level_NF)
        self._waiting.put(now.step, self._features_NJF(now))

    def points_NMJ(self, now: Moment, upcoming_NJK: Array | None = None) -> Array:  # noqa: ARG002
        features = self._first_JF.shape[1]
        product_NJFF = self._product_NJFF + np.float32(self._ridge) * np.eye(features, dtype=np.float32)
        residual_NJF = self._moment_NJF - np.einsum("njfg,jg->njf", self._product_NJFF, self._first_JF)
        weights_NJF = self._first_JF + np.linalg.solve(product_NJFF, residual_NJF[..., None])[..., 0]
        features_NJF = self._waiting.due(now.step)  # the newest, which lie where the due ones were
        points_NJ = np.einsum("njf,njf->nj", weights_NJF, features_NJF).clip(-3.0 * _CLIP, 3.0 * _CLIP)
        return (now.level_N[:, None] + now.scale_N[:, None] * points_NJ)[:, None, :]

    def _learn(self, now: Moment) -> None:
        due_NJF = self._waiting.due(now.step)
        known_NJ = np.isfinite(now.due_NJ) & np.isfinite(due_NJF[..., 0])
        x_NJF = np.where(known_NJ[..., None], due_NJF, 0.0).astype(np.float32)
        y_NJ = np.where(known_NJ, now.due_NJ, 0.0).clip(-_CLIP, _CLIP).astype(np.float32)
        self._product_NJFF *= np.float32(self._discount)
        self._product_NJFF += x_NJF[..., :, None] * x_NJF[..., None, :]
        self._moment_NJF *= np.float32(self._discount)
        self._moment_NJF += x_NJF * y_NJ[..., None]

    def _features_NJF(self, now: Moment) -> Array:
        level_N, scale_N = now.level_N[:, None], now.scale_N[:, None]
        series, columns, features = self._moment_NJF.shape
        features_NJF = np.zeros((series, columns, features))
        features_NJF[:, :, : len(_SPEEDS)] = ((self._level_NF - level_N) / scale_N)[:, None, :]
        features_NJF[:, :, len(_SPEEDS)] = 1.0
        if self._season_steps is not None and now.history.steps > self._season_steps + 2:
            assert self._ago_J is not None
            near_J = self._ago_J[:, None] + np.arange(-2, 3)
            then_NJ = now.history.at(near_J.clip(0)).mean(axis=2)
            same_N = now.history.at(self._season_steps + np.arange(5)).mean(axis=1)[:, None]
            features_NJF[:, :, -2] = (then_NJ - level_N) / scale_N
            features_NJF[:, :, -1] = (same_N - level_N) / scale_N
        return features_NJF.clip(-_CLIP, _CLIP)
