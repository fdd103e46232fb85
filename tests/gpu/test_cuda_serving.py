"""Replicas' models on a GPU: the same answers as on a CPU, also while batches overlap."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from forescale.core.cluster import Device, DeviceKind
from forescale.core.signature import Signature, TensorSpec
from forescale.engine.serve.arrays import Array, pack, unpack
from forescale.engine.serve.footprint import Footprint
from forescale.engine.serve.formats import LoadedModel, Order, format_named
from forescale.engine.serve.formats.pipeline import BatchOnGpu, Compute, Pipeline
from forescale.engine.serve.formats.transfer import place_of, runner
from forescale.engine.serve.messages import Drain, Failed, Header, Result, Run, from_replica
from forescale.engine.serve.replica import House, _Inbox, _serve
from forescale.engine.wire import Frame, Message

pytestmark = pytest.mark.gpu

CPU = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=1 << 30)
GPU = Device(name="cuda0", kind=DeviceKind.CUDA, memory_bytes=1 << 30)
LONG_CYCLES = 500_000_000  # of the GPU's clock: a quarter of a second at 2 GHz
ROWS, COLUMNS = 1 << 10, 1 << 12  # 16 MB of FP32


def pipeline(compute: Compute) -> Pipeline:
    return Pipeline(place_of(GPU), ["x"], ["y"], compute)


def values(seed: int, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def long_doubling(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    torch.cuda._sleep(LONG_CYCLES)
    return [2 * tensors[0]]


def test_arrays_pass_through_pinned_memory_unchanged() -> None:
    names = [str(n) for n in range(20)]
    arrays = {name: values(int(name), (1 << 12, 64)) for name in names}
    places: list[str] = []

    def compute(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        places.extend(tensor.device.type for tensor in tensors)
        return tensors

    back = runner(GPU, names, names, compute)(arrays).wait().outputs
    assert set(places) == {"cuda"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)


def test_outputs_of_any_layout_and_place_come_back_contiguous() -> None:
    def compute(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        (x,) = tensors
        return [x.t(), x[:, ::2], x[:1].expand(3, -1), torch.arange(3)]

    names = ["turned", "thinned", "repeated", "constant"]
    x = values(0, (5, 6))
    outputs = Pipeline(place_of(GPU), ["x"], names, compute).start({"x": x}).wait().outputs
    for name, expected in zip(names, [x.T, x[:, ::2], x[:1].repeat(3, axis=0), np.arange(3)], strict=True):
        np.testing.assert_array_equal(outputs[name], expected)
        assert outputs[name].flags.c_contiguous


def test_an_archive_answers_as_on_a_cpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4)).eval()
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(model, (torch.zeros(2, 8),), dynamic_shapes=({0: rows},))
    torch.export.save(program, tmp_path / "m.pt2")
    order = Order(path=tmp_path / "m.pt2")
    here, there = (format_named("pt2").load(order, device) for device in (CPU, GPU))
    name = here.signature.inputs[0].name
    for n in range(1, 40):
        x = values(n, (n, 8))
        answer = there.run({name: x}).wait().outputs
        for output, expected in here.run({name: x}).wait().outputs.items():
            np.testing.assert_allclose(answer[output], expected, rtol=1e-3, atol=1e-4)


def test_an_archive_whose_output_is_its_state_gives_each_batch_its_own(tmp_path: Path) -> None:
    class Sum(torch.nn.Module):
        total: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(ROWS, COLUMNS))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total.add_(x)
            return self.total

    torch.export.save(torch.export.export(Sum(), (torch.zeros(ROWS, COLUMNS),)), tmp_path / "sum.pt2")
    run = format_named("pt2").load(Order(path=tmp_path / "sum.pt2"), GPU).run
    underway = [run({"x": np.ones((ROWS, COLUMNS), np.float32)}) for _ in range(8)]
    for n, batch in enumerate(underway, start=1):
        assert (batch.wait().outputs["output"] == n).all()


def test_copies_of_other_batches_run_while_a_model_computes() -> None:
    start = pipeline(long_doubling).start
    arrays = [values(n) for n in range(3)]
    for x in arrays:  # memory, pinned and not, is there from here on
        start({"x": x})
    torch.cuda.synchronize()
    batches: list[BatchOnGpu] = [start({"x": x}) for x in arrays]
    assert not batches[0].is_over()  # so nothing has waited
    for x, batch in zip(arrays, batches, strict=True):
        np.testing.assert_array_equal(batch.wait().outputs["y"], 2 * x)
        assert batch.is_over()
    for former, following in pairwise(batches):
        _, computed, copied_out = former.stages
        copied_in, next_computed, _ = following.stages
        assert copied_in.last.elapsed_time(computed.last) > 0
        assert copied_out.last.elapsed_time(next_computed.last) > 0
        assert computed.last.elapsed_time(next_computed.first) >= 0  # models wait for each other


def test_a_batch_takes_no_longer_because_others_were_before_it() -> None:
    start = pipeline(long_doubling).start
    arrays = [values(n) for n in range(4)]
    alone_s = [start({"x": x}).wait().seconds for x in arrays][-1]
    batches = [start({"x": x}) for x in arrays]
    assert all(batch.wait().seconds < 1.5 * alone_s for batch in batches)


def test_memory_is_not_given_to_others_while_it_is_in_use() -> None:
    """Many batches are queued ahead, so that their memory is free for torch long before it is for the GPU."""

    def compute(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        more = tensors[0] + 1  # as the former's outputs begin to leave
        torch.cuda._sleep(LONG_CYCLES // 25)
        return [more, tensors[0]]

    start = Pipeline(place_of(GPU), ["x"], ["more", "same"], compute).start
    arrays = [np.full((ROWS, COLUMNS), n, np.float32) for n in range(30)]
    for _ in range(2):
        batches = [start({"x": x}) for x in arrays]
        for n, batch in enumerate(batches):
            outputs = batch.wait().outputs
            assert (outputs["more"] == n + 1).all()
            assert (outputs["same"] == n).all()


SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(None, COLUMNS)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(None, COLUMNS)),),
)


class Wire:
    """Messages that are there already, then the end."""

    name = "replica-1"

    def __init__(self, messages: Sequence[Message], readable: socket.socket) -> None:
        self._messages = [*messages, Message(sender="", header=Drain().to_header(), frames=())]
        self._readable = readable
        self.said: list[Result | Failed] = []
        self.outputs: dict[int, Array] = {}

    def fileno(self) -> int:
        return self._readable.fileno()

    def receive(self, timeout_s: float | None = None) -> Message:
        return self._messages.pop(0)

    def send(self, header: Header, frames: Sequence[Frame] = ()) -> None:
        said = from_replica(header)
        if isinstance(said, Result):
            self.outputs[said.batch] = unpack(said.outputs, frames)["y"].copy()
        if isinstance(said, Result | Failed):
            self.said.append(said)


@pytest.fixture
def readable() -> Iterator[socket.socket]:
    ours, other = socket.socketpair()
    with ours, other:
        other.send(b"!")
        yield ours


def run_of(batch: int, x: Array) -> Message:
    tensors, frames = pack({"x": x})
    return Message(
        sender="",
        header={**Run(batch=batch, inputs=tensors).to_header(), "to": "m.1.1"},
        frames=tuple(frames),
    )


def served(messages: Sequence[Message], compute: Compute, readable: socket.socket) -> Wire:
    wire = Wire(messages, readable)
    footprint = Footprint(GPU)
    house = House(wire, GPU, footprint, 1 << 60)  # type: ignore[arg-type]
    house.models["m.1.1"] = LoadedModel(signature=SIGNATURE, run=runner(GPU, ["x"], ["y"], compute))
    _serve(house, _Inbox(wire, footprint))  # type: ignore[arg-type]
    return wire


def test_a_replica_answers_in_order_what_overlaps(readable: socket.socket) -> None:
    batches = {n: values(n, (n, COLUMNS)) for n in range(1, 60)}
    wire = served([run_of(n, x) for n, x in batches.items()], lambda tensors: [2 * tensors[0]], readable)
    assert [said.batch for said in wire.said] == list(batches)
    for n, x in batches.items():
        np.testing.assert_array_equal(wire.outputs[n], 2 * x)


def test_a_batch_that_finds_no_memory_fails_alone(readable: socket.socket) -> None:
    def compute(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        torch.cuda._sleep(LONG_CYCLES // 10)
        if tensors[0].shape[0] == 3:
            torch.empty(1 << 50, dtype=torch.int8, device="cuda:0")
        return [2 * tensors[0]]

    wire = served([run_of(n, values(n, (n, COLUMNS))) for n in range(1, 6)], compute, readable)
    assert [said.batch for said in wire.said] == [1, 2, 3, 4, 5]
    failed = wire.said[2]
    assert isinstance(failed, Failed)
    assert failed.failure == "memory"
    assert sorted(wire.outputs) == [1, 2, 4, 5]
    for n, outputs in wire.outputs.items():
        np.testing.assert_array_equal(outputs, 2 * values(n, (n, COLUMNS)))
