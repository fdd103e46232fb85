"""Gradient boosting for each target and level, on distances from the local level in units of its scale.

Ke et al., "LightGBM: a highly efficient gradient boosting decision tree" (NeurIPS 2017), with pinball loss.

Axes: T = time, B = example, F = feature, J = target, L = level, D = node, K = booster, R = tree of a booster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from forescale.forecast.examples import seasons_back, steps_before, targets_ahead
from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import Targets
from forescale.forecast.refit import FEW, Fit, path_fit, require

_EXAMPLES = 5000  # the newest ones
_LAGS = (*range(10), 14, 19, 29, 44, 59)
_WINDOW = _LAGS[-1] + 1
_HALF_LIVES = (2.0, 5.0, 15.0, 40.0)
_LEVEL = 2  # whose smoothed value is the local level
_SCALE_HALF_LIFE = 40.0
_REMEMBERED = 400  # values that smoothed ones are made of: ten half-lives
_FLOOR = 0.05  # of the mean change, below which the local scale does not fall
_ROUNDS = 80
_SETTINGS = {
    "objective": "quantile",
    "num_leaves": 15,
    "learning_rate": 0.07,
    "min_data_in_leaf": 20,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "feature_fraction": 0.7,
    "num_threads": 1,
    "verbosity": -1,
    "seed": 0,
}

_Nodes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class BoostingModel:
    """LightGBM, a booster for each target and level; a maximum over a lead time is a target of its own.

    A fit to 5,000 values takes about 0.2 s for each booster, a forecast of all of them about a millisecond.

    Attributes:
        season_steps: length of a season: the values a season before the targets are features.
    """

    season_steps: int | None = None

    @property
    def name(self) -> str:
        return "LightGBM"

    @property
    def history_steps(self) -> int:
        return _EXAMPLES + (self.season_steps or 0)

    def fit(self, values_T: Array, targets: Targets, levels: Sequence[float]) -> Fit:
        require("lightgbm")
        known = steps_before(self.season_steps, len(values_T), targets, _WINDOW)
        ends = np.arange(max(_WINDOW, known), len(values_T) - int(targets.lead_steps_J.max())) + 1
        if np.ptp(values_T) == 0.0 or len(ends) < FEW:
            return path_fit(np.full((1, len(levels)), values_T[-1]), values_T, targets)
        import lightgbm  # noqa: PLC0415 - an extra

        floor = _FLOOR * float(np.abs(np.diff(values_T)).mean())
        sight = _Sight(targets=targets, season_steps=self.season_steps if known else None, floor=floor)
        features_TF, level_T, scale_T = sight.of(values_T)
        features_BF, level_B, scale_B = (known_T[ends - 1] for known_T in (features_TF, level_T, scale_T))
        targets_BJ = (targets_ahead(values_T, ends, targets) - level_B[:, None]) / scale_B[:, None]
        boosters = [
            lightgbm.train(
                {**_SETTINGS, "alpha": level},
                # Weighed by scale, an example counts in the unit of the series, as in the score.
                lightgbm.Dataset(features_BF, target_B, weight=scale_B),
                num_boost_round=_ROUNDS,
            )
            for target_B in targets_BJ.T
            for level in levels
        ]
        forest = _forest([booster.model_to_string() for booster in boosters])
        return BoostingFit(sight=sight, forest=forest, levels=len(levels))


@dataclass(frozen=True, slots=True, kw_only=True)
class BoostingFit:
    """Trained trees; they look at the newest values whenever they are asked."""

    sight: _Sight
    forest: _Forest
    levels: int

    def quantiles_JL(self, values_T: Array, elapsed: int) -> Array:  # noqa: ARG002 - the protocol's
        features_TF, level_T, scale_T = self.sight.of(values_T[-self.sight.reach :])
        found_JL = self.forest.values_K(features_TF[-1]).reshape(-1, self.levels)
        return np.sort(level_T[-1] + scale_T[-1] * found_JL, axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sight:
    """How the trees see a series.

    Attributes:
        floor: the least scale there is; a series that stood still would otherwise make any change endless.
    """

    targets: Targets
    season_steps: int | None
    floor: float

    @property
    def reach(self) -> int:
        """Values that what is seen after the last of them depends on."""
        longest = int(self.targets.lead_steps_J.max())
        return max(_REMEMBERED, seasons_back(self.season_steps, longest) + 1 if self.season_steps else 0)

    def of(self, values_T: Array) -> tuple[Array, Array, Array]:
        """features_TF, level_T and scale_T, as they are after each value."""
        means = [_smoothed(values_T, half_life) for half_life in _HALF_LIVES]
        level_T = means[_LEVEL]
        scale_T = _smoothed(np.abs(values_T - level_T), _SCALE_HALF_LIFE) + self.floor
        padded = np.concatenate([np.full(_LAGS[-1], values_T[0]), values_T])
        columns = [padded[_LAGS[-1] - lag : len(padded) - lag] for lag in _LAGS] + means
        columns += self._seasons(values_T)
        normal = [(column - level_T) / scale_T for column in columns]
        restless_T = _smoothed(np.abs(values_T - means[0]), 5.0) / scale_T
        return np.column_stack([*normal, restless_T, np.log(scale_T)]), level_T, scale_T

    def _seasons(self, values_T: Array) -> list[Array]:
        """For each target what it was a season before, known after each value."""
        if not self.season_steps:
            return []
        found: list[Array] = []
        leads = zip(self.targets.lead_steps_J.tolist(), self.targets.peak_J.tolist(), strict=True)
        for lead, peak in leads:
            back = seasons_back(self.season_steps, lead)
            before = np.concatenate([np.full(back, values_T[0]), values_T])  # at t: the value at t - back
            first = 1 if peak else lead
            whole = sliding_window_view(before, lead - first + 1).max(axis=1)
            found.append(whole[first : first + len(values_T)])
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Forest:
    """All trees of all boosters, walked at once: asking each booster takes a tenth of a millisecond.

    Attributes:
        feature_D, threshold_D: a row goes on to ``below_D`` if its feature is not above the threshold, else
            to ``above_D``. A leaf goes on to itself.
        value_D: of a leaf.
        root_KR: node that each tree begins at.
    """

    feature_D: _Nodes
    threshold_D: Array
    below_D: _Nodes
    above_D: _Nodes
    value_D: Array
    root_KR: _Nodes

    def values_K(self, features_F: Array) -> Array:
        """What each booster says of a row."""
        next_D = np.where(features_F[self.feature_D] <= self.threshold_D, self.below_D, self.above_D)
        here_KR = self.root_KR
        while True:
            after_KR = next_D[here_KR]
            if np.array_equal(after_KR, here_KR):
                return self.value_D[here_KR].sum(axis=1)
            here_KR = after_KR


def _forest(models: Sequence[str]) -> _Forest:
    """From boosters as LightGBM writes them. Those that ended early get trees that are a leaf of nothing."""
    nothing = _tree("leaf_value=0", 0)
    columns, begin = [nothing], len(nothing[0])
    root_KR = np.zeros((len(models), _ROUNDS), dtype=np.int64)
    for k, model in enumerate(models):
        for r, text in enumerate(model.split("end of trees")[0].split("\nTree=")[1:]):
            columns.append(_tree(text, begin))
            root_KR[k, r] = begin
            begin += len(columns[-1][0])
    feature_D, threshold_D, below_D, above_D, value_D = map(np.concatenate, zip(*columns, strict=True))
    return _Forest(
        feature_D=feature_D,
        threshold_D=threshold_D,
        below_D=below_D,
        above_D=above_D,
        value_D=value_D,
        root_KR=root_KR,
    )


def _tree(text: str, begin: int) -> tuple[_Nodes, Array, _Nodes, _Nodes, Array]:
    """feature_D, threshold_D, below_D, above_D and value_D: inner nodes from ``begin`` on, then leaves.

    LightGBM numbers the two apart; a child below zero is the leaf of its complement.
    """
    lines = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    value_leaves = np.array(lines["leaf_value"].split(), dtype=np.float64)
    inner = len(value_leaves) - 1
    leaves = np.arange(len(value_leaves))

    def inner_column(name: str) -> Array:
        return np.array(lines.get(name, "").split(), dtype=np.float64)

    def children(name: str) -> _Nodes:
        child = inner_column(name).astype(np.int64)
        return np.concatenate([begin + np.where(child >= 0, child, inner + ~child), begin + inner + leaves])

    return (
        np.concatenate([inner_column("split_feature"), np.zeros(len(leaves))]).astype(np.int64),
        np.concatenate([inner_column("threshold"), np.zeros(len(leaves))]),
        children("left_child"),
        children("right_child"),
        np.concatenate([np.zeros(inner), value_leaves]),
    )


def _smoothed(values_T: Array, half_life: float) -> Array:
    weight = 1.0 - 0.5 ** (1.0 / half_life)
    level = float(values_T[0])
    found: list[float] = []
    for value in values_T.tolist():
        level += weight * (value - level)
        found.append(level)
    return np.array(found)
