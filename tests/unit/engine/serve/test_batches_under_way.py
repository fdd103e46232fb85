"""A replica whose batches are over later than they are started, as on a GPU, without one."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from forescale.core.cluster import Device, DeviceKind
from forescale.core.signature import Signature, TensorSpec
from forescale.engine.serve import replica
from forescale.engine.serve.arrays import Array, pack, unpack
from forescale.engine.serve.footprint import Footprint
from forescale.engine.serve.formats import Done, LoadedModel
from forescale.engine.serve.messages import (
    Beat,
    Drain,
    Failed,
    Left,
    Result,
    Run,
    Threads,
    ToReplica,
    from_replica,
)
from forescale.engine.serve.replica import House, _Inbox, _serve
from forescale.engine.stream import ADDRESS, StreamChannel, encode
from forescale.engine.wire import Invitation, Message

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(None,)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(None,)),),
)
NAME = "m.1.1"
CPU = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=0)
END = Message(sender="", header=Drain().to_header(), frames=())
NOTHING = None
NOT_STARTED = 9


class Accelerator:
    """Batches are over when somebody waits for them, or when the test says so."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.batches: list[_Started] = []

    def run(self, inputs: Mapping[str, Array]) -> _Started:
        number = int(inputs["x"][0])
        self.log.append(f"start {number}")
        if number == NOT_STARTED:
            raise ValueError("not to be started")
        self.batches.append(_Started(self, number))
        return self.batches[-1]

    def is_done(self) -> None:
        """With the last batch."""
        self.batches[-1].is_done = True


class _Started:
    error: BaseException | None = None

    def __init__(self, accelerator: Accelerator, number: int) -> None:
        self._accelerator = accelerator
        self._number = number
        self.is_done = False

    def is_over(self) -> bool:
        return self.is_done

    def wait(self) -> Done:
        self._accelerator.log.append(f"wait {self._number}")
        if self.error is not None:
            raise self.error
        return Done({"y": np.full(1, 2 * self._number, np.float32)}, float(self._number))


Step = Message | Callable[[], None] | None
"""A message that is there; what happens while the replica looks for one; or nothing."""


class Wire:
    """Steps in order, then the end. What ``select`` sees is always ready, so that nothing waits."""

    name = "replica-1"

    def __init__(self, accelerator: Accelerator, *steps: Step) -> None:
        self._accelerator = accelerator
        self._steps = [*steps, END]
        self._pipe = os.pipe()
        os.write(self._pipe[1], b"!")
        self.said: list = []

    def fileno(self) -> int:
        return self._pipe[0]

    def close(self) -> None:
        for end in self._pipe:
            os.close(end)

    def receive(self, timeout_s: float | None = None) -> Message | None:
        step = self._steps.pop(0)
        started = sum(line.startswith("start") for line in self._accelerator.log)
        owed = started - sum(isinstance(said, Result | Failed) for said in self.said)
        assert owed <= 1
        assert (timeout_s == 0.0) == (owed == 1), "only while nothing is owed may it wait for a message"
        if callable(step):
            step()
            return None
        return step

    def send(self, header: Mapping, frames=()) -> None:
        said = from_replica(header)
        self.said.append(said)
        if isinstance(said, Result):
            (y,) = unpack(said.outputs, list(frames))["y"].tolist()
            assert (y, said.seconds) == (2.0 * said.batch, said.batch)
        if not isinstance(said, Beat):
            self._accelerator.log.append(f"{type(said).__name__} {getattr(said, 'batch', '')}".strip())


def order(asked: ToReplica, frames=(), to: str = NAME) -> Message:
    return Message(sender="", header={**asked.to_header(), "to": to}, frames=tuple(frames))


def batch(number: int, to: str = NAME) -> Message:
    tensors, frames = pack({"x": np.full(1, number, np.float32)})
    return order(Run(batch=number, inputs=tensors), frames, to)


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator()


@pytest.fixture
def served(accelerator: Accelerator) -> Iterator[Callable[..., Wire]]:
    """Serve two replicas of the same model until the end."""
    wires: list[Wire] = []

    def serve(*steps: Step) -> Wire:
        wire = Wire(accelerator, *steps)
        wires.append(wire)
        footprint = Footprint(CPU)
        house = House(wire, CPU, footprint, 1 << 40)  # type: ignore[arg-type]
        for name in (NAME, "m.1.2"):
            house.models[name] = LoadedModel(signature=SIGNATURE, run=accelerator.run)
        _serve(house, _Inbox(wire, footprint))  # type: ignore[arg-type]
        return wire

    yield serve
    for wire in wires:
        wire.close()


def test_the_next_batch_is_started_before_the_former_is_waited_for(
    accelerator: Accelerator, served: Callable[..., Wire]
) -> None:
    served(batch(1), NOTHING, batch(2, to="m.1.2"), NOTHING, NOTHING, batch(3))
    assert accelerator.log == [
        *("start 1", "start 2", "wait 1", "Result 1"),
        *("start 3", "wait 2", "Result 2", "wait 3", "Result 3"),
    ]


def test_an_answer_waits_for_no_message(accelerator: Accelerator, served: Callable[..., Wire]) -> None:
    served(batch(1), NOTHING, accelerator.is_done, batch(2), accelerator.is_done)
    assert accelerator.log == ["start 1", "wait 1", "Result 1", "start 2", "wait 2", "Result 2"]


def test_a_batch_that_is_over_when_it_is_started_is_answered_before_anything_is_read(
    accelerator: Accelerator, served: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Started, "is_over", lambda self: True)
    served(batch(1), batch(2))
    assert accelerator.log == ["start 1", "wait 1", "Result 1", "start 2", "wait 2", "Result 2"]


@pytest.mark.parametrize(
    ("error", "failure"), [(MemoryError("all gone"), "memory"), (RuntimeError("CUDA error"), "model")]
)
def test_failures_are_told_of_their_batch_and_in_order(
    accelerator: Accelerator, served: Callable[..., Wire], error: BaseException, failure: str
) -> None:
    def break_last() -> None:
        accelerator.batches[-1].error = error

    wire = served(batch(1), batch(2), break_last, batch(3), batch(NOT_STARTED), batch(4))
    assert accelerator.log == [
        *("start 1", "start 2", "wait 1", "Result 1"),
        *("start 3", "wait 2", "Failed 2"),
        *("start 9", "wait 3", "Result 3", "Failed 9"),
        *("start 4", "wait 4", "Result 4"),
    ]
    failed = [said for said in wire.said if isinstance(said, Failed)]
    assert [(each.batch, each.failure) for each in failed] == [(2, failure), (NOT_STARTED, "model")]


def test_other_orders_find_nothing_under_way(accelerator: Accelerator, served: Callable[..., Wire]) -> None:
    wire = served(
        batch(1), order(Threads(threads=3)), batch(2), order(Drain()), batch(3), batch(4, to="m.1.2"), NOTHING
    )
    assert accelerator.log == [
        *("start 1", "wait 1", "Result 1", "start 2", "wait 2", "Result 2", "Left"),
        *("start 4", "wait 4", "Result 4"),
    ]
    assert [type(said) for said in wire.said if not isinstance(said, Beat)] == [Result, Result, Left, Result]


def test_a_batch_that_does_not_end_is_silence_and_batches_that_follow_each_other_are_not(
    accelerator: Accelerator, served: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "BEAT_S", 1e-9)
    wire = served(batch(1), *[NOTHING] * 9, batch(2), batch(3), accelerator.is_done)
    kinds = [type(said).__name__ for said in wire.said]
    assert kinds == ["Beat", "Beat", "Result", "Beat", "Result", "Beat", "Result", "Beat"]


def test_a_message_that_comes_in_parts_is_found_while_a_batch_is_under_way(tmp_path: Path) -> None:
    encoded = b"".join(map(bytes, encode({"type": "run"}, [bytes(1 << 20)])))
    parts = [encoded[:7], encoded[7 : 1 << 16], encoded[1 << 16 : 1 << 17], encoded[1 << 17 :]]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with StreamChannel(Invitation(address=f"{ADDRESS}{tmp_path / 's'}"), "r") as channel:
            gateway, _ = listener.accept()

            def is_over() -> bool:
                assert parts, "all of it has come"
                gateway.settimeout(0.0)
                sent = gateway.send(parts[0])
                parts[0] = parts[0][sent:]
                if not parts[0]:
                    parts.pop(0)
                return False

            with gateway:
                message = _Inbox(channel, Footprint(CPU)).next_before(is_over)
    assert message is not None
    assert (message.header["type"], message.frames[0].nbytes) == ("run", 1 << 20)
