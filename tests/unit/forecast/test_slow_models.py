from __future__ import annotations

import pickle
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from forescale.core.errors import InvalidInput
from forescale.forecast import refit
from forescale.forecast.boosting import BoostingFit, BoostingModel
from forescale.forecast.forecaster import Array
from forescale.forecast.lstm import LstmModel
from forescale.forecast.members.member import Targets
from forescale.forecast.prophet import ProphetModel
from forescale.forecast.refit import SlowModel
from forescale.forecast.statistical import Method, StatisticalModel

LEVELS = (0.1, 0.5, 0.9, 0.99)
TARGETS = Targets(lead_steps_J=np.array([1, 6, 6]), peak_J=np.array([False, False, True]))

needs_statsforecast = pytest.mark.skipif(find_spec("statsforecast") is None, reason="forescale[forecast]")
needs_lightgbm = pytest.mark.skipif(find_spec("lightgbm") is None, reason="forescale[forecast]")
needs_prophet = pytest.mark.skipif(find_spec("prophet") is None, reason="forescale[forecast]")
STATISTICAL = [
    pytest.param(StatisticalModel(method=method, season_steps=12), id=method, marks=needs_statsforecast)
    for method in Method
]
PROPHET = pytest.param(ProphetModel(step_s=300.0, season_steps=12), id="Prophet", marks=needs_prophet)
LIGHTGBM = pytest.param(BoostingModel(season_steps=12), id="LightGBM", marks=needs_lightgbm)
LSTM = pytest.param(LstmModel(season_steps=12, updates=120), id="LSTM")
MODELS = [*STATISTICAL, PROPHET, LIGHTGBM, LSTM]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def seasonal() -> Array:
    """A season of twelve steps between 60 and 140, noise of 2."""
    steps = np.arange(600)
    noise = np.random.default_rng(0).normal(0.0, 2.0, 600)
    return 100.0 + 40.0 * np.sin(2 * np.pi * steps / 12) + noise


def season(step: int) -> float:
    return 100.0 + 40.0 * float(np.sin(2 * np.pi * step / 12))


@pytest.mark.parametrize("model", MODELS)
def test_season_is_forecast_within_its_noise(model: SlowModel, seasonal: Array) -> None:
    fit = model.fit(seasonal[:593], TARGETS, LEVELS)
    quantiles = fit.quantiles_JL(seasonal[:593], 0)
    assert quantiles.shape == (3, 4)
    assert (np.diff(quantiles, axis=1) >= 0).all()
    assert quantiles[0, 1] == pytest.approx(season(593), abs=12.0)
    assert quantiles[1, 1] == pytest.approx(season(598), abs=12.0)
    assert quantiles[2, 1] >= max(season(step) for step in range(593, 599)) - 12.0
    assert (quantiles[:2, 3] - quantiles[:2, 0]).max() < 60.0  # the series itself spans more than 80


@pytest.mark.parametrize("model", MODELS)
def test_constant_series_goes_on(model: SlowModel) -> None:
    quantiles = model.fit(np.full(100, 7.0), TARGETS, LEVELS).quantiles_JL(np.full(100, 7.0), 3)
    assert quantiles == pytest.approx(np.full((3, 4), 7.0), abs=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_few_and_idle_values_are_no_trouble(model: SlowModel) -> None:
    idle = np.zeros(40)
    idle[[5, 30]] = 3.0
    quantiles = model.fit(idle, TARGETS, LEVELS).quantiles_JL(idle, 0)
    assert np.isfinite(quantiles).all()
    assert np.abs(quantiles).max() <= 12.0


@pytest.mark.parametrize("model", [*STATISTICAL[:1], LIGHTGBM, LSTM])
def test_fit_comes_through_another_process_unchanged(model: SlowModel, seasonal: Array) -> None:
    fit = pickle.loads(pickle.dumps(model)).fit(seasonal, TARGETS, LEVELS)
    again = pickle.loads(pickle.dumps(fit))
    assert np.array_equal(fit.quantiles_JL(seasonal, 2), again.quantiles_JL(seasonal, 2))


@needs_statsforecast
def test_levels_are_quantiles_not_widths_of_intervals() -> None:
    noise = np.random.default_rng(1).normal(50.0, 3.0, 900)
    model = StatisticalModel(method=Method.ETS)
    quantiles = model.fit(noise, TARGETS, (0.1, 0.5, 0.95)).quantiles_JL(noise, 0)
    assert quantiles[0] == pytest.approx([50 - 1.28 * 3, 50.0, 50 + 1.645 * 3], abs=0.8)


@pytest.mark.parametrize("model", [LIGHTGBM, pytest.param(LstmModel(updates=20), id="LSTM")])
def test_learned_models_see_the_newest_values_not_those_of_their_fit(model: SlowModel) -> None:
    walk = np.cumsum(np.random.default_rng(2).normal(0.0, 1.0, 500))
    fit = model.fit(walk, TARGETS, LEVELS)
    shifted = fit.quantiles_JL(walk + 1000.0, 0) - fit.quantiles_JL(walk, 0)
    assert shifted == pytest.approx(np.full((3, 4), 1000.0), abs=1e-2)


@needs_lightgbm
def test_trees_say_what_lightgbm_says(monkeypatch: pytest.MonkeyPatch, seasonal: Array) -> None:
    import lightgbm  # noqa: PLC0415 - an extra

    boosters: list[lightgbm.Booster] = []
    train = lightgbm.train

    def kept(*args: Any, **options: Any) -> lightgbm.Booster:
        boosters.append(train(*args, **options))
        return boosters[-1]

    monkeypatch.setattr(lightgbm, "train", kept)
    fit = BoostingModel(season_steps=12).fit(seasonal, TARGETS, LEVELS)
    assert isinstance(fit, BoostingFit)
    rows, _, _ = fit.sight.of(seasonal)
    for row in rows[[0, 100, 599]]:
        said = [np.asarray(booster.predict(row[None])).item() for booster in boosters]
        assert fit.forest.values_K(row) == pytest.approx(said)


@needs_lightgbm
def test_a_maximum_is_learned_as_such_not_as_the_largest_of_single_steps() -> None:
    """Of noise, the median of the largest of six is above the median of each."""
    noise = np.random.default_rng(3).normal(50.0, 3.0, 1500)
    quantiles = BoostingModel().fit(noise, TARGETS, LEVELS).quantiles_JL(noise, 0)
    assert quantiles[1, 1] == pytest.approx(50.0, abs=1.5)
    assert quantiles[2, 1] == pytest.approx(50.0 + 1.2 * 3.0, abs=1.5)


def test_network_gives_the_same_for_the_same_seed(seasonal: Array) -> None:
    fits = [LstmModel(seed=seed, updates=20).fit(seasonal[:200], TARGETS, LEVELS) for seed in (0, 0, 1)]
    same, again, other = (fit.quantiles_JL(seasonal[:200], 0) for fit in fits)
    assert np.array_equal(same, again)
    assert not np.array_equal(same, other)


@pytest.mark.parametrize(
    "model", [StatisticalModel(method=Method.ETS), ProphetModel(step_s=60.0), BoostingModel()]
)
def test_without_the_extra_one_line_says_what_to_install(
    model: SlowModel, seasonal: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit, "find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"pip install 'forescale\[forecast\]'"):
        model.fit(seasonal, TARGETS, LEVELS)
