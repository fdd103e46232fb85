"""Replicas without processes: what they are sent is kept until the test answers it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from forescale.core.errors import PeerGone
from forescale.core.signature import Signature, TensorSpec
from forescale.engine.serve.arrays import Array, pack, unpack
from forescale.engine.serve.link import Listener
from forescale.engine.serve.messages import (
    Credit,
    Drain,
    Failed,
    FailureKind,
    Header,
    Hello,
    Result,
    Run,
    to_replica,
)
from forescale.engine.serve.requests import InferRequest, WantedOutput
from forescale.engine.wire import Frame

DOUBLING = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(None, 2)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(None, 2)),),
)
"""A model that returns twice its input."""


class SteadyClock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s


class FakeLink:
    """A gateway's link to replicas that tests play.

    Attributes:
        runs: batches that were sent and are not answered, with their inputs, by replica.
        prompt: whether replicas answer at once.
    """

    def __init__(self, *, prompt: bool = False) -> None:
        self.runs: dict[str, list[tuple[Run, dict[str, Array]]]] = {}
        self.drained: list[str] = []
        self.prompt = prompt
        self.batch_rows: list[int] = []
        self._tell: Listener = lambda *_: None

    def listen(self, listener: Listener) -> None:
        self._tell = listener

    def send(self, replica: str, header: Header, frames: Sequence[Frame] = ()) -> None:
        if replica not in self.runs:
            raise PeerGone(f"{replica} is not connected")
        message = to_replica(header)
        if isinstance(message, Drain):
            self.drained.append(replica)
        elif isinstance(message, Run):
            inputs = unpack(message.inputs, [bytes(frame) for frame in frames])
            self.batch_rows.append(len(next(iter(inputs.values()))))
            self.runs[replica].append((message, inputs))
            if self.prompt:
                asyncio.get_running_loop().call_soon(self.answer, replica)

    def join(
        self,
        replica: str = "r0",
        *,
        model: str = "m",
        version: str = "1",
        room: int = 2,
        max_rows: int = 32,
    ) -> None:
        self.runs[replica] = []
        hello = Hello(model=model, version=version, replica=replica, signature=DOUBLING, max_rows=max_rows)
        self._tell(replica, hello, ())
        self._tell(replica, Credit(n=room), ())

    def answer(self, replica: str = "r0", outputs: dict[str, Array] | None = None) -> None:
        """Answer the oldest batch, by doubling unless told otherwise."""
        run, inputs = self.runs[replica].pop(0)
        if outputs is None:
            outputs = {"y": inputs["x"] * np.float32(2)}
        tensors, frames = pack(outputs)
        self._tell(replica, Result(batch=run.batch, seconds=0.001, outputs=tensors), tuple(frames))

    def fail(self, replica: str = "r0", *, error: str = "it raised", failure: FailureKind = "model") -> None:
        """Fail the oldest batch."""
        run, _ = self.runs[replica].pop(0)
        self._tell(replica, Failed(batch=run.batch, error=error, failure=failure), ())

    def vanish(self, replica: str = "r0") -> None:
        """Let its process be gone; the gateway is not told."""
        del self.runs[replica]


def request(*values: float, rows: int = 1, **changed: Any) -> InferRequest:
    """A request for DOUBLING, of as many equal rows."""
    inputs = np.array([values or (1.0, 2.0)] * rows, np.float32)
    fields: dict[str, Any] = {
        "id": None,
        "inputs": (inputs,),
        "rows": len(inputs),
        "size_bytes": inputs.nbytes,
        "free_lengths": (),
        "outputs": (WantedOutput(name="y", binary=False),),
    }
    return InferRequest(**{**fields, **changed})


async def settle() -> None:
    """Let everything that is ready in the loop run."""
    for _ in range(10):
        await asyncio.sleep(0)
