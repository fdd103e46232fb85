"""Where output goes: results to standard output, everything else to standard error.

Where a stream is not a terminal it gets plain lines: no colours, no animation.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PLAIN_WIDTH = 160
_SOON_S = 2.0


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, width=None if stream.isatty() else _PLAIN_WIDTH)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


def table(title: str, *columns: str) -> Table:
    """An empty table; columns whose name begins with ``>`` hold figures and are aligned to the right.

    Without any column names there is no head.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    named = any(name.removeprefix(">") for name in columns)
    result = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD if named else None,
        show_header=named,
        pad_edge=False,
    )
    for name in columns:
        result.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    return result


@contextmanager
def status() -> Generator[Callable[[str], None]]:
    """Shows what is being done, as short sentences."""
    shown = console(stderr=True)
    if not shown.is_terminal:
        yield lambda text: shown.print(text, markup=False)
        return
    with shown.status("starting") as spinner:
        yield spinner.update


@contextmanager
def fraction_bar(title: str) -> Generator[Callable[[str, float], None]]:
    """A bar for work that knows how far it is: called with what is done now and the fraction, 0 to 1."""
    from rich.progress import BarColumn, Progress, TextColumn

    shown = console(stderr=True)
    if not shown.is_terminal:
        said = set[str]()

        def say(what: str, fraction: float) -> None:
            del fraction
            if what not in said:
                said.add(what)
                shown.print(f"{title} {what}", markup=False)

        yield say
        return
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=shown, transient=True) as progress:
        bar = progress.add_task("", total=1.0)
        yield lambda what, fraction: progress.update(bar, description=what, completed=fraction)


@contextmanager
def late_fraction_bar(title: str) -> Generator[Callable[[str, float], None]]:
    """A :func:`fraction_bar` for work that is mostly done at once: it shows when two seconds have passed."""
    started_s = time.monotonic()
    shown: Callable[[str, float], None] | None = None
    with ExitStack() as stack:

        def tell(what: str, fraction: float) -> None:
            nonlocal shown
            if shown is None and time.monotonic() - started_s >= _SOON_S:
                shown = stack.enter_context(fraction_bar(title))
            if shown is not None:
                shown(what, fraction)

        yield tell
