"""What was learned while serving and is worth keeping when all processes end. Pure but for what it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, cast

from forescale.control.capacity import BatchTimes, ThreadTimes
from forescale.control.demand import DemandForecast
from forescale.control.memory import Version
from forescale.core.errors import InvalidInput
from forescale.engine.serve.orders import VersionState

_MOST = 10_000  # versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured of a version, as in ``VersionState``."""

    load_s: float | None = None
    model_bytes: int | None = None
    batch_times: ThreadTimes = field(default_factory=dict[int, BatchTimes])

    def after(self, seen: VersionState) -> Measured:
        """With what is measured now in the place of what was."""
        # A data plane that has just begun has seen batches of few sizes, with few numbers of threads.
        fresh = {
            threads: _joined(self.batch_times.get(threads, ()), times)
            for threads, times in seen.batch_times.items()
        }
        return Measured(
            load_s=self.load_s if seen.load_s is None else seen.load_s,
            model_bytes=self.model_bytes if seen.model_bytes is None else seen.model_bytes,
            batch_times={**self.batch_times, **fresh},
        )


def _joined(old: BatchTimes, new: BatchTimes) -> BatchTimes:
    by_size = {int(rows).bit_length(): (rows, taken_s) for rows, taken_s in (*old, *new)}
    return tuple(by_size[size] for size in sorted(by_size))


class Knowledge:
    """Use it in the thread of its event loop.

    Args:
        epoch_s: as in ``DemandForecast``.

    Attributes:
        forecast: the newest; what is put here is what the next decision goes on from.
    """

    def __init__(self, epoch_s: float = 0.0) -> None:
        self.forecast = DemandForecast(epoch_s=epoch_s)
        self._measured: dict[Version, Measured] = {}

    def look(self, seen: Iterable[VersionState]) -> None:
        """Learn what was measured of versions."""
        for state in seen:
            if state.load_s is None and state.model_bytes is None and not state.batch_times:
                continue  # as most of thousands
            version = state.model, int(state.version)
            self._measured[version] = self._measured.pop(version, Measured()).after(state)
        for version in list(self._measured)[: max(0, len(self._measured) - _MOST)]:
            del self._measured[version]  # nothing was heard of it for longest

    def measured(self, version: Version) -> Measured:
        return self._measured.get(version, Measured())

    @property
    def model_bytes(self) -> dict[Version, int]:
        """Of all versions whose memory was measured."""
        found = ((version, measured.model_bytes) for version, measured in self._measured.items())
        return {version: size_bytes for version, size_bytes in found if size_bytes is not None}

    def versions(self) -> list[dict[str, Any]]:
        """What was measured, as JSON values."""
        return [
            {"model": model, "version": number, **asdict(measured)}
            for (model, number), measured in self._measured.items()
        ]

    def restore(self, versions: Any) -> None:
        """Go on from that.

        Raises:
            InvalidInput: it is nothing of the kind.
        """
        try:
            found = [_measured(said) for said in versions]
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"this is nothing that was measured: {error!r}") from error
        self._measured = dict(found) | self._measured


def _measured(said: Mapping[str, Any]) -> tuple[Version, Measured]:
    load_s, model_bytes = said["load_s"], said["model_bytes"]
    batch_times = {
        int(threads): tuple((float(rows), float(taken_s)) for rows, taken_s in times)
        for threads, times in cast(dict[str, list[Any]], dict(said["batch_times"])).items()
    }
    measured = Measured(
        load_s=load_s if load_s is None else float(load_s),
        model_bytes=model_bytes if model_bytes is None else int(model_bytes),
        batch_times=batch_times,
    )
    values = [value for times in batch_times.values() for time in times for value in time]
    if not all(isfinite(value) and value > 0.0 for value in (*batch_times, *values)):
        raise ValueError("times of batches and threads must be positive")
    return (str(said["model"]), int(said["version"])), measured
