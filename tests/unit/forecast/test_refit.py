from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from forescale.core.errors import InvalidInput
from forescale.forecast.forecaster import Array
from forescale.forecast.members.member import Targets
from forescale.forecast.refit import FEW, PathFit, RefittedForecaster, path_fit, require

NAN = float("nan")


def targets(*leads: int, peak: bool = False) -> Targets:
    return Targets(lead_steps_J=np.array(leads), peak_J=np.full(len(leads), peak))


@dataclass(frozen=True)
class Echo:
    """Says how old the fit is and what it was fitted to."""

    fits: list[Array] = field(default_factory=list[Array])
    name: str = "echo"
    history_steps: int = 20

    def fit(self, values_T: Array, targets: Targets, levels: Sequence[float]) -> EchoFit:
        self.fits.append(values_T)
        return EchoFit()


class EchoFit:
    def quantiles_JL(self, values_T: Array, elapsed: int) -> Array:
        return np.array([[float(elapsed), values_T[-1]]])


def test_missing_package_is_named_with_what_to_install() -> None:
    with pytest.raises(InvalidInput, match=r"no_such_package: pip install 'forescale\[forecast\]'"):
        require("no_such_package")
    require("numpy")


def test_path_is_read_from_where_time_has_come_to() -> None:
    path = PathFit(quantiles_SL=np.array([[1.0], [5.0], [3.0], [2.0]]), targets=targets(1, 3))
    assert np.array_equal(path.quantiles_JL(np.zeros(1), 0), [[1.0], [3.0]])
    assert np.array_equal(path.quantiles_JL(np.zeros(1), 1), [[5.0], [2.0]])
    assert np.array_equal(path.quantiles_JL(np.zeros(1), 50), [[2.0], [2.0]])


def test_peak_is_the_largest_value_on_the_way() -> None:
    path = PathFit(quantiles_SL=np.array([[1.0], [5.0], [3.0], [2.0]]), targets=targets(1, 3, peak=True))
    assert np.array_equal(path.quantiles_JL(np.zeros(1), 0), [[1.0], [5.0]])
    assert np.array_equal(path.quantiles_JL(np.zeros(1), 2), [[3.0], [3.0]])
    assert np.array_equal(path.quantiles_JL(np.zeros(1), 9), [[2.0], [2.0]])


def test_path_is_finite_ascending_and_near_what_was_seen() -> None:
    wild = np.array([[np.inf, -np.inf], [NAN, 1.0]])
    path = path_fit(wild, np.array([0.0, 10.0, 4.0]), targets(1, 2))
    assert np.array_equal(path.quantiles_JL(np.zeros(1), 0), [[-30.0, 40.0], [1.0, 4.0]])


def test_fitted_for_each_forecast_or_when_old() -> None:
    each, seldom = Echo(), Echo()
    forecasters = RefittedForecaster(each, (1,), (0.1, 0.9)), RefittedForecaster(seldom, (1,), (0.1, 0.9), 5)
    ages: list[float] = []
    for t in range(FEW + 10):
        for forecaster in forecasters:
            forecaster.update(float(t))
        if t >= FEW:
            assert np.array_equal(forecasters[0].predict(), [[0.0, t]])
            ages.append(forecasters[1].predict()[0, 0])
    assert len(each.fits) == 10
    assert ages == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert len(each.fits[-1]) == each.history_steps
    assert each.fits[-1][-1] == FEW + 9


def test_missing_values_are_the_last_known() -> None:
    echo = Echo()
    forecaster = RefittedForecaster(echo, (1,), (0.1, 0.9))
    for value in (NAN, *([1.0] * FEW), 2.0, NAN):
        forecaster.update(value)
    forecaster.predict()
    assert np.array_equal(echo.fits[0], [*([1.0] * FEW), 2.0, 2.0])


def test_few_values_go_on_as_they_are() -> None:
    echo = Echo()
    forecaster = RefittedForecaster(echo, (1, 5), (0.1, 0.9))
    assert np.array_equal(forecaster.predict(), np.zeros((2, 2)))
    forecaster.update(3.0)
    assert np.array_equal(forecaster.predict(), np.full((2, 2), 3.0))
    assert not echo.fits
