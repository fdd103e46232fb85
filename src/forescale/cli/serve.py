"""``forescale serve``."""

from __future__ import annotations

import ipaddress
import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from forescale.cli.console import console
from forescale.core.errors import InvalidInput


def _take_up(context: typer.Context, path: Path | None) -> Path | None:
    """Let a file's options be the defaults of this command's."""
    if path is None:
        return None
    try:
        from forescale.api.pool_file import read_pool_file
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    said = read_pool_file(path)
    known = {option.lstrip("-"): known for known in context.command.params for option in known.opts}
    for name, value in said.options.items():
        if name not in known or name in {"config", "help"}:
            raise InvalidInput(f"{path}: {name!r} is no option of forescale serve")
        if isinstance(value, dict) or isinstance(value, list) is not known[name].multiple:
            kind = "a list" if known[name].multiple else "one value"
            raise InvalidInput(f"{path}: {name} must be {kind}")
    context.default_map = {known[name].name: value for name, value in said.options.items()}
    context.obj = said.deployments
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.toml",
        is_eager=True,
        callback=_take_up,
        help="These options by name, and tables of deployments. The command line goes before it.",
    ),
]
State = Annotated[
    Path,
    typer.Option(metavar="DIR", help="Where models, deployments and the replicas' logs are kept."),
]
Host = Annotated[
    str, typer.Option(metavar="ADDRESS", help="Address to listen on. Whoever reaches it can change anything.")
]
Port = Annotated[int, typer.Option(min=0, max=65535, metavar="PORT", help="0: any that is free.")]
Devices = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Devices for replicas: GPUs, or without GPUs shares of the cores. Default: all.",
    ),
]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Also serve models that hold code, which runs with your rights."),
]
Factories = Annotated[
    list[str] | None,
    typer.Option("--factory", metavar="MODULE:FUNCTION", help="Python function that may make models."),
]
Database = Annotated[
    str | None,
    typer.Option(metavar="URL", help="PostgreSQL for the registry. Default: SQLite in DIR."),
]
Artifacts = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Models' files: s3://, gs://, a folder. Default: in DIR."),
]


Gateways = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Processes that read requests behind the one port; more pay on machines with many cores.",
    ),
]
Lease = Annotated[
    float,
    typer.Option(
        "--lease-s",
        min=1.0,
        metavar="S",
        help="If this process is killed, its models are served on for so long, until it is started again.",
    ),
]


Forecast = Annotated[
    bool,
    typer.Option(
        "--forecast/--no-forecast",
        help="Scale models ahead of demand, or by what is seen of it alone.",
    ),
]
Checks = Annotated[
    list[str] | None,
    typer.Option(
        "--check",
        metavar="NAME=COMMAND",
        help="What rollouts may ask for: exit code 0 says that a version is good enough.",
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Tokens, one a line: who manages models must know one (FORESCALE_TOKEN). Default: anybody may.",
    ),
]
AccessLog = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Gets a line of JSON for each request. Default: none.")
]
Traces = Annotated[
    str | None,
    typer.Option(metavar="URL", help="OpenTelemetry collector (OTLP over HTTP) for traces. Default: none."),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Answer under this name, too. Default: under addresses and localhost if ADDRESS is a loopback "
        "address, otherwise under any.",
    ),
]


def serve(  # noqa: PLR0913, PLR0917 - typer takes the options from the signature
    context: typer.Context,
    config: Config = None,  # noqa: ARG001 - its options are in the others by now
    state: State = Path("forescale-state"),
    host: Host = "127.0.0.1",
    port: Port = 8080,
    devices: Devices = None,
    trust: Trust = False,
    factory: Factories = None,
    database: Database = None,
    artifacts: Artifacts = None,
    gateways: Gateways = 1,
    lease_s: Lease = 300.0,
    forecast: Forecast = True,
    check: Checks = None,
    token_file: TokenFile = None,
    access_log: AccessLog = None,
    traces: Traces = None,
    allow_host: AllowHost = None,
) -> None:
    """Serves models until Ctrl-C: an HTTP gateway, replicas of what is deployed, and their management."""
    out = console(stderr=True)
    try:
        from forescale.api.auth import read_tokens
        from forescale.api.server import PlaneOptions, ServerPlan
        from forescale.api.server import serve as run
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    plan = ServerPlan(
        state=state,
        plane=PlaneOptions(
            host=host,
            port=port,
            devices=devices,
            factories=tuple(factory or ()),
            names=tuple(allow_host or ()) if allow_host or _is_loopback(host) else None,
            access_log=access_log and access_log.absolute(),
            traces=traces,
            gateways=gateways,
        ),
        lease_s=lease_s,
        is_forecast=forecast,
        deployments=context.obj or {},
        tokens=read_tokens(token_file) if token_file else (),
        trust=trust,
        database=database,
        artifacts=artifacts,
        checks=dict(map(_check, check or ())),
    )
    if not (token_file or _is_loopback(host)):
        out.print(f"note: whoever reaches {host} can add, deploy and remove models", markup=False)
    with _log_on_stderr():
        run(plan, lambda url: out.print(f"serving on {url} (Ctrl-C ends it)", markup=False, soft_wrap=True))
    out.print("all requests answered, all replicas ended", markup=False)


def _missing(error: ModuleNotFoundError) -> InvalidInput:
    return InvalidInput(f"serving needs {error.name}: pip install 'forescale[serve]'")


def _check(text: str) -> tuple[str, str]:
    name, equals, command = text.partition("=")
    if not name or not equals or not command.strip():
        raise typer.BadParameter(f"--check: {text!r} is not of the form NAME=COMMAND")
    return name, command


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _log_on_stderr() -> Generator[None]:
    import structlog

    lines = structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"])
    structlog.configure(
        processors=[
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.add_log_level,
            *(
                (structlog.dev.ConsoleRenderer(),)
                if sys.stderr.isatty()
                else (structlog.processors.format_exc_info, lines)
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        yield
    finally:
        structlog.reset_defaults()
