"""What the controller needs of a data plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from forescale.engine.serve import orders


class DataPlane(Protocol):
    """Who serves; ``engine.serve.adoption.DataPlane`` does."""

    async def exchange(
        self, commands: Sequence[orders.Command] = (), *, acknowledged: int = 0, wait_s: float = 0.0
    ) -> orders.PlaneState:
        """Give commands and learn how things are, at the latest after ``wait_s``. One at a time.

        Raises:
            PeerGone: the data plane is gone, and all it served; another one is there at the next call.
        """
        ...

    def answer_now(self) -> None:
        """Let the exchange under way, or else the next one, end at once."""
        ...
