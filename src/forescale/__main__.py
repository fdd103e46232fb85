"""``python -m forescale``."""

from __future__ import annotations

from forescale.cli.main import app

if __name__ == "__main__":
    app(prog_name="forescale")
