"""Replica processes: a good model is served while others crash, hang and eat memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch

from forescale.core.cluster import Device, DeviceKind
from forescale.core.signature import Signature, TensorSpec
from forescale.engine.channel import ChannelServer, Frame
from forescale.engine.local import LocalBackend
from forescale.engine.serve.arrays import pack, unpack
from forescale.engine.serve.crew import Crew
from forescale.engine.serve.messages import Failed, Header, Load, Result, Run, address, from_replica
from forescale.engine.serve.roster import CrewEvent, CrewRules, Ended, Lost, Ready

ROGUE, BROKEN = "rogue_models:rogue", "rogue_models:broken"
CPU = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=2 << 30)
POINTS = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(None, 2)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(None, 2)),),
)

_E = TypeVar("_E", bound=CrewEvent)


class Site:
    """A crew with its channel, and the loop that the gateway will be."""

    def __init__(self, folder: Path, rules: CrewRules) -> None:
        self._server = ChannelServer()
        self._backend = LocalBackend(invitation=self._server.invitation, log_dir=folder)
        self.crew = Crew(self._backend, lambda to, message: self._say(to, message.to_header()), [CPU], rules)
        self._events: list[CrewEvent] = []
        self._answers: dict[int, tuple[Result | Failed, tuple[memoryview, ...]]] = {}
        self._sent: dict[int, str] = {}

    def _say(self, to: str, header: Header, frames: Sequence[Frame] = ()) -> None:
        process, _, replica = to.partition("/")
        self._server.send(process, {**header, "to": replica} if replica else header, frames)

    def close(self) -> None:
        self.crew.close()
        self._server.close()

    def turn(self) -> None:
        self._server.poll(0.1, self.crew)
        while message := self._server.receive(0):
            said = from_replica(message.header)
            replica = message.header.get("from")
            sender = address(message.sender, replica) if replica else message.sender
            self.crew.heard(sender, said, time.monotonic())
            if isinstance(said, Result | Failed) and said.batch is not None:
                self._answers[said.batch] = said, message.frames
        self._events += self.crew.poll(time.monotonic())

    def event(self, kind: type[_E], of: Callable[[_E], bool] = lambda _: True) -> _E:
        while True:
            for event in self._events:
                if isinstance(event, kind) and of(event):
                    self._events.remove(event)
                    return event
            self.turn()

    def send(self, replica: str, *values: float) -> int:
        x = np.array([[value, 0.5] for value in values], dtype=np.float32)
        tensors, frames = pack({"x": x})
        batch = len(self._sent)
        self._sent[batch] = replica
        self._say(replica, Run(batch=batch, inputs=tensors).to_header(), frames)
        return batch

    def answer(self, batch: int) -> list | Failed:
        while batch not in self._answers:
            self.turn()
            lost = [event for event in self._events if isinstance(event, Lost)]
            assert self._sent[batch] not in [event.address for event in lost], lost
        said, frames = self._answers.pop(batch)
        return said if isinstance(said, Failed) else unpack(said.outputs, frames)["y"].tolist()

    def place(self, load: Load, house: str | None = None) -> str:
        return self.crew.place(load, "cpu0", time.monotonic(), house)

    def remove(self, name: str) -> str | None:
        return self.crew.remove(name, time.monotonic())


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    rules = CrewRules(spares=0, starts=3, silence_limit_s=2.5, factories=(ROGUE, BROKEN))
    site = Site(tmp_path / "logs", rules)
    yield site
    site.close()


def made_by(factory: str) -> Load:
    return Load(
        model=factory.partition(":")[2],
        version="1",
        format="factory",
        path="unused",
        options={"factory": factory},
        signature=POINTS,
    )


def doubler(path: Path) -> Load:
    """A model that returns its input times 2, for 1 to 8 rows."""
    linear = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(2 * torch.eye(2))
    rows = torch.export.Dim("rows", min=1, max=8)
    torch.export.save(torch.export.export(linear, (torch.ones(3, 2),), dynamic_shapes=({0: rows},)), path)
    names = Signature(inputs=POINTS.inputs, outputs=POINTS.outputs)
    return Load(model="doubler", version="1", format="pt2", path=str(path), signature=names, max_rows=32)


def test_a_good_model_is_served_whatever_others_do(site: Site, tmp_path: Path) -> None:
    good = site.place(doubler(tmp_path / "m.pt2"))
    rogue = site.place(made_by(ROGUE))
    broken = site.place(made_by(BROKEN))
    ready = site.event(Ready, lambda event: event.replica == good)
    assert ready.hello.max_rows == 8
    villain = site.event(Ready, lambda event: event.replica == rogue).address

    lost = site.event(Lost, lambda event: event.replica == broken)
    assert (lost.cause, lost.failure) == ("LookupError: the weights are nowhere", "load")
    site.remove(broken)

    for value, failure, error in [
        (1, "model", "ZeroDivisionError: one too many"),
        (2, "output", "output y has shape (1, 1), not (any, 2)"),
        (3, "memory", "RuntimeError: [enforce fail"),
    ]:
        failed = site.answer(site.send(villain, value))
        assert isinstance(failed, Failed)
        assert (failed.failure, failed.error[: len(error)]) == (failure, error)
        assert site.answer(site.send(villain, 0)) == [[0.0, 0.5]]

    hung = site.send(villain, 5)
    while villain.partition("/")[0] in {replica.process for replica in site.crew.replicas()}:
        assert site.answer(site.send(ready.address, 1, 2, 3)) == [[2.0, 1.0], [4.0, 1.0], [6.0, 1.0]]
    lost = site.event(Lost, lambda event: event.replica == rogue)
    assert (lost.failure, lost.cause) == ("timeout", "the model did not answer for 2.5 s")

    villain = site.event(Ready, lambda event: event.replica == rogue).address
    site.send(villain, 4)
    lost = site.event(Lost, lambda event: event.replica == rogue)
    assert lost.failure == "crash"
    assert "SIGSEGV" in lost.cause
    site.remove(rogue)

    batches = [site.send(ready.address, 1) for _ in range(20)]
    assert site.remove(good) == ready.address
    assert [site.answer(batch) for batch in batches] == [[[2.0, 1.0]]] * 20
    site.event(Ended, lambda event: event.replica == good)
    assert hung not in batches


def test_a_model_moves_in_with_another_one_and_out_again(site: Site, tmp_path: Path) -> None:
    good = site.place(doubler(tmp_path / "m.pt2"))
    at_home = site.event(Ready, lambda event: event.replica == good).address
    (there,) = site.crew.replicas()
    guest = site.place(replace(doubler(tmp_path / "m.pt2"), model="guest"), house=there.house)
    broken = site.place(made_by(BROKEN), house=there.house)
    moved_in = site.event(Ready, lambda event: event.replica == guest).address
    site.event(Lost, lambda event: event.replica == broken)
    assert moved_in.partition("/")[0] == at_home.partition("/")[0]
    for address_ in (at_home, moved_in, at_home):
        assert site.answer(site.send(address_, 1)) == [[2.0, 1.0]]
    site.remove(guest)
    site.event(Ended, lambda event: event.replica == guest)
    assert site.answer(site.send(at_home, 1)) == [[2.0, 1.0]]
