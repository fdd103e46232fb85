"""What a data plane tells of versions, for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from forescale.engine.serve.orders import VersionState


def version_state(model: str, version: str = "1", **fields: Any) -> VersionState:
    """Of a version to which nothing has happened, but for some fields."""
    nothing = VersionState(
        model=model,
        version=version,
        is_ready=False,
        outcomes={"ok": 0},
        latency=(),
        arrived_rows=0,
        waiting_rows=0,
        waiting=0,
        in_flight=0,
        batch_times={},
        max_rows=32,
    )
    return replace(nothing, **fields)
