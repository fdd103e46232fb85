"""Load that comes whatever the server does: requests at given times, over as many connections as it takes."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, cast

import numpy as np
import uvloop

BROKEN = 0
"""In the place of a status: the connection broke, or no answer came."""

_PATIENCE_S = 60.0
_KEPT_BYTES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of request.

    Attributes:
        share: of all requests.
        request: all of it, head and body.
    """

    name: str
    share: float
    request: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of a request.

    Attributes:
        at_s: when it was sent, from the start on.
        lag_s: how much later than planned that was.
        latency_s: from sending to the whole answer.
        status: of HTTP, or ``BROKEN``.
        body: how it begins.
    """

    kind: str
    at_s: float
    lag_s: float
    latency_s: float
    status: int
    body: bytes


def post(path: str, body: bytes, headers: Sequence[str] = ()) -> bytes:
    """A request as it goes over the wire."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def statuses(answers: Sequence[Answer]) -> dict[str, int]:
    """How many answers of each status."""
    counts = Counter(answer.status for answer in answers)
    return {"broken" if status == BROKEN else str(status): count for status, count in counts.items()}


class _Connection(asyncio.Protocol):
    """One request at a time; a new connection for each that finds all others busy."""

    def __init__(self, idle: list[_Connection]) -> None:
        self._idle = idle
        self._buffer = b""
        self._waiting: asyncio.Future[tuple[int, bytes]] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not derived from it

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        assert self._transport is not None
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._waiting

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
        if len(rest) < int(fields.get(b"content-length", b"0")):
            return
        self._buffer = b""
        self._finish(int(head[9:12]), rest)
        if fields.get(b"connection", b"").strip() != b"close":
            self._idle.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._idle:
            self._idle.remove(self)
        self._finish(BROKEN, str(exc or "closed").encode())

    def _finish(self, status: int, body: bytes) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result((status, body))


async def _offer(
    port: int, times_s: Sequence[float], kinds: Sequence[Kind], stop: asyncio.Event
) -> list[Answer]:
    loop = asyncio.get_running_loop()
    idle: list[_Connection] = []
    answers: list[Answer] = []
    start_s = time.perf_counter()

    async def send(kind: Kind, planned_s: float) -> None:
        sent_s = time.perf_counter()
        try:
            if idle:
                connection = idle.pop()
            else:
                _, connection = await loop.create_connection(lambda: _Connection(idle), "127.0.0.1", port)
            async with asyncio.timeout(_PATIENCE_S):
                status, body = await connection.ask(kind.request)
        except (OSError, TimeoutError) as error:
            status, body = BROKEN, repr(error).encode()
        done_s = time.perf_counter()
        answers.append(
            Answer(
                kind=kind.name,
                at_s=sent_s - start_s,
                lag_s=sent_s - start_s - planned_s,
                latency_s=done_s - sent_s,
                status=status,
                body=body[:_KEPT_BYTES],
            )
        )

    async with asyncio.TaskGroup() as tasks:
        for planned_s, kind in zip(times_s, kinds, strict=True):
            wait_s = planned_s - (time.perf_counter() - start_s)
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            if stop.is_set():
                break
            tasks.create_task(send(kind, planned_s))
    return answers


def offer(port: int, kinds: Sequence[Kind], *, per_s: float, seconds: float, seed: int = 0) -> list[Answer]:
    """Send Poisson arrivals for so long; return when all are answered."""
    return _run(port, *_poisson(kinds, per_s, seconds, seed), None)


def offer_at(port: int, kind: Kind, times_s: Sequence[float]) -> list[Answer]:
    """Send requests at given times, ascending; return when all are answered."""
    return _run(port, times_s, [kind] * len(times_s), None)


class Traffic:
    """The same in a thread, for as long as a ``with`` block takes; then ``answers`` are there."""

    def __init__(self, port: int, kinds: Sequence[Kind], *, per_s: float, seed: int = 0) -> None:
        self.answers: list[Answer] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=lambda: self.answers.extend(_run(port, *_poisson(kinds, per_s, 600, seed), self._stop)),
            daemon=True,
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()


def _poisson(
    kinds: Sequence[Kind], per_s: float, seconds: float, seed: int
) -> tuple[list[float], list[Kind]]:
    rng = np.random.default_rng(seed)
    times_s = np.cumsum(rng.exponential(1 / per_s, round(per_s * seconds)))
    chosen = rng.choice(len(kinds), len(times_s), p=[kind.share for kind in kinds])
    return times_s.tolist(), [kinds[number] for number in chosen]


def _run(
    port: int, times_s: Sequence[float], kinds: Sequence[Kind], end: threading.Event | None
) -> list[Answer]:
    async def run() -> list[Answer]:
        stop = asyncio.Event()
        watch = asyncio.create_task(_watch(end, stop)) if end else None
        answers = await _offer(port, times_s, kinds, stop)
        if watch:
            watch.cancel()
        return answers

    gc.collect()
    gc.freeze()  # what torch and others hold must not be looked through while times are taken
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


async def _watch(end: threading.Event, stop: asyncio.Event) -> None:
    while not end.is_set():
        await asyncio.sleep(0.05)
    stop.set()
