"""The data plane's end of its readers: it starts them, tells them what is served, and answers what they ask.

What is said, as items of ``turns.py``:

```text
reader                                                     data plane
                                           ◄── [0, catalogue as JSON]   whenever it has changed
[0]                                        ──►                          it listens
[number, model, version, whether the client named it,
 flow, priority, timeout_s, rows, size_bytes,
 free_lengths, whether it is traced,
 [[data type, shape, bytes], ...]]         ──►
                                           ◄── [number, journey, [[name, data type, shape, bytes], ...]]
                                               or [number, journey, None, HTTP status, error, retry_after_s]
```

A journey is None, or when the request arrived and [[when it was sent, replica, rows of the batch], ...], by
the monotonic clock that all processes of a machine have together.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import traceback
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import structlog
from pydantic import TypeAdapter

from forescale.core.errors import ModelFailed, PeerGone, RequestFailed, TooBusy
from forescale.core.signature import Signature
from forescale.engine.serve.arrays import DTYPES, Array, pack
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.journey import Journey
from forescale.engine.serve.middleware import Middleware
from forescale.engine.serve.requests import InferRequest
from forescale.engine.serve.routing import Route
from forescale.engine.serve.server import listen_at
from forescale.engine.serve.turns import Item, Turns

_SOURCE_ROOT = str(Path(__file__).resolve().parents[3])
_PROGRAM = f"""\
import sys
sys.path.insert(0, {_SOURCE_ROOT!r})
from forescale.engine.serve.reader import main
main()
"""
_GRACE_S = 15.0  # longer than its server gives requests under way
_PAUSE_S = 1.0  # before another takes the place of a reader that ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A model that is served, in which versions."""

    route: Route
    versions: dict[str, Signature]


CATALOGUE = TypeAdapter(dict[str, Entry])


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderBeginning:
    """What a reader is started with.

    Attributes:
        run: folder of the sockets ``readers`` and ``http`` of the data plane, and ``api`` of the controller.
        log: file for what it has to say.
        host, port: where it listens, beside others.
        middleware: what stands before it.
    """

    run: Path
    log: Path
    host: str
    port: int
    middleware: Middleware


BEGINNING = TypeAdapter(ReaderBeginning)


class Readers:
    """All readers of a data plane."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._loop = asyncio.get_running_loop()
        self._connected: set[Turns] = set()
        self._answers: set[asyncio.Task[None]] = set()
        self._telling = False
        self._listening: set[Turns] = set()
        self._news = asyncio.Event()

    @contextlib.asynccontextmanager
    async def serving(self, number: int, beginning: ReaderBeginning) -> AsyncGenerator[None]:
        """Keep so many running; all listen when the block begins, and answer what is under way at its end."""
        self._gateway.on_change = self._tell_soon
        server = await self._loop.create_unix_server(self._meet, sock=listen_at(beginning.run / "readers"))
        keepers = [
            asyncio.create_task(_keep(beginning, beginning.log.with_name(f"reader-{place}.log")))
            for place in range(1, number + 1)
        ]
        try:
            while len(self._listening) < number:
                await self._news.wait()
                self._news.clear()
            yield
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)
            server.close()

    def _meet(self) -> Turns:
        turns = Turns(self._hear, self._lose)
        self._connected.add(turns)
        self._tell_soon()
        return turns

    def _lose(self, reader: Turns) -> None:
        self._connected.discard(reader)
        self._listening.discard(reader)

    def _tell_soon(self) -> None:
        if not self._telling:
            self._telling = True
            self._loop.call_soon(self._tell)

    def _tell(self) -> None:
        self._telling = False
        catalogue: dict[str, Entry] = {
            model: Entry(route=route, versions={}) for model, route in self._gateway.routes().items()
        }
        for served in self._gateway.all():
            catalogue[served.model].versions[served.version] = served.signature
        item = [0, CATALOGUE.dump_json(catalogue)]
        for reader in self._connected:
            with contextlib.suppress(PeerGone):
                reader.say(item)

    def _hear(self, reader: Turns, item: Item) -> None:
        if item == [0]:
            self._listening.add(reader)
            self._news.set()
            return
        answer = asyncio.create_task(self._answer(reader, item))
        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)

    async def _answer(self, reader: Turns, item: Item) -> None:
        number, is_traced = item[0], item[10]
        journey = Journey() if is_traced else None
        try:
            answer: Item = [await self._infer(journey, *item[1:])]
        except Exception as error:  # noqa: BLE001 - whatever it is, the client is told
            failed = error
            if not isinstance(failed, RequestFailed):
                structlog.get_logger().error("request_failed", traceback=traceback.format_exc())
                failed = ModelFailed("internal error; the server's log tells more")
            answer = [None, *_fields(failed)]
        with contextlib.suppress(PeerGone):
            reader.say([number, journey and journey.to_item(), *answer])

    async def _infer(  # noqa: PLR0913, PLR0917 - as the message has it
        self,
        journey: Journey | None,
        model: str,
        version: str,
        is_named: bool,
        flow: str,
        priority: int,
        timeout_s: float | None,
        rows: int,
        size_bytes: int,
        free_lengths: list[int],
        _is_traced: bool,
        inputs: list[Item],
    ) -> list[Item]:
        served = self._gateway.find(model, version)
        request = InferRequest(
            id=None,
            inputs=tuple(_array(*tensor) for tensor in inputs),
            rows=rows,
            size_bytes=size_bytes,
            free_lengths=tuple(free_lengths),
            outputs=(),
            priority=priority,
            timeout_s=timeout_s,
            journey=journey,
        )
        if not is_named:
            self._gateway.copy(request, served)
        tensors, frames = pack(await served.infer(request, flow))
        return [
            [tensor.name, tensor.datatype, tensor.shape, frame]
            for tensor, frame in zip(tensors, frames, strict=True)
        ]


def _array(datatype: str, shape: list[int], octets: bytes) -> Array:
    return np.frombuffer(octets, DTYPES[datatype]).reshape(shape)


def _fields(error: RequestFailed) -> tuple[int, str, float]:
    return error.status, str(error), error.retry_after_s if isinstance(error, TooBusy) else 0.0


async def _keep(beginning: ReaderBeginning, log: Path) -> None:
    """One reader, and another one whenever it has ended, until cancelled."""
    said = BEGINNING.dump_json(replace(beginning, log=log)).decode()
    while True:
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-c", _PROGRAM, said),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_GRACE_S):
                        await process.wait()
                process.kill()
            await process.wait()
            raise
        structlog.get_logger().error("reader_lost", process=process.pid, code=code)
        await asyncio.sleep(_PAUSE_S)
