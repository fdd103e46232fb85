"""A replica's side of the conversation, without a process."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from forescale.core.cluster import Device, DeviceKind
from forescale.core.signature import Signature, TensorSpec
from forescale.engine.channel import Message
from forescale.engine.serve import replica
from forescale.engine.serve.arrays import Array, pack, unpack
from forescale.engine.serve.conformity import Misfit, conform
from forescale.engine.serve.footprint import Footprint
from forescale.engine.serve.formats import LoadedModel
from forescale.engine.serve.messages import Beat, Drain, Failed, FromReplica, Result, Run, from_replica
from forescale.engine.serve.replica import _Inbox, _serve, run_rows

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(None, 2)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(None, 2)),),
)


class Wire:
    """Both ends of a channel: what is asked, in order, and what was said."""

    name = "replica-1"

    def next(self) -> Message:
        return self.receive()

    def __init__(self, asked: list[Message]) -> None:
        self._asked = asked
        self.said: list[tuple[FromReplica | None, list]] = []

    def receive(self, timeout_s: float | None = None) -> Message:
        return self._asked.pop(0)

    def send(self, header: Mapping, frames=()) -> None:
        self.said.append((from_replica(header), list(frames)))


def batch(number: int, **arrays: Array) -> Message:
    tensors, frames = pack(arrays)
    return Message(sender="", header=Run(batch=number, inputs=tensors).to_header(), frames=tuple(frames))


DRAIN = Message(sender="", header=Drain().to_header(), frames=())


def answers(run: Callable, *batches: Message, **limits: int) -> list[tuple[FromReplica | None, list]]:
    wire = Wire([*batches, DRAIN])
    _serve(wire, LoadedModel(signature=SIGNATURE, run=run, **limits), limit_bytes=1 << 40, inbox=wire)  # type: ignore[arg-type]
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

    model = LoadedModel(signature=SIGNATURE, run=run, least_rows=4, most_rows=4)
    assert run_rows(model, {"x": points(2)})["y"].tolist() == (points(2) * 2).tolist()
    assert seen == [[[0, 1], [2, 3], [2, 3], [2, 3]]]


def test_inputs_of_one_batch_have_equally_many_rows() -> None:
    specs = [TensorSpec(name=name, datatype="FP32", shape=(None,)) for name in "ab"]
    with pytest.raises(Misfit, match="input b has 3 rows, not 2"):
        conform({"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)}, specs, "input")


def test_a_replica_that_holds_its_memory_after_failing_ends() -> None:
    wire = Wire([batch(1, x=points(1)), DRAIN])
    model = LoadedModel(signature=SIGNATURE, run=raises(MemoryError()))
    with pytest.raises(SystemExit, match="almost all of the memory"):
        _serve(wire, model, limit_bytes=1, inbox=wire)  # type: ignore[arg-type]
    assert len(wire.said) == 1


CPU = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=0)


def test_what_a_model_takes_is_the_most_that_it_ever_took() -> None:
    footprint = Footprint(CPU)
    assert footprint.process_bytes > 0
    before_bytes = footprint.model_bytes()
    taken = np.ones(100_000_000, np.int8)
    most_bytes = footprint.model_bytes()
    assert most_bytes >= taken.nbytes - 10_000_000
    assert most_bytes > before_bytes
    del taken
    assert footprint.model_bytes() == pytest.approx(most_bytes, rel=0.1)


def test_a_replica_that_never_rests_says_what_it_takes_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "BEAT_S", 0.0)
    wire = Wire([DRAIN])
    footprint = Footprint(CPU)
    assert _Inbox(wire, footprint).next() is DRAIN  # type: ignore[arg-type]
    ((beat, _),) = wire.said
    assert isinstance(beat, Beat)
    assert beat.model_bytes <= footprint.model_bytes()
