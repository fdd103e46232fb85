"""A replica process: one model or several, one batch at a time.

On a GPU the next batch is started while one is under way, so that copies overlap with models' work.

``main`` is the entry of a ``ProcessSpec``. It waits for a model, a warm spare until then.
Its config may hold ``memory_limit_bytes`` and ``factories``, the names that ``formats/factory.py`` may call.
"""

from __future__ import annotations

import gc
import resource
import select
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from forescale.core.cluster import Device, DeviceKind
from forescale.engine.serve.arrays import DTYPES
from forescale.engine.serve.execution import Batch, BatchFailed, is_out_of_memory, line_of, run_rows, start
from forescale.engine.serve.footprint import Footprint, be_first_victim
from forescale.engine.serve.formats import LoadedModel, Order, format_named
from forescale.engine.serve.messages import (
    Beat,
    Credit,
    Drain,
    Failed,
    FailureKind,
    Header,
    Hello,
    Left,
    Load,
    Run,
    Threads,
    Warm,
    address,
    to_replica,
)
from forescale.engine.stream import StreamChannel
from forescale.engine.wire import Frame, Message

BEAT_S = 1.0
CREDITS = 2  # the next batch waits here while one runs

_LOOK_S = 1e-4  # how late it may be seen that a GPU is done: it cannot be waited for together with a socket

_UNNAMED_ROWS = (
    2  # of an axis of any length that is not the rows: the least that torch.export allows by itself
)
_FULL_FRACTION = 0.8  # a process that still holds this much of its memory after a batch failed is replaced


def main(channel: StreamChannel, device: Device, config: Mapping[str, Any]) -> None:
    """Hold the replicas that ``Load`` names, until the process itself is told to end; see ``messages.py``."""
    torch.set_num_threads(len(device.cores) or psutil.cpu_count() or 1)
    limit_bytes = int(config.get("memory_limit_bytes") or device.memory_bytes)
    _limit_memory(device, limit_bytes)
    be_first_victim()
    gc.collect()
    gc.freeze()  # what has been imported stays: no later collection looks through it
    footprint = Footprint(device)
    warm = Warm(process_bytes=footprint.process_bytes, common_bytes=footprint.common_bytes)
    channel.send(warm.to_header())
    house = House(channel, device, footprint, limit_bytes, tuple(config.get("factories", ())))
    _serve(house, _Inbox(channel, footprint))


def _serve(house: House, inbox: _Inbox) -> None:
    """Do what is asked until the process itself is meant."""
    while True:
        message = inbox.next() if house.batch is None else inbox.next_before(house.batch.underway.is_over)
        if message is None:
            house.finish()
        elif "to" in message.header:
            house.obey(message)
        else:
            house.finish()
            return


class _Inbox:
    """What the gateway says; while it is read, the gateway is told that this process is there."""

    def __init__(self, channel: StreamChannel, footprint: Footprint) -> None:
        self._channel = channel
        self._footprint = footprint
        self._told_s = time.monotonic()

    def next(self) -> Message:
        while True:
            self._tell_now_and_then()
            message = self._channel.receive(timeout_s=BEAT_S)
            if message is not None:
                return message
            self._tell()

    def next_before(self, is_over: Callable[[], bool]) -> Message | None:
        """The next message, or None as soon as the batch under way is over.

        Meanwhile nothing is told: a batch that never ends is noticed as silence.
        """
        self._tell_now_and_then()
        while not is_over():
            message = self._channel.receive(timeout_s=0.0)
            if message is not None:
                return message
            select.select((self._channel,), (), (), _LOOK_S)
        return None

    def _tell_now_and_then(self) -> None:
        # Also between batches that follow each other: what the model takes may have grown.
        if time.monotonic() - self._told_s >= BEAT_S:
            self._tell()

    def _tell(self) -> None:
        self._told_s = time.monotonic()
        self._channel.send(Beat(model_bytes=self._footprint.model_bytes()).to_header())


class House:
    """The replicas in this process, by name.

    Attributes:
        batch: the one under way, whose answer is owed.
    """

    def __init__(
        self,
        channel: StreamChannel,
        device: Device,
        footprint: Footprint,
        limit_bytes: int,
        factories: tuple[str, ...] = (),
    ) -> None:
        self._channel = channel
        self._device = device
        self._footprint = footprint
        self._limit_bytes = limit_bytes
        self._factories = factories
        self._threads: dict[str, int] = {}
        self.models: dict[str, LoadedModel] = {}
        self.batch: Batch | None = None

    def obey(self, message: Message) -> None:
        """Carry out one order; a batch may be under way then."""
        replica = str(message.header["to"])
        asked = to_replica(message.header)
        if not isinstance(asked, Run):
            self.finish()
        self._footprint.turn(replica)
        match asked:
            case Run() if replica in self.models:
                self._use_threads(self._threads.get(replica))
                self._run(replica, asked, message)
            case Load():
                self._use_threads(asked.threads)
                self._load(replica, asked)
            case Threads(threads=threads):
                self._threads[replica] = threads
            case Drain() if self.models.pop(replica, None) is not None:
                self._threads.pop(replica, None)
                self._footprint.forget(replica)
                gc.collect()  # what it took is for others
                self._say(replica, Left().to_header())
            case _:
                pass  # it has left, or could not be loaded, and that has been said

    def _say(self, replica: str, header: Header, frames: Sequence[Frame] = ()) -> None:
        self._channel.send({**header, "from": replica}, frames)

    def _use_threads(self, threads: int | None) -> None:
        """They are the process's: each batch sets those of its replica."""
        if threads and threads != torch.get_num_threads():
            torch.set_num_threads(threads)

    def _load(self, replica: str, load: Load) -> None:
        start_s = time.perf_counter()
        try:
            model = _ready(load, self._device, self._factories)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a model is somebody else's code
            traceback.print_exc()
            failure: FailureKind = "memory" if is_out_of_memory(error) else "load"
            self._say(replica, Failed(error=line_of(error), failure=failure).to_header())
            self._footprint.forget(replica)
            return
        self.models[replica] = model
        self._threads[replica] = load.threads or torch.get_num_threads()
        hello = Hello(
            model=load.model,
            version=load.version,
            replica=address(self._channel.name, replica),
            signature=model.signature,
            max_rows=min(load.max_rows, model.most_rows or load.max_rows),
            load_s=time.perf_counter() - start_s,
            model_bytes=self._footprint.model_bytes()[replica],
        )
        self._say(replica, hello.to_header())
        self._say(replica, Credit(n=CREDITS).to_header())

    def finish(self) -> None:
        """Answer the batch under way, if there is one, as soon as it is over."""
        if self.batch is None:
            return
        batch, self.batch = self.batch, None
        try:
            header, frames = batch.answer()
        except BatchFailed as failed:
            self._say_failed(batch.replica, batch.number, failed)
        else:
            self._say(batch.replica, header, frames)

    def _run(self, replica: str, run: Run, message: Message) -> None:
        try:
            batch = start(replica, self.models[replica], run, message.frames)
        except BatchFailed as failed:
            self.finish()  # the one before is answered first
            self._say_failed(replica, run.batch, failed)
            return
        self.finish()
        self.batch = batch
        if batch.underway.is_over():
            self.finish()

    def _say_failed(self, replica: str, batch: int, failed: BatchFailed) -> None:
        told = Failed(batch=batch, error=failed.error, failure=failed.failure)
        self._say(replica, told.to_header())
        if failed.failure == "memory" and _is_full(self._limit_bytes):
            # It is this one's doing that all end.
            self._say(replica, replace(told, batch=None).to_header())
            raise SystemExit("the models hold almost all of the memory they may have") from failed


def _ready(load: Load, device: Device, factories: tuple[str, ...]) -> LoadedModel:
    """Load the model and run it once, so that the first request does not pay for what happens but once."""
    order = Order(
        path=Path(load.path),
        options=load.options,
        signature=load.signature,
        trust=load.trust,
        factories=factories,
        threads=load.threads,
    )
    model = format_named(load.format).load(order, device)
    zeros = {
        spec.name: np.zeros(
            (1, *(length or _UNNAMED_ROWS for length in spec.shape[1:])), dtype=DTYPES[spec.datatype]
        )
        for spec in model.signature.inputs
    }
    run_rows(model, zeros)
    return model


def _limit_memory(device: Device, limit_bytes: int) -> None:
    """Make allocations beyond the limit fail, so that a model's hunger is its own error and nobody else's."""
    if limit_bytes <= 0:
        return
    if device.kind is DeviceKind.CUDA:
        fraction = min(1.0, limit_bytes / torch.cuda.get_device_properties(0).total_memory)
        torch.cuda.set_per_process_memory_fraction(fraction)
    elif sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))


def _is_full(limit_bytes: int) -> bool:
    gc.collect()
    return psutil.Process().memory_info().rss > _FULL_FRACTION * limit_bytes
