"""A reader: a process that speaks HTTP and JSON, so that the data plane need not.

It reads requests into tensors and hands them to the data plane's queues, of which there is one per model
whatever the number of readers. Everything else it hands on as it came.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import cast

import uvloop

from forescale.core.clock import SystemClock
from forescale.core.errors import (
    BadRequest,
    ModelFailed,
    NotServed,
    RequestFailed,
    TooBusy,
)
from forescale.core.signature import Signature
from forescale.engine.serve.app import App, AsgiApp, Receive, Scope, Send
from forescale.engine.serve.arrays import pack, unpack
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.logs import log_to
from forescale.engine.serve.messages import Tensor
from forescale.engine.serve.middleware import wrapped
from forescale.engine.serve.proxy import Proxy
from forescale.engine.serve.readers import BEGINNING, CATALOGUE, Entry, ReaderBeginning
from forescale.engine.serve.requests import InferRequest
from forescale.engine.serve.served import Outputs
from forescale.engine.serve.server import Server, listen
from forescale.engine.serve.turns import Item, Turns

_TRIES = 3  # versions may leave one after the other


class ReaderGateway:
    """What of a gateway a reader needs to read a request and have it answered.

    Attributes:
        is_told: set once it knows what is served.
    """

    def __init__(self, chance: Callable[[], float] = random.random) -> None:
        self._chance = chance
        self.turns: Turns | None = None
        self.is_told = asyncio.Event()
        self._catalogue: dict[str, Entry] = {}
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Item]] = {}

    def hear(self, _turns: Turns, item: Item) -> None:
        number: int = item[0]
        if number == 0:
            self._catalogue = CATALOGUE.validate_json(item[1])
            self.is_told.set()
        elif not (answer := self._answers.pop(number)).done():
            answer.set_result(item)

    def lose(self) -> None:
        """The data plane is gone: nothing is answered any more."""
        self.turns = None
        self.is_told.set()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(_lost())

    def knows(self, model: str) -> bool:
        return model in self._catalogue

    def find(self, model: str, version: str | None = None) -> Asked:
        """As ``Gateway.find``."""
        entry = self._catalogue.get(model)
        chosen = entry and (entry.route.version if version is None else version)
        if entry is None or chosen not in entry.versions:
            raise NotServed(f"no model {model!r} is served here as version {version}")
        return Asked(self, model, chosen, entry.versions[chosen], is_named=version is not None)

    def choose(self, model: str, headers: Mapping[bytes, bytes]) -> Asked:
        """As ``Gateway.choose``."""
        entry = self._catalogue[model]
        version = entry.route.choose_by(headers, self._chance)
        return Asked(self, model, version, entry.versions[version], is_named=False)

    def copy(self, request: InferRequest, answered_by: Asked) -> None:
        """Nothing: copies are made where the queues are."""

    async def ask(self, asked: Asked, request: InferRequest, flow: str) -> Outputs:
        """The data plane's answer."""
        if self.turns is None:
            raise _lost()
        number = next(self._numbers)
        names = (spec.name for spec in asked.signature.inputs)
        tensors, frames = pack(dict(zip(names, request.inputs, strict=True)))
        inputs = [
            (tensor.datatype, tensor.shape, frame) for tensor, frame in zip(tensors, frames, strict=True)
        ]
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self.turns.say(
            [
                number,
                asked.model,
                asked.version,
                asked.is_named,
                flow,
                request.priority,
                request.timeout_s,
                request.rows,
                request.size_bytes,
                request.free_lengths,
                request.journey is not None,
                inputs,
            ]
        )
        _, journey, outputs, *failed = await answer
        if journey is not None and request.journey is not None:
            request.journey.follow(journey)
        if failed:
            raise _error(*failed)
        return unpack(
            [
                Tensor(name=name, datatype=datatype, shape=tuple(shape))
                for name, datatype, shape, _ in outputs
            ],
            [octets for *_, octets in outputs],
        )


class Asked:
    """The version of a model that is to answer one request."""

    def __init__(
        self, gateway: ReaderGateway, model: str, version: str, signature: Signature, *, is_named: bool
    ) -> None:
        self._gateway = gateway
        self.model = model
        self.version = version
        self.signature = signature
        self.is_named = is_named

    async def infer(self, request: InferRequest, flow: str = "") -> Outputs:
        """As ``ServedModel.infer``. If the version has left meanwhile, the one that took over answers."""
        for _ in range(_TRIES):
            try:
                return await self._gateway.ask(self, request, flow)
            except NotServed:
                # What is served now was told before that it is not served any more.
                heir = None if self.is_named else self._gateway.find(self.model)
                if heir is None or heir.version == self.version or heir.signature != self.signature:
                    raise
                self.version = heir.version
        raise NotServed(f"versions of {self.model} came and went")


def reader_app(gateway: ReaderGateway, run: Path) -> AsgiApp:
    """Inference by the data plane's queues; all else is handed on to who answers it."""
    # It is asked for ``find``, ``choose`` and ``copy`` alone.
    inference = App(cast(Gateway, gateway))
    plane, controller = Proxy(run / "http"), Proxy(run / "api")

    def answer(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        match scope["path"].split("/"):
            case ["", "v2", "models", model, *_, "infer"] if gateway.knows(model):
                return inference(scope, receive, send)
            case ["", "api", *_]:
                return controller(scope, receive, send)
            case _:
                return plane(scope, receive, send)

    return answer


def main() -> None:
    """Serve until asked to end, or until the data plane is gone."""
    beginning = BEGINNING.validate_json(sys.argv[1])
    log_to(beginning.log)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(beginning))


async def _serve(beginning: ReaderBeginning) -> None:
    loop = asyncio.get_running_loop()
    gateway = ReaderGateway()
    ending = asyncio.Event()

    def lose(_: Turns) -> None:
        gateway.lose()
        ending.set()

    path = str(beginning.run / "readers")
    _, turns = await loop.create_unix_connection(lambda: Turns(gateway.hear, lose), path)
    gateway.turns = turns
    await gateway.is_told.wait()
    loop.add_signal_handler(signal.SIGTERM, ending.set)  # until here it just ends
    listener = listen(beginning.host, beginning.port, beside_others=True)
    app = reader_app(gateway, beginning.run)
    async with (
        wrapped(app, beginning.middleware, SystemClock()) as wrapped_app,
        Server(wrapped_app, listener),
    ):
        turns.say([0])
        await ending.wait()


def _lost() -> TooBusy:
    return TooBusy("the data plane was lost", retry_after_s=1.0)


def _error(status: int, message: str, retry_after_s: float) -> RequestFailed:
    if status == NotServed.status:
        return NotServed(message)
    if status == TooBusy.status:
        return TooBusy(message, retry_after_s=retry_after_s)
    if status == ModelFailed.status:
        return ModelFailed(message)
    return BadRequest(message, status=status)
