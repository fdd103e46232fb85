"""The command ``forescale forecast``, run as a user would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from forescale.cli.main import app


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["forecast", *(str(word) for word in words)])


def forecast(*words: str | Path) -> dict[str, Any]:
    """What it prints with ``--json``."""
    result = run(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def error(*words: str | Path) -> str:
    """The one line it says of wrong input."""
    result = run(*words)
    assert result.exit_code == 2
    assert not result.stdout
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr
