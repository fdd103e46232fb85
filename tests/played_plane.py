"""A data plane without processes: gateway and crew are real, what they start and send to is played."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np

from fake_replicas import DOUBLING
from forescale.core.clock import SystemClock
from forescale.core.cluster import Device, DeviceKind
from forescale.core.errors import PeerGone
from forescale.engine.backend import ProcessExit, ProcessHandle, ProcessSpec
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
    Left,
    Load,
    Result,
    Run,
    Threads,
    Warm,
    to_replica,
)
from forescale.engine.serve.orders import Command, Exchange, PlaneState
from forescale.engine.serve.plane import Plane
from forescale.engine.serve.requests import InferRequest, WantedOutput
from forescale.engine.wire import Frame

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
        living: processes, with what each of their replicas has loaded.
        mute: processes that answer no batch.
        faulty: versions whose replicas fail on every batch.
        threads: that processes were told of while they had a model.
    """

    def __init__(self) -> None:
        self.living: dict[str, dict[str, Load]] = {}
        self.mute = set[str]()
        self.faulty = set[str]()
        self.threads: dict[str, int] = {}
        self._handles: dict[str, ProcessHandle] = {}
        self._exits: list[ProcessExit] = []
        self._listeners: list[Listener] = []
        self._news, self._wake = os.pipe()

    def held(self) -> list[Load]:
        """What the replicas in all processes have loaded."""
        return [load for replicas in self.living.values() for load in replicas.values()]

    # what a backend does

    def start(self, spec: ProcessSpec) -> ProcessHandle:
        handle = ProcessHandle(name=spec.address, device=spec.device.name, pid=0)
        self._handles[spec.address] = handle
        self.living[spec.address] = {}
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

    def send(self, to: str, header: Header, frames: Sequence[Frame] = ()) -> None:
        process, _, replica = to.partition("/")
        if process not in self.living:
            raise PeerGone(f"{process} is not connected")
        message = to_replica(header)
        match message:
            case Drain() if not replica:
                self._soon(self.end, process)
            case Drain() if self.living[process].pop(replica, None):
                self._say(to, Left())
            case Load(model="broken"):
                self._say(to, Failed(error="no such operator", failure="load"))
            case Load(model=model, version=version):
                self.living[process][replica] = message
                self._say(to, Hello(model=model, version=version, replica=to, signature=DOUBLING, max_rows=8))
                self._say(to, Credit(n=2))
            case Run() if self.living[process][replica].version in self.faulty:
                self._say(to, Failed(batch=message.batch, error="no such class", failure="model"))
            case Run() if process not in self.mute:
                inputs = unpack(message.inputs, frames)
                tensors, outputs = pack({"y": inputs["x"] * np.float32(2)})
                self._say(to, Result(batch=message.batch, seconds=0.001, outputs=tensors), *outputs)
            case Threads(threads=threads):
                self.threads[to] = threads
            case _:
                pass

    def _soon(self, call: Callable[..., object], *words: object) -> None:
        asyncio.get_running_loop().call_soon(call, *words)

    def _say(self, sender: str, message: FromReplica, *frames: memoryview) -> None:
        def tell() -> None:
            if sender.partition("/")[0] in self.living:
                for listener in self._listeners:
                    listener(sender, message, frames)

        self._soon(tell)


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
    *, deaf: bool = False, memory_bytes: int = 0, cores: int = 0
) -> AsyncGenerator[tuple[Nearby, Gateway, PlayedProcesses]]:
    """A data plane at work; its one device has so much memory and so many cores (0: nobody knows)."""
    with PlayedProcesses() as processes:
        clock = SystemClock()
        gateway = Gateway(processes, clock=clock)
        rules = CrewRules(spares=1, starts=2)
        device = replace(CPU, memory_bytes=memory_bytes, cores=tuple(range(cores)))
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
