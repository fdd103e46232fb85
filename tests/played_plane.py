"""A data plane without processes: gateway and crew are real, what they start and send to is played."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np

from fake_replicas import DOUBLING
from forescale.core.clock import SystemClock
from forescale.core.cluster import Device, DeviceKind
from forescale.engine.backend import ProcessExit, ProcessHandle, ProcessSpec
from forescale.engine.channel import Frame
from forescale.engine.serve.arrays import pack, unpack
from forescale.engine.serve.crew import Crew, CrewRules
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.link import Listener
from forescale.engine.serve.messages import (
    Credit,
    Drain,
    Failed,
    FromReplica,
    Header,
    Hello,
    Load,
    Result,
    Run,
    Warm,
    to_replica,
)
from forescale.engine.serve.orders import Command, Exchange, PlaneState
from forescale.engine.serve.plane import Plane
from forescale.engine.serve.requests import InferRequest, WantedOutput

CPU = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=0)
ROWS = np.ones((2, 2), np.float32)
REQUEST = InferRequest(
    id=None,
    inputs=(ROWS,),
    rows=2,
    size_bytes=ROWS.nbytes,
    free_lengths=(),
    outputs=(WantedOutput(name="y", binary=True),),
)


class PlayedProcesses:
    """Backend and link at once: a process is warm at once, loads at once and doubles its inputs.

    Attributes:
        mute: processes that answer no batch.
        faulty: versions whose replicas fail on every batch.
    """

    def __init__(self) -> None:
        self.living: dict[str, Load | None] = {}
        self.mute = set[str]()
        self.faulty = set[str]()
        self._handles: dict[str, ProcessHandle] = {}
        self._exits: list[ProcessExit] = []
        self._listeners: list[Listener] = []
        self._news, self._wake = os.pipe()

    # what a backend does

    def start(self, spec: ProcessSpec) -> ProcessHandle:
        handle = ProcessHandle(name=spec.address, device=spec.device.name, pid=0)
        self._handles[spec.address] = handle
        self.living[spec.address] = None
        self._say(spec.address, Warm())
        return handle

    def end(self, name: str, cause: str = "killed by SIGKILL") -> None:
        if name in self.living:
            del self.living[name]
            handle = self._handles[name]
            self._exits.append(ProcessExit(handle=handle, code=None, signal=9, cause=cause, log_tail=()))
            os.write(self._wake, b".")

    def kill(self, handle: ProcessHandle) -> None:
        self.end(handle.name)

    def stop(self, handle: ProcessHandle, grace_s: float) -> ProcessExit:
        raise NotImplementedError

    def exits(self) -> tuple[ProcessExit, ...]:
        os.set_blocking(self._news, False)
        with contextlib.suppress(BlockingIOError):
            os.read(self._news, 100)
        exits, self._exits = tuple(self._exits), []
        return exits

    def fileno(self) -> int:
        return self._news

    def close(self) -> None:
        os.close(self._news)
        os.close(self._wake)

    def __enter__(self) -> PlayedProcesses:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # what a link does

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def send(self, replica: str, header: Header, frames: Sequence[Frame] = ()) -> None:
        message = to_replica(header)
        match message:
            case Load(model=model, version=version) if model == "broken":
                self.living[replica] = message
                self._say(replica, Failed(error="no such operator", failure="load"))
                asyncio.get_running_loop().call_soon(self.end, replica)
            case Load(model=model, version=version):
                self.living[replica] = message
                ready = Hello(model=model, version=version, replica=replica, signature=DOUBLING, max_rows=8)
                self._say(replica, ready)
                self._say(replica, Credit(n=2))
            case Run() if (load := self.living.get(replica)) and load.version in self.faulty:
                self._say(replica, Failed(batch=message.batch, error="no such class", failure="model"))
            case Run() if replica not in self.mute:
                inputs = unpack(message.inputs, frames)
                tensors, outputs = pack({"y": inputs["x"] * np.float32(2)})
                self._say(replica, Result(batch=message.batch, seconds=0.001, outputs=tensors), *outputs)
            case Run():
                pass
            case Drain():
                asyncio.get_running_loop().call_soon(self.end, replica)

    def _say(self, process: str, message: FromReplica, *frames: memoryview) -> None:
        def tell() -> None:
            for listener in self._listeners:
                listener(process, message, frames)

        asyncio.get_running_loop().call_soon(tell)


class Nearby:
    """A data plane in this process.

    Attributes:
        acknowledged: what each exchange acknowledged.
        deaf: the data plane does not hear that.
    """

    def __init__(self, plane: Plane, *, deaf: bool) -> None:
        self.plane = plane
        self.acknowledged: list[int] = []
        self._deaf = deaf

    async def exchange(
        self, commands: Sequence[Command] = (), *, acknowledged: int = 0, wait_s: float = 0.0
    ) -> PlaneState:
        self.acknowledged.append(acknowledged)
        heard = 0 if self._deaf else acknowledged
        asked = Exchange(commands=tuple(commands), acknowledged=heard, wait_s=wait_s)
        return await self.plane.exchange(asked)

    def answer_now(self) -> None:
        self.plane.answer_now()


@asynccontextmanager
async def played_plane(
    *, deaf: bool = False, memory_bytes: int = 0
) -> AsyncGenerator[tuple[Nearby, Gateway, PlayedProcesses]]:
    """A data plane at work; its one device has so much memory (0: nobody knows)."""
    with PlayedProcesses() as processes:
        clock = SystemClock()
        gateway = Gateway(processes, clock=clock)
        rules = CrewRules(spares=1, starts=2)
        device = replace(CPU, memory_bytes=memory_bytes)
        crew = Crew(processes, lambda to, said: processes.send(to, said.to_header()), [device], rules)
        plane = Plane(crew=crew, gateway=gateway, link=processes, clock=clock)
        running = asyncio.create_task(plane.run())
        try:
            yield Nearby(plane, deaf=deaf), gateway, processes
        finally:
            gateway.close()
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
