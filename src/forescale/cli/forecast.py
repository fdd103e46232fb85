"""``forescale forecast``."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from forescale.cli import options
from forescale.cli.console import late_fraction_bar, print_json
from forescale.cli.output import check_writable
from forescale.core.errors import InvalidInput

if TYPE_CHECKING:
    from forescale.forecast.series import Combination, Series

_PICTURES = (".svg", ".png", ".pdf")
_BESIDE = "NAME-forecast.svg"
_COMBINATIONS = ("sum", "mean", "count")

File = Annotated[
    Path,
    typer.Argument(
        metavar="SERIES.csv",
        help="Text with one value a line, or a column of times (ISO 8601, seconds or milliseconds since "
        "1970, steps) and columns of values, or times alone, each an event.",
    ),
]
StepS = Annotated[
    float | None,
    typer.Option(
        metavar="S", help="Seconds between values; resamples if the file has times. Default: the file's."
    ),
]
HorizonS = Annotated[
    list[float] | None,
    typer.Option(metavar="S", help="How many seconds ahead; repeatable. Default: 1, 5, 15 and 60 steps."),
]
Column = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Column to forecast, by name or number. Default: y, value or the first."
    ),
]
SeasonS = Annotated[
    float | None,
    typer.Option(metavar="S", help="Length of a season in seconds. Default: a day, if the file holds two."),
]
Combine = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(_COMBINATIONS),
        help="What becomes of lines that fall into one step. Default: whole numbers are summed, others "
        "averaged, events counted.",
    ),
]
Plot = Annotated[
    str | None,
    typer.Option(
        metavar="[FILE]", help=f"Draw a fan chart: .svg, .png or .pdf. Default: {_BESIDE}, in this folder."
    ),
]
Tested = Annotated[
    bool, typer.Option("--backtest", help="Forecast the last half of the file and score it beside others.")
]


class OptionalPlotFile(TyperCommand):
    """A command whose ``--plot`` may stand alone; what follows is its file if it is named as a picture."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--plot" in args:
            following = args.index("--plot") + 1
            if not "".join(args[following : following + 1]).lower().endswith(_PICTURES):
                args = [*args[:following], _BESIDE, *args[following:]]
        return super().parse_args(ctx, args)


def forecast(  # noqa: PLR0913, PLR0917 - typer takes the options from the signature
    file: File,
    step_s: StepS = None,
    horizon_s: HorizonS = None,
    column: Column = None,
    season_s: SeasonS = None,
    combine: Combine = None,
    plot: Plot = None,
    backtest: Tested = False,
    json: options.Json = False,
) -> None:
    """Forecasts a series: quantiles of what comes next, and of the highest value until then."""
    for name, value in (("step", step_s), ("season", season_s), *(("horizon", h) for h in horizon_s or ())):
        if value is not None and not 0.0 < value < inf:
            raise InvalidInput(f"--{name}-s is {value:g}; give seconds above 0")
    picture = _picture(plot, file) if plot is not None else None
    from forescale.cli import forecast_view
    from forescale.cli.forecast_learning import learn

    combination = _combination(combine)
    with late_fraction_bar("forecast:") as progress:
        series = _read(file, step_s, column, combination, progress)
        found, tested = learn(
            series,
            horizon_s=horizon_s,
            season_s=season_s,
            fan=picture is not None,
            backtest=backtest,
            progress=progress,
        )
    if picture is not None:
        from forescale.cli.forecast_plot import write_fan_chart

        write_fan_chart(picture, found)
    if json:
        print_json(forecast_view.as_json(found, tested, picture))
    else:
        forecast_view.show(file.name, found, tested, picture)


# --- what is asked ---------------------------------------------------------------------------------------


def _combination(combine: str | None) -> Combination | None:
    if combine is None or combine == "sum" or combine == "mean" or combine == "count":  # noqa: PLR1714 - narrows
        return combine
    raise InvalidInput(f"--combine is {', '.join(_COMBINATIONS[:-1])} or {_COMBINATIONS[-1]}, not {combine}")


def _picture(plot: str, file: Path) -> Path:
    """Where the picture goes; asked before the work that would be lost."""
    path = Path(f"{file.stem}-forecast.svg" if plot == _BESIDE else plot)
    if path.suffix.lower() not in _PICTURES:
        raise InvalidInput(f"--plot writes {', '.join(_PICTURES)}, not {path.name}")
    if find_spec("matplotlib") is None:
        raise InvalidInput("--plot needs matplotlib: pip install 'forescale[report]'")
    check_writable(path)
    return path


# --- reading ------------------------------------------------------------------------------------------------


def _read(
    path: Path,
    step_s: float | None,
    column: str | None,
    combination: Combination | None,
    progress: Callable[[str, float], None],
) -> Series:
    from forescale.forecast.series import read_series

    if path.is_dir():
        raise InvalidInput(f"cannot read {path}: it is a folder")
    try:
        with path.open("rb") as file:
            if b"\0" in file.peek(8192):
                raise InvalidInput("it is not text, but binary")
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            lines = _told(text, os.fstat(file.fileno()).st_size, progress)
            return read_series(lines, step_s=step_s, column=column, combination=combination)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"cannot read {path}: it is not text in UTF-8") from error
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error


def _told(lines: Iterator[str], size_bytes: int, progress: Callable[[str, float], None]) -> Iterator[str]:
    done = 0
    for number, line in enumerate(lines):
        done += len(line)
        if number % 4096 == 0:
            progress("reading", min(1.0, done / max(size_bytes, 1)))
        yield line
