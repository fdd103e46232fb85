"""A replica's side of the conversation, without a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from forescale.core.cluster import Device, DeviceKind
from forescale.core.signature import Signature, TensorSpec
from forescale.engine.serve import replica
from forescale.engine.serve.arrays import Array, pack, unpack
from forescale.engine.serve.conformity import Misfit, conform
from forescale.engine.serve.execution import run_rows
from forescale.engine.serve.footprint import Footprint
from forescale.engine.serve.formats import LoadedModel, at_once
from forescale.engine.serve.messages import (
    Beat,
    Drain,
    Failed,
    FromReplica,
    Left,
    Load,
    Result,
    Run,
    Threads,
    ToReplica,
    from_replica,
)
from forescale.engine.serve.replica import House, _Inbox
from forescale.engine.wire import Message

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(None, 2)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(None, 2)),),
)


class Wire:
    """Both ends of a channel: what is asked, in order, and what was said."""

    name = "replica-1"

    def __init__(self, asked: list[Message]) -> None:
        self._asked = asked
        self.said: list[tuple[FromReplica | None, list]] = []
        self.senders: list[str | None] = []

    def receive(self, timeout_s: float | None = None) -> Message:
        return self._asked.pop(0)

    def send(self, header: Mapping, frames=()) -> None:
        self.said.append((from_replica(header), list(frames)))
        self.senders.append(header.get("from"))


NAME = "m.1.1"


def order(asked: ToReplica, frames=(), to: str = NAME) -> Message:
    return Message(sender="", header={**asked.to_header(), "to": to}, frames=tuple(frames))


def batch(number: int, **arrays: Array) -> Message:
    tensors, frames = pack(arrays)
    return order(Run(batch=number, inputs=tensors), frames)


DRAIN = order(Drain())
CPU = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=0)


def house(limit_bytes: int = 1 << 40, **runs: Callable) -> tuple[House, Wire]:
    """Models by the names of their replicas, with "_" for a dot."""
    wire = Wire([])
    made = House(wire, CPU, Footprint(CPU), limit_bytes)  # type: ignore[arg-type]
    for name, run in runs.items():
        made.models[name.replace("_", ".")] = LoadedModel(signature=SIGNATURE, run=at_once(run))
    return made, wire


def answers(run: Callable, *batches: Message) -> list[tuple[FromReplica | None, list]]:
    made, wire = house(m_1_1=run)
    for each in batches:
        made.obey(each)
    return wire.said


def points(rows: int) -> Array:
    return np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)


def raises(error: BaseException) -> Callable:
    def run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        raise error

    return run


def test_a_batch_is_answered_with_its_outputs() -> None:
    ((result, frames),) = answers(lambda inputs: {"y": inputs["x"] + 1}, batch(7, x=points(3)))
    assert isinstance(result, Result)
    assert result.batch == 7
    assert unpack(result.outputs, frames)["y"].tolist() == (points(3) + 1).tolist()


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("torch_threads")
def test_threads_are_changed_between_batches_and_told_with_each() -> None:
    def run(_inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return {"y": np.full((2, 2), torch.get_num_threads(), np.float32)}

    def threads(number: int) -> Message:
        return order(Threads(threads=number))

    x = points(2)
    said = answers(run, threads(2), batch(1, x=x), threads(3), batch(2, x=x), threads(1), batch(3, x=x))
    for (result, frames), number in zip(said, (2, 3, 1), strict=True):
        assert isinstance(result, Result)
        assert result.threads == unpack(result.outputs, frames)["y"][0, 0] == number
    made, wire = house()
    made.models[NAME] = LoadedModel(signature=SIGNATURE, run=at_once(run), threads=7)
    made.obey(threads(2))
    made.obey(batch(1, x=x))
    ((result, _),) = wire.said
    assert isinstance(result, Result)
    assert result.threads == 7  # which that format cannot change


@pytest.mark.usefixtures("torch_threads")
def test_each_replica_of_a_process_has_its_own_threads() -> None:
    def run(_inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return {"y": np.full((2, 2), torch.get_num_threads(), np.float32)}

    made, wire = house(a_1_1=run, b_1_2=run)
    tensors, frames = pack({"x": points(2)})
    made.obey(order(Threads(threads=3), to="a.1.1"))
    made.obey(order(Threads(threads=2), to="b.1.2"))
    for to in ("a.1.1", "b.1.2", "a.1.1"):
        made.obey(order(Run(batch=1, inputs=tensors), frames, to))
    assert [result.threads for result, _ in wire.said if isinstance(result, Result)] == [3, 2, 3]


@pytest.mark.parametrize(
    ("run", "failure", "error"),
    [
        (raises(KeyError("k")), "model", "KeyError: 'k'"),
        (raises(SystemExit("bye")), "model", "SystemExit: bye"),
        (raises(MemoryError("all gone")), "memory", "MemoryError: all gone"),
        (raises(RuntimeError("can't allocate memory: you tried")), "memory", "RuntimeError: can't allocate"),
        (lambda inputs: {"z": inputs["x"]}, "output", "the outputs are ['z'], not ['y']"),
        (lambda inputs: {"y": inputs["x"][:, :1]}, "output", "output y has shape (2, 1), not (any, 2)"),
        (lambda inputs: {"y": inputs["x"][:1]}, "output", "output y has 1 rows, not 2"),
        (lambda inputs: {"y": inputs["x"].astype(float)}, "output", "output y is float64, not FP32"),
        (lambda inputs: {"y": [1.0]}, "output", "output y is a list, not an array"),
        (lambda inputs: None, "model", "TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_a_model_that_fails_is_a_message_and_the_next_batch_is_served(
    run: Callable, failure: str, error: str
) -> None:
    calls = [run, lambda inputs: {"y": inputs["x"]}]

    def in_turn(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return calls.pop(0)(inputs)

    (first, _), (second, _) = answers(in_turn, batch(1, x=points(2)), batch(2, x=points(2)))
    assert isinstance(first, Failed)
    assert (first.batch, first.failure) == (1, failure)
    assert first.error.startswith(error)
    assert isinstance(second, Result)


@pytest.mark.parametrize(
    ("arrays", "error"),
    [
        ({}, "the inputs are [], not ['x']"),
        ({"x": points(2).astype(np.int64)}, "input x is int64, not FP32"),
        ({"x": np.zeros((2, 3), np.float32)}, "input x has shape (2, 3), not (any, 2)"),
        ({"x": np.zeros((2,), np.float32)}, "input x has shape (2,), not (any, 2)"),
        ({"x": points(0)}, "input x has 0 rows, not 1"),
    ],
)
def test_inputs_that_do_not_fit_never_reach_the_model(arrays: dict[str, Array], error: str) -> None:
    ((failed, _),) = answers(raises(AssertionError("reached")), batch(1, **arrays))
    assert failed == Failed(batch=1, error=error, failure="input")


def test_small_batches_are_filled_up_and_cut_again() -> None:
    seen = []

    def run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        seen.append(inputs["x"].tolist())
        return {"y": inputs["x"] * 2}

    model = LoadedModel(signature=SIGNATURE, run=at_once(run), least_rows=4, most_rows=4)
    assert run_rows(model, {"x": points(2)})["y"].tolist() == (points(2) * 2).tolist()
    assert seen == [[[0, 1], [2, 3], [2, 3], [2, 3]]]


def test_inputs_of_one_batch_have_equally_many_rows() -> None:
    specs = [TensorSpec(name=name, datatype="FP32", shape=(None,)) for name in "ab"]
    with pytest.raises(Misfit, match="input b has 3 rows, not 2"):
        conform({"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)}, specs, "input")


def test_a_replica_that_holds_its_memory_after_failing_ends_and_is_the_cause() -> None:
    made, wire = house(limit_bytes=1, m_1_1=raises(MemoryError("no more")))
    with pytest.raises(SystemExit, match="almost all of the memory"):
        made.obey(batch(1, x=points(1)))
    told = [said.batch for said, _ in wire.said if isinstance(said, Failed) and said.failure == "memory"]
    assert told == [1, None]


def test_replicas_of_one_process_answer_for_themselves_until_they_leave() -> None:
    made, wire = house(a_1_1=lambda inputs: {"y": inputs["x"]}, b_1_2=raises(ValueError("no")))
    run = Run(batch=3, inputs=pack({"x": points(1)})[0])
    frames = pack({"x": points(1)})[1]
    for to in ("a.1.1", "b.1.2"):
        made.obey(order(run, frames, to))
    made.obey(order(Drain(), to="b.1.2"))
    made.obey(order(run, frames, "a.1.1"))
    made.obey(order(Drain(), to="b.1.2"))  # the gateway and the crew may both say it
    made.obey(order(run, frames, "b.1.2"))
    assert wire.senders == ["a.1.1", "b.1.2", "b.1.2", "a.1.1"]
    assert [type(said) for said, _ in wire.said] == [Result, Failed, Left, Result]


def test_a_model_that_cannot_be_loaded_leaves_the_others_alone(tmp_path: Path) -> None:
    made, wire = house(a_1_1=lambda inputs: {"y": inputs["x"]})
    lost = Load(model="b", version="1", format="pt2", path=str(tmp_path / "missing.pt2"))
    made.obey(order(lost, to="b.1.2"))
    ((failed, _),) = wire.said
    assert isinstance(failed, Failed)
    assert (failed.failure, failed.batch, wire.senders) == ("load", None, ["b.1.2"])
    assert list(made.models) == ["a.1.1"]


def test_what_a_model_takes_is_the_most_that_it_ever_took() -> None:
    footprint = Footprint(CPU)
    assert footprint.process_bytes > 0
    footprint.turn("a")
    taken = np.ones(100_000_000, np.int8)
    footprint.turn("b")
    most_bytes = footprint.model_bytes()
    assert most_bytes["a"] >= taken.nbytes - 10_000_000
    assert most_bytes["b"] < 10_000_000
    del taken
    footprint.turn("b")
    assert footprint.model_bytes()["a"] == most_bytes["a"]
    footprint.forget("a")
    assert list(footprint.model_bytes()) == ["b"]


def test_a_replica_that_never_rests_says_what_it_takes_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "BEAT_S", 0.0)
    wire = Wire([DRAIN])
    footprint = Footprint(CPU)
    footprint.turn(NAME)
    assert _Inbox(wire, footprint).next() is DRAIN  # type: ignore[arg-type]
    ((beat, _),) = wire.said
    assert isinstance(beat, Beat)
    assert beat.model_bytes[NAME] <= footprint.model_bytes()[NAME]
