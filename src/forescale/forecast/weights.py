"""How much each forecast counts, for every series, target and level of its own.

Exponential weights (Vovk 1990; Cesa-Bianchi & Lugosi, "Prediction, Learning, and Games", 2006, ch. 2) on
discounted pinball losses, relative to the best forecast's.

Axes: N = series, V = forecast, J = target, L = level.
"""

from __future__ import annotations

import numpy as np

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import SmallArray


class PinballWeights:
    """Weights from losses that become known with delay.

    Args:
        shape: N, V, J, L.
        levels_L: quantile levels.
        decay: of past losses, per step.
        rate: how much less a forecast counts that lost more; e-fold at ``1 / rate`` more loss.
        patience: losses until differences count half.
    """

    learned = ("_loss_NVJL", "_count_NJ", "weights_NVJL")

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        levels_L: Array,
        *,
        decay: float = 0.997,
        rate: float = 30.0,
        patience: float = 20.0,
    ) -> None:
        self._levels_L = levels_L.astype(np.float32)
        self._decay = np.float32(decay)
        self._rate = np.float32(rate)
        self._patience = np.float32(patience)
        self._loss_NVJL = np.zeros(shape, dtype=np.float32)
        self._count_NJ = np.zeros((shape[0], shape[2]), dtype=np.float32)
        self.weights_NVJL = np.full(shape, 1.0 / shape[1], dtype=np.float32)

    def learn(self, over_NVJL: SmallArray, unit_NJ: Array) -> None:
        """Take how far targets lay above their forecasts, NaN where unknown, in units of ``unit_NJ``."""
        loss_NVJL = np.maximum(self._levels_L * over_NVJL, (self._levels_L - 1) * over_NVJL)
        loss_NVJL *= unit_NJ[:, None, :, None].astype(np.float32)
        known_NJ = np.isfinite(loss_NVJL[:, 0, :, 0])
        decay_NJ = np.where(known_NJ, self._decay, np.float32(1.0))
        self._loss_NVJL *= decay_NJ[:, None, :, None]
        self._loss_NVJL += np.where(known_NJ[:, None, :, None], loss_NVJL, np.float32(0.0))
        self._count_NJ = self._count_NJ * decay_NJ + known_NJ
        best_NJL = self._loss_NVJL.min(axis=1)[:, None]
        trust_NJ = self._rate * self._count_NJ / (self._count_NJ + self._patience)
        regret_NVJL = (self._loss_NVJL - best_NJL) / (best_NJL + np.float32(1e-30))
        weights_NVJL = np.exp(-np.minimum(trust_NJ[:, None, :, None] * regret_NVJL, np.float32(80.0)))
        self.weights_NVJL = weights_NVJL / weights_NVJL.sum(axis=1, keepdims=True)
