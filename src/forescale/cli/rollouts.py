"""``forescale rollback``, ``promote``, and what ``deploy`` does for a rollout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from forescale.cli import options
from forescale.cli.console import console, print_json, table
from forescale.cli.console import status as spinner
from forescale.cli.models import connect

if TYPE_CHECKING:
    from rich.table import Table

    from forescale.api.client import Client

_PANEL = "A new version beside the old one"
_GOES_WITH = {"ctx", "model", "wait", "wait_s", "url", "json"}

Canary = Annotated[
    str | None,
    typer.Option(
        metavar="SHARES",
        help="Give it a share of the requests, then more, then all: 10% or 5%,25%,50%.",
        rich_help_panel=_PANEL,
    ),
]
Shadow = Annotated[
    str | None,
    typer.Option(
        metavar="SHARES",
        help="Give it copies of a share of the requests, then all requests: 10% or 10%,100%.",
        rich_help_panel=_PANEL,
    ),
]
BlueGreen = Annotated[
    bool,
    typer.Option(
        "--blue-green", help="Give it all requests at once, and keep the old one.", rich_help_panel=_PANEL
    ),
]
StageTime = Annotated[
    float | None,
    typer.Option(
        "--stage-s",
        min=0.0,
        metavar="S",
        help="Shortest time of a stage. Default: 60, with --blue-green 0.",
        rich_help_panel=_PANEL,
    ),
]
ProofTime = Annotated[
    float,
    typer.Option(
        "--proof-s",
        min=0.0,
        metavar="S",
        help="So long the old version is kept when the new one has all requests.",
        rich_help_panel=_PANEL,
    ),
]
MinRequests = Annotated[
    int,
    typer.Option(
        "--min-requests", min=0, metavar="N", help="Fewest requests to it in a stage.", rich_help_panel=_PANEL
    ),
]
Patience = Annotated[
    float,
    typer.Option(
        "--patience-s",
        min=0.001,
        metavar="S",
        help="A stage that is not passed by then has failed.",
        rich_help_panel=_PANEL,
    ),
]
MaxErrors = Annotated[
    str,
    typer.Option(
        "--max-errors",
        metavar="SHARE",
        help="Requests without an answer that it may have more than the old one.",
        rich_help_panel=_PANEL,
    ),
]
MaxSlowdown = Annotated[
    float,
    typer.Option(
        "--max-slowdown",
        min=1.0,
        metavar="TIMES",
        help="How many times as long its answers may take.",
        rich_help_panel=_PANEL,
    ),
]
CheckName = Annotated[
    str | None,
    typer.Option(
        "--check",
        metavar="NAME",
        help="A stage is only passed if this check succeeds; serve --check says what it runs.",
        rich_help_panel=_PANEL,
    ),
]
Manual = Annotated[
    bool,
    typer.Option("--manual", help="Stages are only left by forescale promote.", rich_help_panel=_PANEL),
]
Name = Annotated[str, typer.Argument(metavar="NAME")]
Full = Annotated[bool, typer.Option("--full", help="All requests, and the old version leaves.")]


def wanted(*, canary: str | None, shadow: str | None, blue_green: bool) -> tuple[str, list[float]] | None:
    """Strategy and shares, if a rollout is asked for."""
    asked = [("canary", canary), ("shadow", shadow), ("blue-green", "" if blue_green else None)]
    given = [(strategy, shares) for strategy, shares in asked if shares is not None]
    if not given:
        return None
    if len(given) > 1:
        raise typer.BadParameter("give one of --canary, --shadow and --blue-green")
    strategy, shares = given[0]
    return strategy, [share(text, f"--{strategy}") for text in shares.split(",")] if shares else []


def refuse_others(context: typer.Context, *, is_rollout: bool) -> None:
    """An option that says nothing here is not passed over in silence.

    Raises:
        typer.BadParameter: one of a deployment was given for a rollout, or the other way round.
    """
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name in _GOES_WITH:
            continue
        is_mine = getattr(parameter, "rich_help_panel", None) == _PANEL
        if is_rollout and not is_mine:
            raise typer.BadParameter(
                f"a rollout leaves the deployment as it is: for {parameter.opts[0]}, deploy the old version "
                "once more"
            )
        if is_mine and not is_rollout:
            raise typer.BadParameter(f"{parameter.opts[0]} needs --canary, --shadow or --blue-green")


def roll_out(
    client: Client,
    model: str,
    version: str,
    rollout: tuple[str, list[float]],
    *,
    wait_s: float | None,
    json: bool,
    **limits: Any,
) -> None:
    """Start a rollout; with ``wait_s``, see it through."""
    strategy, shares = rollout
    found = client.roll_out(model, version, strategy, shares, **limits)
    label = f"{model}@{found['version']}"
    if wait_s is not None:
        with spinner() as say:
            said = ""
            for found in client.wait_for_rollout(model, wait_s):
                if said != (said := f"{label}: {_progress(found)}"):
                    say(said)
    if json:
        print_json(found)
    elif wait_s is not None:
        console().print(f"{label} is promoted: {found['reason'] or 'nothing is worse'}", markup=False)
    else:
        old = f"{model}@{found['stable_version']}"
        console().print(
            f"{label} is being rolled out beside {old}; see forescale status", markup=False, soft_wrap=True
        )


def promote(name: Name, full: Full = False, url: options.Url = None, json: options.Json = False) -> None:
    """Lets a new version go on to its next stage, though nothing is proven."""
    with connect(url) as client:
        found = client.promote(name, fully=full)
    if json:
        print_json(found)
        return
    console().print(f"{name}@{found['version']} goes on to: {found['stage_name']}", markup=False)


def rollback(name: Name, url: options.Url = None, json: options.Json = False) -> None:
    """Goes back to the version before, while a new one is rolled out or later; no request is lost."""
    with connect(url) as client:
        version = client.roll_back(name)
    if json:
        print_json({"model": name, "version": version})
        return
    console().print(f"{name} goes back to {name}@{version}", markup=False)


def share(text: str, option: str) -> float:
    """``10%`` as 0.1."""
    try:
        if text.strip().endswith("%"):
            return float(text.strip()[:-1]) / 100.0
    except ValueError:
        pass
    raise typer.BadParameter(f"{option}: {text!r} is not a share such as 10%")


def picture(deployments: list[dict[str, Any]]) -> Table | None:
    """Rollouts that run, and those of what is deployed that have ended."""
    shown = table(
        "Rollouts", "new version", "instead of", "how", "state", "stage", ">requests", ">no answer", "why"
    )
    for found in deployments:
        rollout = found["rollout"]
        if rollout is None:
            continue
        counts = next(
            (each["requests"] for each in found["versions"] if each["version"] == rollout["version"]), {}
        )
        shown.add_row(
            f"{rollout['model']}@{rollout['version']}",
            f"{rollout['model']}@{rollout['stable_version']}",
            rollout["strategy"],
            rollout["state"],
            _stage(rollout) if rollout["state"] == "running" else "",
            str(sum(counts.values())) if counts else "",
            str(sum(counts.values()) - counts["ok"]) if counts else "",
            rollout["reason"],
        )
    return shown if shown.row_count else None


def _stage(rollout: dict[str, Any]) -> str:
    is_waiting = "" if rollout["is_open"] else ", waits for replicas"
    by_hand = ", waits for promote" if rollout["is_manual"] and rollout["is_open"] else ""
    number = f"{rollout['stage'] + 1} of {len(rollout['shares']) + 1}"
    return f"{number}: {rollout['stage_name']}{is_waiting}{by_hand}"


def _progress(rollout: dict[str, Any]) -> str:
    return f"{rollout['state']}, stage {_stage(rollout)}"
