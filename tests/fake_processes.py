"""Processes that a test plays, for a crew."""

from __future__ import annotations

from dataclasses import replace
from typing import Self

from forescale.core.cluster import Device, DeviceKind
from forescale.core.errors import PeerGone
from forescale.core.signature import Signature, TensorSpec
from forescale.engine.backend import ProcessExit, ProcessHandle, ProcessSpec
from forescale.engine.serve.crew import Crew
from forescale.engine.serve.messages import Hello, Load, ToReplica

CPU = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=0)
OTHER = Device(name="cpu1", kind=DeviceKind.CPU, memory_bytes=0)
TENSOR = TensorSpec(name="x", datatype="FP32", shape=(None,))
SIGNATURE = Signature(inputs=(TENSOR,), outputs=(replace(TENSOR, name="y"),))
DIGITS = Load(model="digits", version="1", format="pt2", path="m.pt2")


class Processes:
    """A backend whose processes do nothing, and a post office that remembers."""

    def __init__(self) -> None:
        self.living: dict[str, ProcessHandle] = {}
        self.started: list[ProcessSpec] = []
        self.killed: list[str] = []
        self.sent: list[tuple[str, str]] = []
        self.unreachable: set[str] = set()
        self._exits: list[ProcessExit] = []

    def start(self, spec: ProcessSpec) -> ProcessHandle:
        handle = ProcessHandle(name=spec.address, device=spec.device.name, pid=0)
        self.living[spec.address] = handle
        self.started.append(spec)
        return handle

    def end(self, name: str, cause: str = "killed by SIGKILL") -> None:
        handle = self.living.pop(name)
        self._exits.append(ProcessExit(handle=handle, code=None, signal=9, cause=cause, log_tail=()))

    def kill(self, handle: ProcessHandle) -> None:
        self.killed.append(handle.name)
        self.end(handle.name)

    def stop(self, handle: ProcessHandle, grace_s: float) -> ProcessExit:
        raise NotImplementedError

    def exits(self) -> tuple[ProcessExit, ...]:
        exits, self._exits = tuple(self._exits), []
        return exits

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        self.living.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def send(self, to: str, message: ToReplica) -> None:
        if to.partition("/")[0] in self.unreachable:
            raise PeerGone(to)
        self.sent.append((to, message.kind))


def at(process: str, replica: str = "digits.1.1") -> str:
    return f"{process}/{replica}"


def greet(crew: Crew, address: str, now_s: float) -> Hello:
    """A replica says hello."""
    model, version, _ = address.partition("/")[2].split(".")
    hello = Hello(model=model, version=version, replica=address, signature=SIGNATURE, max_rows=8)
    crew.heard(address, hello, now_s)
    return hello
