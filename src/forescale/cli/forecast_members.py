"""Slow models as members, by the names that the command line has for them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

from forescale.core.errors import InvalidInput
from forescale.forecast.members.refitted import SlowMembers
from forescale.forecast.refit import SlowModel, require

PACKAGES = {
    "lightgbm": "lightgbm",
    "prophet": "prophet",
    "ets": "statsforecast",
    "arima": "statsforecast",
    "theta": "statsforecast",
    "mstl": "statsforecast",
    "lstm": "torch",
}
"""What has to be installed for each."""
_LASTING = frozenset({"lightgbm", "lstm"})
"""Whose fits look at the newest values; what others forecast is as old as their fit."""
_FITS, _FITS_OF_LASTING = 100, 8
"""How often one is fitted to a series whose past is replayed."""


def read_names(members: str) -> tuple[str, ...]:
    """Names, separated by commas.

    Raises:
        InvalidInput: there is no such member, or it is not installed.
    """
    names = tuple(dict.fromkeys(name.strip().lower() for name in members.split(",") if name.strip()))
    for name in names:
        if name not in PACKAGES:
            raise InvalidInput(f"--members knows no {name!r}; there are {', '.join(PACKAGES)}")
        require(PACKAGES[name])
    if not names:
        raise InvalidInput(f"--members names none of {', '.join(PACKAGES)}")
    return names


def slow_members(
    names: Sequence[str], executor: Executor, *, step_s: float, season_steps: int | None, length: int
) -> tuple[SlowMembers, ...]:
    """Fitted at places that divide a series of ``length`` values, and used from the value after each."""
    groups = {
        fits: [name for name in names if (name in _LASTING) is lasting]
        for fits, lasting in ((_FITS_OF_LASTING, True), (_FITS, False))
    }
    return tuple(
        SlowMembers(
            models=[_model(name, step_s, season_steps) for name in group],
            executor=executor,
            every_steps=-(-length // fits),
            waits=True,
        )
        for fits, group in groups.items()
    )


def _model(name: str, step_s: float, season_steps: int | None) -> SlowModel:
    match name:
        case "lightgbm":
            from forescale.forecast.boosting import BoostingModel

            return BoostingModel(season_steps=season_steps)
        case "prophet":
            from forescale.forecast.prophet import ProphetModel

            return ProphetModel(step_s=step_s, season_steps=season_steps)
        case "lstm":
            from forescale.forecast.lstm import LstmModel

            return LstmModel(season_steps=season_steps)
        case _:
            from forescale.forecast.statistical import Method, StatisticalModel

            return StatisticalModel(method=Method[name.upper()], season_steps=season_steps)
