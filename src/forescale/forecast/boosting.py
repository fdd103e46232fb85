"""Gradient-boosted trees that see a series as the anchors of the learned members, in units of their errors.

LightGBM (Ke et al., NeurIPS 2017) with the pinball loss, a model for each target and level. Fitted to one
series; what holds for all series is in the pretrained network already.

Axes: T = time, J = target, L = level, F = input, B = example, E = the same in one row per example and target.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from forescale.forecast.forecaster import Array
from forescale.forecast.history import RecentValues
from forescale.forecast.members.anchors import Anchors
from forescale.forecast.members.member import Targets
from forescale.forecast.refit import FEW, Fit, path_fit, require

_EXAMPLES = 4000  # the newest ones
_WARM_UP = 100  # values before the first example
_CLIP = 50.0  # units that a target may lie away
_PARAMETERS: dict[str, Any] = {
    "objective": "quantile",
    "learning_rate": 0.06,
    "num_leaves": 12,
    "min_data_in_leaf": 40,
    "feature_fraction": 0.7,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "num_threads": 1,
    "deterministic": True,
    "verbosity": -1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BoostedModel:
    """LightGBM for one series; a fit takes some seconds, a forecast some milliseconds.

    Attributes:
        season_steps: length of a season; None where there is none.
        rounds: trees of a model.
        seed: of the choice of examples and inputs.
    """

    season_steps: int | None = None
    rounds: int = 60
    seed: int = 0

    def __post_init__(self) -> None:
        require("lightgbm")

    @property
    def name(self) -> str:
        return "LightGBM"

    @property
    def history_steps(self) -> int:
        return _EXAMPLES + 2 * (self.season_steps or 0)

    def fit(self, values_T: Array, targets: Targets, levels: Sequence[float]) -> Fit:
        longest = int(targets.lead_steps_J.max())
        if np.ptp(values_T) == 0.0 or len(values_T) < _WARM_UP + longest + FEW:
            return path_fit(np.full((1, len(levels)), values_T[-1]), values_T, targets)
        sight = _Sight(targets, self.season_steps, len(values_T))
        begin = max(_WARM_UP, len(values_T) - longest - _EXAMPLES)
        seen: list[tuple[Array, Array, Array]] = []
        for t, value in enumerate(values_T.tolist()):
            sight.take(value)
            if begin <= t < len(values_T) - longest:
                seen.append(sight.now())
        inputs_BJF, reference_BJ, unit_BJ = (np.stack(part) for part in zip(*seen, strict=True))
        ahead_BJ = _ahead(values_T, begin, len(seen), targets)
        target_BJ = ((ahead_BJ - reference_BJ) / unit_BJ).clip(-_CLIP, _CLIP)
        # Errors count as they are measured: in the unit of the series.
        weight_BJ = (unit_BJ / unit_BJ.mean(axis=0)).clip(0.05, 20.0)
        boosters = [
            [self._booster(inputs_BJF[:, j], target_BJ[:, j], weight_BJ[:, j], level) for level in levels]
            for j in range(len(targets.lead_steps_J))
        ]
        return BoostedFit(boosters=boosters, sight=sight)

    def _booster(self, inputs_BF: Array, target_B: Array, weight_B: Array, level: float) -> Any:
        import lightgbm  # noqa: PLC0415 - an extra, and slow to import

        data = lightgbm.Dataset(inputs_BF, target_B, weight=weight_B)
        parameters = _PARAMETERS | {"alpha": level, "seed": self.seed}
        return lightgbm.train(parameters, data, num_boost_round=self.rounds)


class _Sight:
    """How the trees see one series."""

    def __init__(self, targets: Targets, season_steps: int | None, capacity: int) -> None:
        self._history = RecentValues(1, capacity)
        self._anchors = Anchors(1, targets, season_steps)

    def take(self, value: float) -> None:
        values_N = np.array([value])
        self._history.append(values_N, np.array([self._history.steps == 0]))
        self._anchors.take(values_N, values_N, self._history)

    def now(self) -> tuple[Array, Array, Array]:
        """inputs_JF, and of the target reference_J and unit_J."""
        anchors = self._anchors
        return (
            anchors.inputs_JNF[:, 0].copy(),
            anchors.anchors_JNK[:, 0, 0].copy(),
            anchors.unit_JN[:, 0].copy(),
        )


@dataclass(slots=True)
class BoostedFit:
    """Trained trees; values that came after the fit are taken in when a forecast is asked for.

    Attributes:
        boosters: by target and level.
        sight: after the fit.
    """

    boosters: list[list[Any]]
    sight: _Sight
    _latest: _Sight | None = field(default=None, init=False)
    _taken: int = field(default=0, init=False)

    def quantiles_JL(self, values_T: Array, elapsed: int) -> Array:
        if self._latest is None or elapsed < self._taken:
            self._latest, self._taken = deepcopy(self.sight), 0
        for value in values_T[len(values_T) - (elapsed - self._taken) :].tolist():
            self._latest.take(value)
        self._taken = elapsed
        inputs_JF, reference_J, unit_J = self._latest.now()
        relative_JL = [
            [float(booster.predict(inputs_F[None])[0]) for booster in boosters]
            for inputs_F, boosters in zip(inputs_JF, self.boosters, strict=True)
        ]
        return np.sort(reference_J[:, None] + unit_J[:, None] * np.array(relative_JL), axis=1)


def _ahead(values_T: Array, begin: int, count: int, targets: Targets) -> Array:
    """targets_BJ of ``count`` origins from ``begin`` on."""
    found: list[Array] = []
    for lead, peak in zip(targets.lead_steps_J.tolist(), targets.peak_J.tolist(), strict=True):
        if peak:
            window_T = np.lib.stride_tricks.sliding_window_view(values_T, lead).max(axis=1)
            found.append(window_T[begin + 1 : begin + 1 + count])
        else:
            found.append(values_T[begin + lead : begin + lead + count])
    return np.stack(found, axis=1)
