"""The series in a folder of public traces: demand and utilisation, each with its step and its season."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from forescale.core.errors import InvalidInput
from forescale.forecast.forecaster import Array
from forescale.forecast.series import read_series

DAY_S = 86400
LONGEST = 12_000  # values; longer series are cut to their last ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    name: str
    step_s: float
    values_T: Array

    @property
    def season_steps(self) -> int | None:
        """A day, if the half of the series that is seen before the first forecast holds two."""
        day = round(DAY_S / self.step_s)
        return day if 4 * day <= len(self.values_T) else None


def find_series(folder: Path) -> tuple[Series, ...]:
    """Every demand or utilisation series in a folder, or in its ``traces``; says which files hold none."""
    folder = folder / "traces" if (folder / "traces").is_dir() else folder
    found: list[Series] = []
    for path in sorted(folder.glob("*.csv")):
        try:
            found += _read(path.stem, path.read_text(encoding="utf-8").splitlines())
        except InvalidInput as error:
            print(f"{path.name} is left out: {error}")
    return tuple(found)


def _read(name: str, lines: Sequence[str]) -> Iterator[Series]:
    header, *rows = csv.reader(lines)
    match header:
        case ["t", "y"] | ["minute", "requests"]:
            values_T = np.array([float(row[1]) for row in rows])
            yield Series(name=name, step_s=_step_s(name), values_T=values_T[-LONGEST:])
        case ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]:
            yield from _per_second(name, rows)
        case ["kind", *_]:
            raise InvalidInput("availability of spot instances is neither demand nor utilisation")
        case _:
            read = read_series(lines)
            yield Series(name=name, step_s=read.step_s, values_T=read.values_T[-LONGEST:])


def _step_s(name: str) -> float:
    """What the files' description says: the step is in the name, five minutes without one."""
    if "per_minute" in name:
        return 60.0
    found = re.search(r"per_(\d+)s", name)
    return float(found[1]) if found else 300.0


def _per_second(name: str, requests: list[list[str]]) -> Iterator[Series]:
    """A log of requests as requests and as tokens a second."""
    # Seven digits of a second are one more than Python reads.
    at_s = np.array([datetime.fromisoformat(row[0][:26]).timestamp() for row in requests])
    tokens = np.array([float(row[1]) + float(row[2]) for row in requests])
    second = (at_s - at_s.min()).astype(int)
    yield Series(
        name=f"{name}_requests", step_s=1.0, values_T=np.bincount(second).astype(np.float64)[-LONGEST:]
    )
    yield Series(
        name=f"{name}_tokens", step_s=1.0, values_T=np.bincount(second, tokens).astype(np.float64)[-LONGEST:]
    )
