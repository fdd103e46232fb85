"""What a command that fails says, and its exit code."""

from __future__ import annotations

import sys
import tempfile
import traceback
from typing import Any, NoReturn

from typer import TyperException
from typer.core import TyperGroup

from forescale.core.errors import ForescaleError, InfeasiblePlan

WRONG_INPUT = 2
INTERRUPTED = 130
UNEXPECTED = 1
INFEASIBLE = 3


class OneLineErrors(TyperGroup):
    """Commands whose errors are one line on standard error.

    Exit codes: 2 for everything Forescale raises on purpose and for a wrong command line, but 3 if nothing
    fits the devices' memory, 130 for Ctrl-C,
    1 for a fault that nobody expected, whose traceback goes to a file.
    """

    def main(self, *args: Any, **options: Any) -> NoReturn:
        options["standalone_mode"] = False
        try:
            code = super().main(*args, **options)
        except TyperException as error:
            if message := error.format_message():  # without any argument, typer has shown the help already
                _say(message + _help_hint(error))
            sys.exit(error.exit_code)
        except InfeasiblePlan as error:
            _say(str(error))
            sys.exit(INFEASIBLE)
        except ForescaleError as error:
            _say(str(error))
            sys.exit(INTERRUPTED if isinstance(error.__cause__, KeyboardInterrupt) else WRONG_INPUT)
        except Exception as error:  # noqa: BLE001 - the last place that can say something helpful
            _say(f"{type(error).__name__}: {error} (unexpected; the traceback is in {_kept(error)})")
            sys.exit(UNEXPECTED)
        if code == INTERRUPTED:
            _say("interrupted")
        sys.exit(code if isinstance(code, int) else 0)


def _say(message: str) -> None:
    print("error:", " ".join(message.split()), file=sys.stderr)


def _help_hint(error: TyperException) -> str:
    context = getattr(error, "ctx", None)
    return f" (see {context.command_path} --help)" if context else ""


def _kept(error: Exception) -> str:
    with tempfile.NamedTemporaryFile("w", prefix="forescale-", suffix=".log", delete=False) as file:
        traceback.print_exception(error, file=file)
    return file.name
