"""Runs the shards of a captured model in threads of this process, which exchange tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from threading import Condition
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from forescale.graph.capture import CapturedModel
from forescale.graph.model import ModelGraph
from forescale.graph.program import compile_program
from forescale.graph.sharding import Sharded, Slice, shard_operators
from forescale.graph.size import evaluate

CPU = torch.device("cpu")


@dataclass
class Run:
    """Outputs, gradients and buffers after one forward and backward."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


class Meeting:
    """Where threads show each other tensors; one runs at a time, as the random numbers are for all."""

    def __init__(self, parts: int) -> None:
        self._running = list(range(parts))  # whose turn it is comes first
        self._turns = Condition()
        self._shown: list[list[tuple[str, Tensor]]] = [[] for _ in range(parts)]

    @contextmanager
    def turn(self, index: int) -> Generator[None]:
        self._wait(index)
        try:
            yield
        finally:
            with self._turns:
                self._running.remove(index)
                self._turns.notify_all()

    def show(self, index: int, what: str, tensor: Tensor) -> list[Tensor]:
        self._shown[index].append((what, tensor.detach()))
        number = len(self._shown[index]) - 1
        with self._turns:
            self._running.append(self._running.pop(0))
            self._turns.notify_all()
        self._wait(index)
        shown = [tensors[number] for tensors in self._shown]
        assert len({what for what, _ in shown}) == 1, "shards met at different collectives"
        return [tensor for _, tensor in shown]

    def _wait(self, index: int) -> None:
        with self._turns:
            self._turns.wait_for(lambda: self._running[0] == index)


def differentiable(forward: Callable[..., Tensor], backward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    class Collective(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, more: Sequence[Any]) -> Tensor:
            ctx.more = more
            return forward(x, *more)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            return backward(gradients[0], *ctx.more), None

    return lambda x, *more: Collective.apply(x, more)


def collectives(meeting: Meeting, index: int) -> dict[str, Callable[..., Tensor]]:
    def same(x: Tensor, *_: Any) -> Tensor:
        return x.clone()

    def total(x: Tensor) -> Tensor:
        return torch.stack(meeting.show(index, "total", x)).sum(0)

    def part(x: Tensor, axis: int, outer: int, inner: int, bounds: Sequence[int]) -> Tensor:
        own = Slice(
            axis=axis, outer=outer, units=bounds[-1], inner=inner, start=bounds[index], stop=bounds[index + 1]
        )
        return cut(x, own).clone()

    def gather(x: Tensor, axis: int, outer: int, inner: int, bounds: Sequence[int]) -> Tensor:
        widths = [(b - a) * inner for a, b in pairwise(bounds)]
        parts = [
            shown.unflatten(axis, (outer, width))
            for shown, width in zip(meeting.show(index, "gather", x), widths, strict=True)
        ]
        return torch.cat(parts, axis + 1).flatten(axis, axis + 1)

    return {
        "collective:spread": differentiable(same, total),
        "collective:total": differentiable(total, same),
        "collective:gather": differentiable(gather, part),
        "collective:part": differentiable(part, gather),
    }


def cut(tensor: Tensor, part: Slice | None) -> Tensor:
    if part is None:
        return tensor
    units = tensor.unflatten(part.axis, (part.outer, part.units, part.inner))
    return units.narrow(part.axis + 1, part.start, part.stop - part.start).flatten(part.axis, part.axis + 2)


def run_graph(
    graph: ModelGraph,
    operators: Sequence[int],
    outputs: Sequence[str],
    values: Mapping[str, Tensor],
    binding: Mapping[str, int],
    modules: Mapping[str, Callable[..., Any]],
) -> Run:
    """One forward and backward, whose loss is every output times numbers of its own.

    Args:
        values: of tensors from outside, parameters and buffers.
    """
    program = compile_program(graph, operators, outputs, CPU, modules)
    trained = {n for n, p in graph.parameters.items() if p.trainable}
    trained |= {n for n, t in graph.tensors.items() if t.requires_grad}
    leaves = {
        name: values[name].detach().clone().requires_grad_(name in trained)
        for name in (*program.state, *program.inputs)
    }
    results = program.function(
        [leaves[name] for name in program.state],
        [leaves[name] for name in program.inputs],
        program.sizes(binding),
        lambda _: torch.manual_seed(3),
        True,
    )
    for name, value in zip(outputs, results, strict=True):
        assert tuple(value.shape) == tuple(evaluate(size, binding) for size in graph.tensors[name].shape)
    torch.stack([(x * torch.linspace(-1, 2, x.numel()).view_as(x)).sum() for x in results]).sum().backward()
    return Run(
        outputs={name: value.detach() for name, value in zip(outputs, results, strict=True)},
        gradients={name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad},
        buffers={name: leaf for name, leaf in leaves.items() if name in graph.buffers},
    )


def shards_of(captured: CapturedModel, weights: Sequence[int], first: int = 0) -> list[Sharded]:
    """All shards of the operators from ``first`` on."""
    graph = captured.graph
    operators = range(first, len(graph.operators))
    return [shard_operators(graph, operators, index, weights, graph.outputs) for index in range(len(weights))]


def assert_shards_are_the_whole(
    captured: CapturedModel, weights: Sequence[int], example: Tensor, first: int = 0
) -> list[Sharded]:
    """Runs all shards of the operators from ``first`` on, and compares everything with them run whole."""
    graph = captured.graph
    feeds = captured.inputs.feed((example,), {})
    binding = graph.bind({name: tuple(x.shape) for name, x in feeds.items()})
    values = {**captured.state, **feeds}
    if first:
        made = [name for o in graph.operators[:first] for name in o.outputs if name]
        values |= run_graph(graph, range(first), made, values, binding, {}).outputs
    whole = run_graph(graph, range(first, len(graph.operators)), graph.outputs, values, binding, {})
    meeting, shards = Meeting(len(weights)), shards_of(captured, weights, first)

    def run(index: int) -> Run:
        shard = shards[index]
        own = {name: cut(value, shard.slices.get(name)) for name, value in values.items()}
        for name, held in {**shard.graph.parameters, **shard.graph.buffers}.items():
            assert tuple(own[name].shape) == held.shape
        with meeting.turn(index):
            operators = range(len(shard.graph.operators))
            modules = collectives(meeting, index)
            return run_graph(shard.graph, operators, graph.outputs, own, binding, modules)

    with ThreadPoolExecutor(len(weights)) as pool:
        runs = list(pool.map(run, range(len(weights))))
    for shard, found in zip(shards, runs, strict=True):
        for kind in ("outputs", "gradients", "buffers"):
            expected = getattr(whole, kind)
            for name, value in getattr(found, kind).items():
                wanted = cut(expected[name], shard.slices.get(name))
                scale = float(wanted.abs().max()) if wanted.numel() else 0.0
                torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5 * scale + 1e-8)
    assert {n for found in runs for n in found.gradients} == set(whole.gradients)
    return shards
