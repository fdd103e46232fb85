"""What controller and data plane say to each other over their socket."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import orjson

from forescale.engine.serve.exchange import Connection, Listener, connect
from forescale.engine.serve.orders import Exchange, PlaneState, VersionState
from forescale.engine.serve.routing import Route
from forescale.engine.serve.server import listen_at
from version_states import version_state

ASLEEP = version_state("m")
OTHER = replace(ASLEEP, version="2")


class ScriptedPlane:
    """Answers with states, one after the other."""

    def __init__(self, *states: tuple[VersionState, ...], routes: Sequence[str] = ()) -> None:
        self._states = [PlaneState(plane="p", devices=(), versions=versions) for versions in states]
        self._states += [
            PlaneState(plane="p", devices=(), routes={"m": Route(version=version)}) for version in routes
        ]

    async def exchange(self, _asked: Exchange) -> PlaneState:
        return self._states.pop(0)

    def answer_now(self) -> None: ...


def with_plane(plane: ScriptedPlane, talk: Callable[[Path, asyncio.Event], Awaitable[None]]) -> None:
    """``talk`` is told where the plane listens, and is to leave it alone: the event says that it is."""

    async def scenario() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path, away = Path(folder) / "control", asyncio.Event()
            listener = Listener(plane, on_away=away.set, on_back=away.clear)  # type: ignore[arg-type]
            async with asyncio.timeout(10), listener.listening(listen_at(path)):
                await talk(path, away)
                await away.wait()

    asyncio.run(scenario())


async def versions(connection: Connection) -> dict[str, int]:
    state = await connection.exchange(Exchange())
    return {each.version: each.arrived_rows for each in state.versions}


def test_a_state_is_whole_though_only_changes_are_told() -> None:
    busy = replace(OTHER, arrived_rows=3)

    async def talk(path: Path, away: asyncio.Event) -> None:
        connection = await connect(path)
        assert await versions(connection) == {"1": 0, "2": 0}
        assert await versions(connection) == {"1": 0, "2": 3}
        assert await versions(connection) == {"2": 3}
        connection.close()
        await away.wait()
        again = await connect(path)
        assert await versions(again) == {"1": 0, "2": 3}
        again.close()

    with_plane(ScriptedPlane((ASLEEP, OTHER), (ASLEEP, busy), (busy,), (ASLEEP, busy)), talk)


def test_versions_that_sleep_are_not_told_again() -> None:
    async def talk(path: Path, _away: asyncio.Event) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        told: list[list[str]] = []
        for _ in range(3):
            writer.write((2).to_bytes(4) + b"{}")
            length_bytes = int.from_bytes(await reader.readexactly(4))
            answer = orjson.loads(await reader.readexactly(length_bytes))
            told.append([each["version"] for each in answer["changed"]] + answer["gone"])
            assert answer["routes"] is None
        assert told == [["1", "2"], [], [["m", "2"]]]
        writer.close()

    with_plane(ScriptedPlane((ASLEEP, OTHER), (ASLEEP, OTHER), (ASLEEP,)), talk)


def test_a_version_that_takes_the_place_of_one_that_is_gone_is_told() -> None:
    async def talk(path: Path, _away: asyncio.Event) -> None:
        connection = await connect(path)
        assert await versions(connection) == {"1": 0, "2": 0}
        assert await versions(connection) == {"2": 0, "3": 0}
        assert await versions(connection) == {"2": 0, "1": 0}
        connection.close()

    third = replace(ASLEEP, version="3")
    with_plane(ScriptedPlane((ASLEEP, OTHER), (OTHER, third), (OTHER, ASLEEP)), talk)


def test_routes_are_known_though_they_are_told_only_when_one_has_changed() -> None:
    async def talk(path: Path, away: asyncio.Event) -> None:
        connection = await connect(path)
        first, same, other = [(await connection.exchange(Exchange())).routes for _ in range(3)]
        assert first == {"m": Route(version="1")}
        assert same is first
        assert other == {"m": Route(version="2")}
        connection.close()
        await away.wait()
        again = await connect(path)
        assert (await again.exchange(Exchange())).routes == other
        again.close()

    with_plane(ScriptedPlane(routes=("1", "1", "2", "2")), talk)
