"""``forescale forecast``."""

from __future__ import annotations

import os
from contextlib import ExitStack
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from forescale.cli import options
from forescale.cli.console import late_fraction_bar, print_json
from forescale.cli.output import check_writable
from forescale.cli.text_file import read_text
from forescale.core.errors import InvalidInput

if TYPE_CHECKING:
    from forescale.cli.forecast_learning import Slow
    from forescale.forecast.events import Plan
    from forescale.forecast.series import Combination

_PICTURES = (".svg", ".png", ".pdf")
_OTHER_PICTURES = (".jpg", ".jpeg", ".gif", ".webp", ".tif", ".tiff", ".bmp", ".eps", ".ps")
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
Members = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help="Slow models to be members too: lightgbm, lstm (fitted at 8 places of the series), ets, arima, "
        "theta, mstl, prophet (at 100).",
    ),
]
Events = Annotated[
    Path | None,
    typer.Option(
        metavar="EVENTS.csv",
        help="Planned events, past ones and those to come: columns start, end and name; events of one name "
        "are of one kind.",
    ),
]
Calendar = Annotated[bool, typer.Option("--calendar", help="Go by the time of day and of the week, too.")]


class OptionalPlotFile(TyperCommand):
    """A command whose ``--plot`` may stand alone; what follows is its file if it is named as a picture."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--plot" in args:
            following = args.index("--plot") + 1
            if not "".join(args[following : following + 1]).lower().endswith(_PICTURES + _OTHER_PICTURES):
                args = [*args[:following], _BESIDE, *args[following:]]
        return super().parse_args(ctx, args)


def forecast(  # noqa: PLR0913, PLR0917 - typer takes the options from the signature
    file: File,
    step_s: StepS = None,
    horizon_s: HorizonS = None,
    column: Column = None,
    season_s: SeasonS = None,
    combine: Combine = None,
    members: Members = None,
    events: Events = None,
    calendar: Calendar = False,
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
    from forescale.cli.forecast_learning import Wanted, learn
    from forescale.forecast.series import read_series

    combination = _combination(combine)
    plan = _plan(events) if events is not None else None
    with ExitStack() as stack:
        slow = _slow(members, stack) if members is not None else None
        progress = stack.enter_context(late_fraction_bar("forecast:"))
        series = read_text(
            file,
            lambda lines: read_series(lines, step_s=step_s, column=column, combination=combination),
            lambda fraction: progress("reading", fraction),
        )
        wanted = Wanted(
            horizon_s=horizon_s,
            season_s=season_s,
            fan=picture is not None,
            backtest=backtest,
            plan=plan,
            calendar=calendar,
            slow=slow,
        )
        found, tested = learn(series, wanted, progress)
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


def _plan(events: Path) -> Plan:
    from forescale.forecast.events import read_plan

    return read_text(events, read_plan)


def _slow(members: str, stack: ExitStack) -> Slow:
    """Processes for their fits begin at once, so that they are there when they are needed."""
    from forescale.cli.forecast_learning import Slow
    from forescale.cli.forecast_members import read_names
    from forescale.forecast.background import background_processes

    names = read_names(members)
    processes = min(len(names), len(os.sched_getaffinity(0)))
    return Slow(names=names, executor=stack.enter_context(background_processes(processes)))


def _picture(plot: str, file: Path) -> Path:
    """Where the picture goes; asked before the work that would be lost."""
    path = Path(f"{file.stem}-forecast.svg" if plot == _BESIDE else plot)
    if path.suffix.lower() not in _PICTURES:
        raise InvalidInput(f"--plot writes {', '.join(_PICTURES)}, not {path.name}")
    if find_spec("matplotlib") is None:
        raise InvalidInput("--plot needs matplotlib: pip install 'forescale[report]'")
    check_writable(path)
    return path
