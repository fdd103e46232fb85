"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TaskReference = Annotated[
    str,
    typer.Argument(
        metavar="FILE.py[:TASK]",
        help="Python file, and the name in it of a forescale.TrainingTask or of a function that returns one "
        "(default: task).",
    ),
]
Devices = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Number of devices: GPUs, or without GPUs shares of the cores. Default: all."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="FORESCALE_URL",
        help="The server. Default: http://127.0.0.1:8080.",
        show_default=False,
    ),
]
RunFolder = Annotated[
    Path | None,
    typer.Option(
        "--dir", metavar="DIR", help="Where log, workers' output and checkpoints go. Default: runs/TIME."
    ),
]


def examples(*lines: str) -> str:
    """Text for the end of a command's help."""
    return "\n\n".join(("Examples:", *lines))
