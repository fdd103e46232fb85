"""The pretrained network, corrected for each series by what it got wrong there.

To each of its quantiles a linear function of the anchors is added, which begins at zero and follows the
gradient of the pinball loss (Koenker and Bassett, "Regression quantiles", Econometrica, 1978) with steps
by coordinate as in AdaGrad (Duchi, Hazan and Singer, JMLR 2011), once a target is known. Some speeds are
offered: which one suits a series, a target and a level is for the ensemble to find out.

Axes: N = series, J = target, L = level, M = forecast, C = corrected forecast, F = feature, K = anchor,
R = place in the ring of what awaits its target.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from forescale.forecast.forecaster import Array
from forescale.forecast.members.anchors import ANCHORS
from forescale.forecast.members.member import Moment, SmallArray, Targets
from forescale.forecast.members.network import Network

Places = npt.NDArray[np.int64]

_RATES_C = np.array([0.03, 0.1], dtype=np.float32)  # size of a step, at first about a tenth of it
_SLOWER = 0.3  # power of the lead time that divides a step: the errors of one series overlap for so long
_CLIP = 50.0  # units of error that a target may lie away


class TunedNetwork(Network):
    """Quantiles by the pretrained network, and by corrections of it that learn.

    Args:
        series: N.
        targets: what is forecast.
        levels: of the quantiles, in (0, 1).
        season_steps: length of a season; None where there is none.
    """

    names = ("network", "tuned_slowly", "tuned_fast")
    learned = (
        *Network.learned, "_correction_CJNLF", "_gradient_CJNLF", "_features_RNF", "_said_RNL", "_unit_RN",
        "_said_JNL",
    )  # fmt: skip

    def __init__(
        self, series: int, targets: Targets, *, levels: Sequence[float], season_steps: int | None = None
    ) -> None:
        super().__init__(series, targets, levels=levels, season_steps=season_steps)
        self._levels_L = np.asarray(levels, dtype=np.float32)
        rows, columns = len(self._waiting_RNK), len(targets.lead_steps_J)
        self._rates_CJ = _RATES_C[:, None] / targets.lead_steps_J.astype(np.float32) ** _SLOWER
        shape = (len(_RATES_C), columns, series, len(levels), ANCHORS)
        self._correction_CJNLF = np.zeros(shape, dtype=np.float32)
        self._gradient_CJNLF = np.full(shape, 100.0, dtype=np.float32)  # sum of squares
        self._features_RNF = np.zeros((rows, series, ANCHORS), dtype=np.float16)  # between -8 and 8
        self._said_RNL = np.zeros((rows, series, len(levels)), dtype=np.float32)
        self._unit_RN = np.ones((rows, series))
        self._said_JNL = np.zeros((columns, series, len(levels)), dtype=np.float32)

    def update(self, now: Moment) -> None:
        """Learn from the targets that are known now, and say what comes next."""
        rows_J = self._rows_J()
        ready = np.flatnonzero(self._steps >= self._targets.lead_steps_J)
        if ready.size:
            self._correct(ready, rows_J[ready], self.due_JN(now.history)[ready], np.isfinite(now.observed_N))
        super().update(now)
        self._said_JNL = self.relative_JNL().astype(np.float32)
        self._features_RNF[rows_J] = self._features_JNF()
        self._said_RNL[rows_J] = self._said_JNL
        self._unit_RN[rows_J] = self.unit_JN

    def quantiles_NMJL(self, now: Moment, upcoming_NJK: Array | None = None) -> Array:  # noqa: ARG002
        """Forecasts made ``now``, in the unit of the series."""
        features_JNF = self._features_JNF()
        corrected_CJNL = self._said_JNL + (self._correction_CJNLF @ features_JNF[..., None])[..., 0]
        relative_MJNL = np.concatenate([self._said_JNL[None], corrected_CJNL])
        quantiles_MJNL = self.anchors_JNK[..., :1] + self.unit_JN[..., None] * relative_MJNL
        return quantiles_MJNL.transpose(2, 0, 1, 3)

    def _features_JNF(self) -> SmallArray:
        """1, and how far the other anchors lie from the reference."""
        features_JNF = self.inputs_JNF[..., :ANCHORS].astype(np.float32)
        features_JNF[..., 0] = 1.0
        return features_JNF

    def _correct(self, ready: Places, rows_J: Places, due_JN: Array, known_N: npt.NDArray[np.bool_]) -> None:
        """Follow the gradient of the loss of what was said of the targets due."""
        features_JNF = self._features_RNF[rows_J].astype(np.float32)
        said_JNL = self._said_RNL[rows_J]
        target_JN = (due_JN - self._waiting_RNK[rows_J, :, 0]) / self._unit_RN[rows_J]
        target_JN = np.where(known_N, target_JN, 0.0).clip(-_CLIP, _CLIP).astype(np.float32)
        for c, rate_J in enumerate(self._rates_CJ[:, ready]):
            correction_JNLF = self._correction_CJNLF[c, ready]
            quantiles_JNL = said_JNL + (correction_JNLF @ features_JNF[..., None])[..., 0]
            slope_JNL = (target_JN[..., None] < quantiles_JNL) - self._levels_L
            slope_JNL *= known_N[:, None]
            gradient_JNLF = slope_JNL[..., None] * features_JNF[:, :, None]
            self._gradient_CJNLF[c, ready] += gradient_JNLF**2
            gradient_JNLF /= np.sqrt(self._gradient_CJNLF[c, ready])
            self._correction_CJNLF[c, ready] = correction_JNLF - rate_J[:, None, None, None] * gradient_JNLF
