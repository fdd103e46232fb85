"""A request on its way through a served model, and who waits for its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from forescale.core.errors import RequestFailed
from forescale.engine.serve.arrays import Array
from forescale.engine.serve.queues import Entry
from forescale.engine.serve.requests import InferRequest

Outputs = Mapping[str, Array]


class Job:
    """A request, and what it has been through.

    Attributes:
        losses: replicas that died with it.
        alone: whether it shares no batch any more.
    """

    __slots__ = ("alone", "answer", "losses", "request")

    def __init__(self, request: InferRequest, answer: asyncio.Future[Outputs]) -> None:
        self.request = request
        self.answer = answer
        self.losses = 0
        self.alone = False


def refuse(entry: Entry[Job], error: RequestFailed) -> None:
    """Let whoever waits for a request know; harmless if it is answered already."""
    if not entry.item.answer.done():
        entry.item.answer.set_exception(error)
