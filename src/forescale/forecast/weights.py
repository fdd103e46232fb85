"""How much each forecast counts, for every series, target and level of its own.

Exponential weights (Vovk 1990; Cesa-Bianchi & Lugosi, "Prediction, Learning, and Games", 2006, ch. 2) on
discounted pinball losses, relative to the best forecast's.

Axes: N = series, M = forecast, J = target, L = level.
"""

from __future__ import annotations

import numpy as np

from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import SmallArray


class PinballWeights:
    """Weights from losses that become known with delay.

    Args:
        shape: N, M, J, L.
        levels_L: quantile levels.
        decay: of past losses, per step.
        rate: how much less a forecast counts that lost more; e-fold at ``1 / rate`` more loss.
        patience: losses until differences count half.
    """

    learned = ("_loss_NMJL", "_count_NJ", "weights_NMJL")

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        levels_L: Array,
        *,
        decay: float = 0.9995,
        rate: float = 100.0,
        patience: float = 20.0,
    ) -> None:
        self._levels_L = levels_L.astype(np.float32)
        self._decay = np.float32(decay)
        self._rate = np.float32(rate)
        self._patience = np.float32(patience)
        self._loss_NMJL = np.zeros(shape, dtype=np.float32)
        self._count_NJ = np.zeros((shape[0], shape[2]), dtype=np.float32)
        self.weights_NMJL = np.full(shape, 1.0 / shape[1], dtype=np.float32)

    def learn(self, over_NMJL: SmallArray, unit_NJ: Array) -> None:
        """Take how far targets lay above their forecasts, NaN where unknown, in units of ``unit_NJ``."""
        loss_NMJL = np.maximum(self._levels_L * over_NMJL, (self._levels_L - 1) * over_NMJL)
        loss_NMJL *= unit_NJ[:, None, :, None].astype(np.float32)
        known_NJ = np.isfinite(loss_NMJL[:, 0, :, 0])
        decay_NJ = np.where(known_NJ, self._decay, np.float32(1.0))
        self._loss_NMJL *= decay_NJ[:, None, :, None]
        self._loss_NMJL += np.where(known_NJ[:, None, :, None], loss_NMJL, np.float32(0.0))
        self._count_NJ = self._count_NJ * decay_NJ + known_NJ
        best_NJL = self._loss_NMJL.min(axis=1)[:, None]
        trust_NJ = self._rate * self._count_NJ / (self._count_NJ + self._patience)
        with np.errstate(over="ignore"):  # where the best lost nothing, others count nothing
            regret_NMJL = (self._loss_NMJL - best_NJL) / (best_NJL + np.float32(1e-30))
            regret_NMJL *= trust_NJ[:, None, :, None]
        weights_NMJL = np.exp(-np.minimum(regret_NMJL, np.float32(80.0)))
        self.weights_NMJL = weights_NMJL / weights_NMJL.sum(axis=1, keepdims=True)
