"""Predicted peaks against what the allocator saw of stages that run as the engine runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from forescale.core.errors import InvalidInput
from forescale.graph.capture import CapturedModel, capture
from forescale.graph.kernels import measure_loss_memory, measure_peak_bytes, measure_workspace
from forescale.graph.model import ModelGraph
from forescale.graph.peak import StageMemory, peak_bytes, workspace_table
from forescale.graph.program import compile_program
from forescale.graph.saved import measure_saved
from forescale.graph.size import compile_sizes, evaluate
from models import GPT, ResNet, UNet


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Kernels' own memory depends on the number of threads, and the machine may have fewer than it shows."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def token_rows(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length))


def images(rows: int, side: int) -> torch.Tensor:
    return torch.rand(rows, 3, side, side)


# Name -> (model, (rows, length or side) -> batch, rows and length it is measured at).
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], torch.Tensor], tuple[int, int]]] = {
    "transformer": (lambda: GPT(width=64, blocks=2, tied=True), token_rows, (3, 64)),
    "with dropout": (lambda: GPT(width=64, blocks=2, dropout=0.1), token_rows, (3, 64)),
    "residual": (lambda: ResNet(width=16), images, (3, 24)),
    "U-Net": (lambda: UNet(width=16), images, (3, 32)),
}


class Stage:
    """Runs operators on real tensors as a worker of the engine does: 1F1B, with tensors received ahead."""

    def __init__(self, captured: CapturedModel, graph: ModelGraph, operators: Sequence[int]) -> None:
        self._graph = graph
        inside = frozenset(operators)
        made = [t for t in graph.tensors.values() if t.producer in inside]
        sent = [t for t in made if not inside.issuperset(t.consumers) or t.name in graph.outputs]
        self._program = compile_program(graph, operators, [t.name for t in sent], torch.device("cpu"))
        self._carrying = [t.name for t in sent if t.requires_grad]
        self._values = [captured.state[name].detach() for name in self._program.state]
        self._trainable = [name in graph.parameters for name in self._program.state]

    def step(self, binding: Mapping[str, int], microbatches: int, in_flight: int, *, recompute: bool) -> None:
        """One step from the allocation of parameters and batch to the last gradient."""
        state = [v.clone().requires_grad_(t) for v, t in zip(self._values, self._trainable, strict=True)]
        names = self._program.inputs
        received = [n for n in names if self._graph.tensors[n].producer is not None]
        fed = [self._empty([n for n in names if n not in received], binding) for _ in range(microbatches)]
        arrived: dict[tuple[bool, int], dict[str, torch.Tensor]] = {}
        running: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        leaving: list[list[torch.Tensor | None]] = []
        order = schedule(microbatches, in_flight)
        for position, turn in enumerate(order):
            for expected in order[position : position + 2]:
                if expected not in arrived:
                    arrived[expected] = self._empty(received if expected[0] else self._carrying, binding)
            here, arrived[turn] = arrived[turn], {}
            forward, index = turn
            if forward:
                for name, tensor in here.items():
                    tensor.requires_grad_(self._graph.tensors[name].requires_grad)
                inputs = [here[n] if n in here else fed[index][n] for n in names]
                with torch.set_grad_enabled(not recompute):
                    running[index] = inputs, self._call(state, inputs, binding)
            else:
                inputs, outputs = running.pop(index)
                if recompute:
                    outputs = self._call(state, inputs, binding)
                torch.autograd.backward(outputs, list(here.values()))
                leaving = [*leaving, [tensor.grad for tensor in inputs]][-2:]
                del inputs, outputs
            del here

    def peak_bytes(
        self, binding: Mapping[str, int], microbatches: int, in_flight: int, *, recompute: bool
    ) -> int:
        def step() -> None:
            self.step(binding, microbatches, in_flight, recompute=recompute)

        step()  # fills kernels' caches
        return measure_peak_bytes(step)

    def _call(
        self, state: list[torch.Tensor], inputs: list[torch.Tensor], binding: Mapping[str, int]
    ) -> list[torch.Tensor]:
        program = self._program
        outputs = program.function(state, inputs, program.sizes(binding), lambda _: None, True)
        return [t for n, t in zip(program.outputs, outputs, strict=True) if n in self._carrying]

    def _empty(self, names: Sequence[str], binding: Mapping[str, int]) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for name in names:
            tensor = self._graph.tensors[name]
            shape = compile_sizes(tensor.shape, tuple(self._graph.symbols))(binding)
            made[name] = torch.zeros(shape, dtype=getattr(torch, tensor.dtype))
        return made


def schedule(microbatches: int, in_flight: int) -> list[tuple[bool, int]]:
    """Forwards (True) and backwards with the microbatch's number."""
    order = [(True, k) for k in range(in_flight)]
    for k in range(microbatches - in_flight):
        order += [(False, k), (True, k + in_flight)]
    return order + [(False, k) for k in range(microbatches - in_flight, microbatches)]


def parts(graph: ModelGraph) -> list[range]:
    count = len(graph.operators)
    return [range(count), range(count // 2), range(count // 2, count), range(count // 3, 2 * count // 3)]


@pytest.mark.parametrize("name", NETWORKS)
def test_predicts_the_allocators_peak_within_three_percent(name: str) -> None:
    make, batch, (rows, length) = NETWORKS[name]
    captured = capture(make(), (batch(rows, length),))
    graph = measure_saved(captured.graph)
    (source,) = graph.inputs
    samples = [{source: batch(rows, length)}, {source: batch(2 * rows, length)}]
    workspace = measure_workspace(graph, captured.state, samples)
    cases = [(1, 1, False), (4, 2, False), (3, 3, False), (4, 2, True)]
    for part in parts(graph):
        stage, memory = Stage(captured, graph, part), StageMemory(graph, part, workspace=workspace)
        binding = graph.bind({source: tuple(batch(rows + 2, 2 * length).shape)})
        for microbatches, in_flight, recompute in cases:
            seen = stage.peak_bytes(binding, microbatches, in_flight, recompute=recompute)
            predicted = peak_bytes(
                memory.measure(binding), microbatches=microbatches, in_flight=in_flight, recompute=recompute
            )
            assert predicted == pytest.approx(seen, rel=0.03), (part, microbatches, recompute)


@pytest.mark.parametrize("loss", ["cross entropy", "squares"])
def test_predicts_the_peak_of_a_last_stage_with_its_loss(loss: str) -> None:
    captured = capture(GPT(width=32, blocks=1, vocabulary=64), (token_rows(3, 32),))
    graph = measure_saved(captured.graph)
    targets = {rows: token_rows(rows, 32) for rows in (3, 6)}

    def lose(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        (logits,) = outputs
        if loss == "squares":
            return (logits**2).mean()
        return functional.cross_entropy(logits.flatten(0, 1), targets[len(logits)].flatten())

    part = range(len(graph.operators) // 2, len(graph.operators))
    loss_memory = measure_loss_memory(lose, [torch.rand(3, 32, 64)])
    memory = StageMemory(graph, part, loss=loss_memory)
    program = compile_program(graph, part, graph.outputs, torch.device("cpu"))
    binding = graph.bind({graph.inputs[0]: (6, 32)})
    tensors = [graph.tensors[name] for name in program.inputs]
    shapes = [compile_sizes(t.shape, tuple(graph.symbols))(binding) for t in tensors]

    def step() -> None:
        state = [captured.state[name].detach().clone().requires_grad_() for name in program.state]
        inputs = [torch.rand(shape).requires_grad_() for shape in shapes]
        lose(program.function(state, inputs, program.sizes(binding), lambda _: None, True)).backward()

    step()
    predicted = peak_bytes(memory.measure(binding), microbatches=1, in_flight=1)
    assert predicted == pytest.approx(measure_peak_bytes(step), rel=0.03)


@pytest.fixture(scope="module")
def small() -> ModelGraph:
    return measure_saved(capture(GPT(blocks=1), (token_rows(3, 16),)).graph)


def test_the_optimizers_state_and_every_microbatchs_inputs_count(small: ModelGraph) -> None:
    stage = StageMemory(small, range(len(small.operators))).measure(small.example)
    plain = peak_bytes(stage, microbatches=1, in_flight=1)
    assert stage.trainable_bytes == sum(p.numel() * 4 for p in GPT(blocks=1).parameters())
    with_state = peak_bytes(stage, microbatches=1, in_flight=1, optimizer_state_ratio=2.0)
    assert with_state - plain == 2 * stage.trainable_bytes
    assert stage.fed_bytes == 3 * 16 * 8


def test_more_in_flight_needs_more_and_recomputation_less(small: ModelGraph) -> None:
    stage = StageMemory(small, range(3, len(small.operators) - 2)).measure(small.example)
    needed = [peak_bytes(stage, microbatches=4, in_flight=k) for k in (1, 2, 3, 4)]
    assert needed == sorted(set(needed))
    assert peak_bytes(stage, microbatches=4, in_flight=4, recompute=True) < needed[-1]


def test_saved_storages_and_an_operators_need_add_up_to_the_peak(small: ModelGraph) -> None:
    binding, count = small.example, len(small.operators)
    exact = StageMemory(small, range(count)).measure(binding)
    need_bytes = workspace_table(small)(binding)
    made_by = {e.storage: e.operator for e in small.memory if e.begins and not e.backward}
    saved_bytes = [0] * count
    for storage in small.saved:
        if storage.name in made_by:
            saved_bytes[made_by[storage.name]] += evaluate(storage.size_bytes, binding)
    peak = max(sum(saved_bytes[: o + 1]) + need_bytes[o] for o in range(count))
    assert peak == pytest.approx(exact.backward_bytes, rel=0.05)


def test_asks_for_the_record_it_needs(small: ModelGraph) -> None:
    with pytest.raises(InvalidInput, match="measure_saved"):
        StageMemory(replace(small, memory=()), range(2))
