"""A small network that was trained on simulated series, and weighs simple forecasts of any other.

For every target and quantile level it answers with weights of the anchors (their sum is 1) and with an
offset in units of the reference's error: so it knows how wide the future spreads after calm, bursts or
shifts, before this series has shown it. It moves with the series' level and unit exactly, whatever
they are. Weighing by learned judgement of past errors: Montero-Manso et al., "FFORMA" (International
Journal of Forecasting, 2020). The weights are made by ``benchmarks/pretrain_network.py``.

Axes: N = series, J = target, L = level asked, G = level of the network, K = anchor, F = input, M = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np

from forescale.forecast.forecaster import Array
from forescale.forecast.members.anchors import ANCHORS, INPUTS, Anchors
from forescale.forecast.members.member import Moment, Targets

LEVELS_G = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995)
HIDDEN = 64
WEIGHTS = Path(__file__).with_name("network.npz")


class Network(Anchors):
    """Quantiles by the pretrained network.

    Args:
        series: N.
        targets: what is forecast.
        levels: of the quantiles, in (0, 1).
        season_steps: length of a season; None where there is none.
    """

    names: tuple[str, ...] = ("network",)

    def __init__(
        self, series: int, targets: Targets, *, levels: Sequence[float], season_steps: int | None = None
    ) -> None:
        super().__init__(series, targets, season_steps)
        with np.load(WEIGHTS) as stored:
            self._layers = {name: stored[name].astype(np.float32) for name in stored}
        self._between_GL = between_levels(LEVELS_G, levels)

    def update(self, now: Moment) -> None:
        self.take(now.observed_N, now.values_N, now.history)

    def quantiles_NMJL(self, now: Moment, upcoming_NJK: Array | None = None) -> Array:  # noqa: ARG002
        """Forecasts made ``now``, in the unit of the series."""
        relative_JNL = self.relative_JNL()
        quantiles_JNL = self.anchors_JNK[..., :1] + self.unit_JN[..., None] * relative_JNL
        return quantiles_JNL.transpose(1, 0, 2)[:, None]

    def relative_JNL(self) -> Array:
        """Quantiles as distances from the reference anchor, in its errors."""
        layers = self._layers
        targets, series, _ = self.inputs_JNF.shape
        hidden = (
            self.inputs_JNF.reshape(-1, INPUTS).astype(np.float32) @ layers["first"] + layers["first_bias"]
        )
        hidden = np.maximum(hidden, 0.0) @ layers["second"] + layers["second_bias"]
        out = np.maximum(hidden, 0.0) @ layers["third"] + layers["third_bias"]
        gates_GK = out[:, : len(LEVELS_G) * ANCHORS].reshape(-1, len(LEVELS_G), ANCHORS)
        gates_GK = np.exp(gates_GK - gates_GK.max(axis=2, keepdims=True))
        away_JNK = (self.anchors_JNK - self.anchors_JNK[..., :1]) / self.unit_JN[..., None]
        away = away_JNK.reshape(-1, ANCHORS, 1)
        quantiles_G = (gates_GK @ away)[..., 0] / gates_GK.sum(axis=2)
        quantiles_G += np.exp(np.clip(out[:, -1:], -4.0, 4.0)) * out[:, len(LEVELS_G) * ANCHORS : -1]
        quantiles_G.sort(axis=1)
        return (quantiles_G @ self._between_GL).reshape(targets, series, -1)


def between_levels(known: Sequence[float], asked: Sequence[float]) -> Array:
    """weights_GL that make quantiles at the levels asked of those at the known ones, ascending.

    Linear between neighbours as for a Gaussian, of which the outermost are also continued.
    """
    place_G = np.array([NormalDist().inv_cdf(level) for level in known])
    weights_GL = np.zeros((len(known), len(asked)))
    for column, level in enumerate(asked):
        place = NormalDist().inv_cdf(level)
        above = int(np.clip(np.searchsorted(place_G, place), 1, len(known) - 1))
        share = (place - place_G[above - 1]) / (place_G[above] - place_G[above - 1])
        weights_GL[above - 1 : above + 1, column] = 1.0 - share, share
    return weights_GL
