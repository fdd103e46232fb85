"""Runs the shards of a captured model in threads of this process, which exchange tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from threading import Barrier
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
    """Where threads show each other tensors."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.barrier = Barrier(parts, timeout=60)
        self._shown: list[tuple[str, Tensor]] = [("", torch.empty(0))] * parts

    def show(self, index: int, what: str, tensor: Tensor) -> list[Tensor]:
        self._shown[index] = (what, tensor.detach())
        self.barrier.wait()
        shown = list(self._shown)
        self.barrier.wait()
        assert len({what for what, _ in shown}) == 1, "shards met at different collectives"
        return [tensor for _, tensor in shown]


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
    state: Mapping[str, Tensor],
    feeds: Mapping[str, Tensor],
    binding: Mapping[str, int],
    modules: Mapping[str, Callable[..., Any]],
) -> Run:
    """One forward and backward of a graph, whose result is every output times numbers of its own."""
    program = compile_program(graph, range(len(graph.operators)), graph.outputs, CPU, modules)
    leaves = {
        name: value.detach().clone().requires_grad_(name in graph.parameters) for name, value in state.items()
    }
    inputs = {n: x.detach().clone().requires_grad_(x.is_floating_point()) for n, x in feeds.items()}
    results = program.function(
        [leaves[name] for name in program.state],
        [inputs[name] for name in program.inputs],
        program.sizes(binding),
        lambda _: torch.manual_seed(3),
        True,
    )
    outputs = dict(zip(program.outputs, results, strict=True))
    loss = sum(
        (outputs[name] * torch.linspace(-1, 2, outputs[name].numel()).view_as(outputs[name])).sum()
        for name in outputs
        if outputs[name].requires_grad
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    for name, value in outputs.items():
        assert tuple(value.shape) == tuple(evaluate(size, binding) for size in graph.tensors[name].shape)
    return Run(
        outputs={name: value.detach() for name, value in outputs.items()},
        gradients={name: value.grad for name, value in {**leaves, **inputs}.items() if value.requires_grad},
        buffers={name: value for name, value in leaves.items() if name not in graph.parameters},
    )


def shards_of(captured: CapturedModel, weights: Sequence[int]) -> list[Sharded]:
    graph = captured.graph
    return [
        shard_operators(graph, range(len(graph.operators)), index, weights, graph.outputs)
        for index in range(len(weights))
    ]


def assert_shards_are_the_whole(
    captured: CapturedModel, weights: Sequence[int], *args: Any, **kwargs: Any
) -> None:
    """Runs all shards together and compares everything with the whole model."""
    feeds = captured.inputs.feed(args, kwargs)
    binding = captured.graph.bind({name: tuple(x.shape) for name, x in feeds.items()})
    state = {
        n: v
        for n, v in captured.state.items()
        if captured.graph.parameters.get(n) or n in captured.graph.buffers
    }
    whole = run_graph(captured.graph, state, feeds, binding, captured.modules)
    meeting, shards = Meeting(len(weights)), shards_of(captured, weights)

    def run(index: int) -> Run:
        shard = shards[index]
        own = {
            name: cut(state[name], shard.slices.get(name))
            for name in (*shard.graph.parameters, *shard.graph.buffers)
        }
        for name, value in own.items():
            held = shard.graph.parameters.get(name) or shard.graph.buffers[name]
            assert tuple(value.shape) == held.shape
        taken = {name: feeds[name] for name in shard.graph.inputs}
        try:
            return run_graph(shard.graph, own, taken, binding, collectives(meeting, index))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(len(weights)) as pool:
        runs = list(pool.map(run, range(len(weights))))
    for shard, found in zip(shards, runs, strict=True):
        for name, value in found.outputs.items():
            torch.testing.assert_close(value, whole.outputs[name], rtol=1e-5, atol=1e-6)
        for name, gradient in found.gradients.items():
            expected = whole.gradients[name]
            if expected is None or gradient is None:
                assert expected is gradient
                continue
            expected = cut(expected, shard.slices.get(name))
            torch.testing.assert_close(
                gradient, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max() + 1)
            )
        for name, value in found.buffers.items():
            torch.testing.assert_close(value, cut(whole.buffers[name], shard.slices.get(name)))
