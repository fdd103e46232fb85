"""Memory as a real device's allocator sees it.

Kernels may take memory beside the tensors they return: a convolution of oneDNN first copies its operands
to another layout. One real pass, one operator after another, shows how far each of them goes above the
record of tensors.

Axes: K = microbatch, O = operator, P = phase (forward, backward).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.autograd.profiler import profile, record_function

from forescale.graph.cost import cost_table
from forescale.graph.model import ModelGraph
from forescale.graph.onebyone import OneByOne
from forescale.graph.peak import Array, Growth, KernelWorkspace, LossMemory
from forescale.graph.size import compile_sizes

_CPU = torch.device("cpu")
_MARK = "forescale:"

Turn = tuple[int, bool]
"""Operator, and whether it is its backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """The allocator's total during one turn, above that at the start of the run."""

    turn: Turn
    start_bytes: float
    most_bytes: float
    end_bytes: float


def measure_peak_bytes(run: Callable[[], object], device: torch.device = _CPU) -> int:
    """How far the allocator's total rises above its level at the start while ``run`` runs."""
    return round(max(level.most_bytes for level in _Allocator(device).levels(run)))


def measure_workspace(
    graph: ModelGraph,
    state: Mapping[str, torch.Tensor],
    microbatches: Sequence[Mapping[str, torch.Tensor]],
    device: torch.device = _CPU,
    modules: Mapping[str, Callable[..., Any]] | None = None,
) -> KernelWorkspace:
    """What the kernels of ``device`` take beside tensors, from two real passes over each microbatch.

    Args:
        graph: with ``memory`` recorded.
        state: values of parameters and buffers; they stay unchanged.
        microbatches: batch inputs. Two of different size tell what grows with the batch from what does not;
            with one, all of it is taken to grow.
    """
    one_by_one = OneByOne(graph, _own_state(graph, state, device), device, modules or {})
    allocator, costs = _Allocator(device), cost_table(graph)
    moved: list[tuple[Array, Array]] = []
    excess: list[list[Array]] = []
    for microbatch in microbatches:
        inputs = {name: tensor.to(device) for name, tensor in microbatch.items()}
        binding = graph.bind({name: tuple(tensor.shape) for name, tensor in inputs.items()})
        one_by_one.run(inputs, binding, allocator)  # the first pass also fills kernels' caches
        measured = allocator.levels(partial(one_by_one.run, inputs, binding, allocator))
        recorded = _recorded_levels(graph, binding)
        differences = zip(_rises(graph, measured), _rises(graph, recorded), strict=True)
        excess.append([seen - said for seen, said in differences])
        cost = costs(binding)
        moved.append((cost.forward_bytes_O, cost.backward_bytes_O))
    forward_moved_KO, backward_moved_KO = (np.stack(moved_KO) for moved_KO in zip(*moved, strict=True))
    forward_KO, backward_KO, kept_KO = (np.stack(excess_KO) for excess_KO in zip(*excess, strict=True))
    return KernelWorkspace(
        forward=_line(forward_moved_KO, forward_KO),
        backward=_line(backward_moved_KO, backward_KO),
        kept=_line(forward_moved_KO, kept_KO),
    )


def _line(x_KO: Array, y_KO: Array) -> Growth:
    """Least-squares lines over axis K; through the origin where x does not vary."""
    middle_x_O, middle_y_O = x_KO.mean(0), y_KO.mean(0)
    spread_O = ((x_KO - middle_x_O) ** 2).sum(0)
    slope_O = np.divide(middle_y_O, middle_x_O, out=np.zeros_like(middle_y_O), where=middle_x_O > 0)
    rise_O = ((x_KO - middle_x_O) * (y_KO - middle_y_O)).sum(0)
    np.divide(rise_O, spread_O, out=slope_O, where=spread_O > 0)
    return Growth(fixed_bytes_O=middle_y_O - slope_O * middle_x_O, ratio_O=slope_O)


def measure_loss_memory(
    loss: Callable[[Sequence[torch.Tensor]], torch.Tensor],
    outputs: Sequence[torch.Tensor],
    device: torch.device = _CPU,
) -> LossMemory:
    """Memory of a loss, from one real forward and backward.

    Args:
        loss: the model's output tensors -> scalar; the batch is already inside.
        outputs: tensors shaped like the model's outputs.
    """
    leaves = [o.detach().to(device).requires_grad_(o.is_floating_point()) for o in outputs]
    sizes = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in leaves}
    held: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.add(tensor.untyped_storage().data_ptr())
        return tensor

    allocator = _Allocator(device)

    def run() -> None:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss(leaves)
        allocator.turn(0, backward=True)
        value.backward()

    forward, backward = allocator.levels(run)
    output_bytes = float(sum(sizes.values()))
    kept_bytes = sum(size for pointer, size in sizes.items() if pointer in held)
    return LossMemory(
        forward_ratio=forward.most_bytes / output_bytes,
        kept_ratio=(backward.start_bytes + kept_bytes) / output_bytes,
        backward_ratio=(backward.most_bytes + kept_bytes) / output_bytes,
    )


class _Allocator:
    """Watches a device's allocator; learns of turns as :class:`~forescale.graph.onebyone.Turns`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._levels: list[_Level] = []
        self._turn: Turn = (-1, False)
        self._start_bytes = self._origin_bytes = 0

    def levels(self, run: Callable[[], object]) -> list[_Level]:
        """Runs ``run`` and returns one level per turn, in order; the first begins with the run."""
        if self._device.type == "cuda":
            return self._cuda_levels(run)
        # Its announcements of start and stop are of no use to the user; it reads this at its first start.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        profiler: Any = profile(profile_memory=True)
        with profiler:
            run()
        return _replay(
            _parse(event.name()) if event.name().startswith(_MARK) else float(event.nbytes())
            for event in sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns())
            if event.name().startswith(_MARK) or event.name() == "[memory]"
        )

    def turn(self, operator: int, *, backward: bool) -> None:
        if self._device.type == "cuda":
            self._close()
            self._turn = (operator, backward)
        else:
            with record_function(f"{_MARK}{operator}:{int(backward)}"):
                pass

    def sum_gradients(self) -> None:
        """It belongs to the operator before it."""

    def made(self, name: str, tensor: torch.Tensor) -> None:
        """Of no interest here."""

    def keep(self, tensor: torch.Tensor) -> None:
        """Of no interest here."""

    def _cuda_levels(self, run: Callable[[], object]) -> list[_Level]:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._levels, self._turn = [], (-1, False)
        self._origin_bytes = self._start_bytes = torch.cuda.memory_allocated(self._device)
        run()
        self._close()
        return self._levels

    def _close(self) -> None:
        """Ends a turn on a GPU, whose allocator keeps the peak itself."""
        most_bytes, end_bytes = (
            torch.cuda.max_memory_allocated(self._device),
            torch.cuda.memory_allocated(self._device),
        )
        torch.cuda.reset_peak_memory_stats(self._device)
        self._levels.append(
            _Level(
                turn=self._turn,
                start_bytes=self._start_bytes - self._origin_bytes,
                most_bytes=most_bytes - self._origin_bytes,
                end_bytes=end_bytes - self._origin_bytes,
            )
        )
        self._start_bytes = end_bytes


def _parse(mark: str) -> Turn:
    operator, backward = mark.removeprefix(_MARK).split(":")
    return int(operator), backward == "1"


def _replay(entries: Iterable[Turn | float]) -> list[_Level]:
    """Levels from a sequence of turns and of changes of the total."""
    turn, live, start, most = (-1, False), 0.0, 0.0, 0.0
    levels: list[_Level] = []
    for entry in entries:
        if isinstance(entry, tuple):
            levels.append(_Level(turn=turn, start_bytes=start, most_bytes=most, end_bytes=live))
            turn, start, most = entry, live, live
        else:
            live += entry
            most = max(most, live)
    return [*levels, _Level(turn=turn, start_bytes=start, most_bytes=most, end_bytes=live)]


def _recorded_levels(graph: ModelGraph, binding: Mapping[str, int]) -> list[_Level]:
    """The levels there would be if memory held nothing but the recorded storages."""
    sizes = compile_sizes([event.size_bytes for event in graph.memory], tuple(graph.symbols))(binding)
    entries: list[Turn | float] = []
    turn = None
    for event, size in zip(graph.memory, sizes, strict=True):
        if (event.operator, event.backward) != turn:
            turn = (event.operator, event.backward)
            entries.append(turn)
        entries.append(float(size if event.begins else -size))
    return _replay(entries)


def _rises(graph: ModelGraph, levels: Iterable[_Level]) -> tuple[Array, Array, Array]:
    """The most that each operator's forward and its backward add, and what its forward leaves behind."""
    rises_PO = np.zeros((2, len(graph.operators)))
    left_O = np.zeros(len(graph.operators))
    for level in levels:
        operator, backward = level.turn
        if 0 <= operator < len(graph.operators):
            rise = level.most_bytes - level.start_bytes
            rises_PO[int(backward), operator] = max(rises_PO[int(backward), operator], rise)
            if not backward:
                left_O[operator] += level.end_bytes - level.start_bytes
    return rises_PO[0], rises_PO[1], left_O


def _own_state(
    graph: ModelGraph, state: Mapping[str, torch.Tensor], device: torch.device
) -> dict[str, torch.Tensor]:
    """Parameters that share the model's memory but have gradients of their own; copies of buffers."""
    own = {name: value.detach().to(device, copy=name in graph.buffers) for name, value in state.items()}
    for name, parameter in graph.parameters.items():
        if parameter.trainable:
            own[name] = own[name].detach().requires_grad_()
            own[name].grad = torch.zeros_like(own[name])
    return own
