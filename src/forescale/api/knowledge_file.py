"""The file that keeps what was learned while serving: forecasts, and what was measured of versions.

It is a zip archive of arrays, as numpy writes them, one of which is JSON. Nothing in it is unpickled.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import zipfile
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import structlog

from forescale.control.demand import DemandForecast
from forescale.control.knowledge import Knowledge
from forescale.core.clock import Clock
from forescale.core.errors import InvalidInput
from forescale.engine.serve.plane import within

_FORMAT = "forescale knowledge 1"
_JSON = "json"
_ARRAY = ":array"  # no model is called so
_MOST_BYTES = 300_000_000  # of forecasts: a thousand models
_PAUSE_S = 60.0
_BUSY_SHARE = 0.02  # of the time, that writing may take


@contextlib.asynccontextmanager
async def kept(knowledge: Knowledge, path: Path, clock: Clock) -> AsyncGenerator[None]:
    """Take up what the file holds, and write what is known by then while the block runs, and at its end.

    What was measured is there at once, forecasts as soon as they are made of what was read.
    """
    found: Mapping[str, Any] = {}
    try:
        found = await asyncio.to_thread(_read, path)
        knowledge.restore(found["versions"])
    except FileNotFoundError:
        pass
    except (InvalidInput, KeyError) as error:
        found = {}
        _refuse(path, error)
    ending = asyncio.Event()
    keeping = asyncio.create_task(_keep(knowledge, path, clock, found.get("demand"), ending))
    try:
        yield
    finally:
        ending.set()
        await keeping


async def _keep(
    knowledge: Knowledge, path: Path, clock: Clock, demand: Mapping[str, Any] | None, ending: asyncio.Event
) -> None:
    if demand is not None:
        fresh = knowledge.forecast
        try:
            knowledge.forecast = await asyncio.to_thread(fresh.restored, demand, clock.monotonic_s())
        except InvalidInput as error:
            _refuse(path, error)
    pause_s = _PAUSE_S
    while True:
        await within(pause_s, ending)
        begin_s = clock.monotonic_s()
        try:
            await asyncio.to_thread(_write, path, knowledge.versions(), knowledge.forecast)
        except OSError as error:
            structlog.get_logger().warning("knowledge_not_kept", file=str(path), cause=str(error))
        if ending.is_set():
            return
        pause_s = max(_PAUSE_S, (clock.monotonic_s() - begin_s) / _BUSY_SHARE)


def _refuse(path: Path, error: Exception) -> None:
    structlog.get_logger().warning("knowledge_begins_anew", file=str(path), cause=str(error))


def _write(path: Path, versions: list[dict[str, Any]], forecast: DemandForecast) -> None:
    """Put a whole file in the place of the one before.

    Raises:
        OSError: it cannot be written; the one before is still there.
    """
    arrays: dict[str, np.ndarray] = {}
    known = {"format": _FORMAT, "versions": versions, "demand": forecast.state(_MOST_BYTES)}
    text = json.dumps(_without_arrays(known, arrays)).encode()
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            np.savez(file, **cast(Any, {_JSON: np.frombuffer(text, np.uint8), **arrays}))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _read(path: Path) -> Mapping[str, Any]:
    """What was written.

    Raises:
        FileNotFoundError: nothing was.
        InvalidInput: the file is damaged, or something else.
    """
    try:
        with path.open("rb") as file, np.load(file) as stored:
            arrays = {name: stored[name] for name in stored.files}
        known = json.loads(arrays.pop(_JSON).tobytes())
        if known["format"] != _FORMAT:
            raise InvalidInput(f"it was written by another version of Forescale ({known['format']!r})")
        return _with_arrays(known, arrays)
    except FileNotFoundError:
        raise
    except (
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
    ) as error:
        raise InvalidInput(f"it cannot be read: {error}") from error


def _without_arrays(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """JSON values; in the place of arrays their names among ``arrays``."""
    if isinstance(value, np.ndarray):
        name = f"a{len(arrays)}"
        arrays[name] = value
        return {_ARRAY: name}
    if isinstance(value, Mapping):
        return {name: _without_arrays(part, arrays) for name, part in cast(Mapping[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_without_arrays(part, arrays) for part in cast(list[Any], value)]
    return value


def _with_arrays(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """What was made JSON values of."""
    if isinstance(value, Mapping):
        parts = cast(Mapping[str, Any], value)
        if _ARRAY in parts:
            return arrays[parts[_ARRAY]]
        return {name: _with_arrays(part, arrays) for name, part in parts.items()}
    if isinstance(value, list | tuple):
        return [_with_arrays(part, arrays) for part in cast(list[Any], value)]
    return value
