"""What happens is written down, whether the data plane tells of it or the controller decides it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import structlog

from forescale.core.errors import RegistryFailed
from forescale.engine.serve import orders
from forescale.registry.records import Happening
from forescale.registry.registry import Registry

_BY = "forescale"
_PAUSE_S = 1.0  # after something that the next attempt may find mended


class Diary:
    """Writes down what happens, each once, and remembers what of it the data plane may forget."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._queue: asyncio.Queue[tuple[Happening, str, orders.Happened | None]] = asyncio.Queue()
        self._taken: Counter[str] = Counter()
        self._written: Counter[str] = Counter()

    def put(self, happening: Happening) -> None:
        self._queue.put_nowait((happening, "", None))

    def take(self, seen: orders.PlaneState) -> Iterator[orders.Happened]:
        """What the data plane tells for the first time, to be written down."""
        for happened in seen.happenings:
            if happened.number > self._taken[seen.plane]:
                self._taken[seen.plane] = happened.number
                happening = Happening(
                    kind=happened.kind, subject=happened.model, by=_BY, detail=happened.detail
                )
                self._queue.put_nowait((happening, seen.plane, happened))
                yield happened

    def written(self, plane: str) -> int:
        """Number of the last one of that data plane that is written down."""
        return self._written[plane]

    async def write(self) -> None:
        while True:
            happening, plane, happened = await self._queue.get()
            await self._record(happening, happened and happened.at_s)
            if happened is not None:
                self._written[plane] = happened.number

    async def _record(self, happening: Happening, at_s: float | None) -> None:
        while True:
            try:
                await asyncio.to_thread(self._registry.record, happening, at_s=at_s)
            except RegistryFailed as error:
                structlog.get_logger().error("event_not_kept", error=str(error))
                await asyncio.sleep(_PAUSE_S)
            else:
                return
