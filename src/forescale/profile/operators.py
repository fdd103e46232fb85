"""Times every operator of a captured model, forward and backward, where it really runs: inside a whole pass.

Operators run one by one in captured order with gradients recorded. In the backward a hook in front of
every autograd node takes the time, so sums of gradients and accumulation into parameters are in it, and
caches are as warm or cold as they are in training. Passes without hooks alternate with these and give the
totals to which the operators' seconds are scaled. Where gradients of parameters can be computed apart, a
third sort of pass does that, after the rest of the backward, and times both parts.

Axes: O = operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from forescale.core.clock import Clock, SystemClock
from forescale.graph.capture import CapturedModel
from forescale.graph.deferral import Deferral
from forescale.graph.program import Program, Reseed, compile_program
from forescale.profile.measurement import Array, OperatorMeasurement

Loss = Callable[[Any], torch.Tensor]
"""Output of the model -> scalar loss; the batch is already inside, on the device of the measurement."""

LEAST_PASSES, MOST_PASSES = 2, 25
OPTIMIZER_BYTES = 64 << 20
"""Parameters the optimiser is timed with: more than caches hold, little enough to be quick."""
LEAST_UPDATES, MOST_UPDATES = 3, 20


def measure_operators(
    captured: CapturedModel,
    inputs: Sequence[torch.Tensor],
    loss: Loss,
    *,
    device: torch.device | None = None,
    reseed: Reseed | None = None,
    clock: Clock | None = None,
    budget_s: float = 4.0,
) -> OperatorMeasurement:
    """Seconds of every operator for one microbatch, with this process's thread and affinity settings.

    The model's parameters, buffers and gradients and the random state stay as they are.

    Args:
        inputs: one microbatch, in the order of ``graph.inputs``.
        device: where to run (default: CPU).
        reseed: what training calls before a random operator; its time is part of the operator's
            (default: seeds the CPU generator).
        budget_s: about how long to measure; at least ``LEAST_PASSES`` passes of each sort are made.
    """
    place = device or torch.device("cpu")
    with torch.random.fork_rng(range(torch.cuda.device_count()) if place.type == "cuda" else ()):
        passes = _Passes(captured, inputs, loss, place, reseed or _seed, clock or SystemClock())
        return passes.measure(budget_s)


def _seed(operator: int) -> None:
    torch.default_generator.manual_seed(operator)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """Seconds of one pass; the loss is the entry behind the last operator's.

    ``weight_s_O``: gradients of parameters that were computed after the backward.
    """

    forward_s_O: Array
    backward_s_O: Array
    weight_s_O: Array


class _Passes:
    """Runs passes of one model on one microbatch."""

    def __init__(
        self,
        captured: CapturedModel,
        inputs: Sequence[torch.Tensor],
        loss: Loss,
        device: torch.device,
        reseed: Reseed,
        clock: Clock,
    ) -> None:
        self._graph, self._output = captured.graph, captured.output
        self._device, self._loss, self._reseed, self._clock = device, loss, reseed, clock
        self._inputs = {
            name: tensor.to(device) for name, tensor in zip(self._graph.inputs, inputs, strict=True)
        }
        self._binding = self._graph.bind({name: tuple(tensor.shape) for name, tensor in self._inputs.items()})
        self._state = _own_state(captured, device)
        indices = range(len(self._graph.operators))
        outputs = [[name for name in operator.outputs if name] for operator in self._graph.operators]
        self._deferral = Deferral()
        wraps = self._deferral.wraps(self._graph, indices)
        self._programs, self._splitting = (
            [
                compile_program(self._graph, [index], outputs[index], device, captured.modules, wrapped)
                for index in indices
            ]
            for wrapped in (None, wraps)
        )
        self._split_O = np.isin(indices, list(wraps))
        self._whole = compile_program(self._graph, indices, self._graph.outputs, device, captured.modules)
        last_use = {
            name: index
            for index in indices
            for name in (*self._graph.operators[index].inputs, *outputs[index])
        }
        self._dead_after: list[list[str]] = [[] for _ in indices]
        for name, index in last_use.items():
            if name not in self._graph.outputs:
                self._dead_after[index].append(name)

    def measure(self, budget_s: float) -> OperatorMeasurement:
        saved_bytes = self._loss_saved_bytes()  # also the warm-up
        hooked: list[_Pass] = []
        split: list[_Pass] = []
        plain: list[tuple[float, float]] = []
        started = self._clock.monotonic_s()
        while len(plain) < MOST_PASSES:
            if len(plain) >= LEAST_PASSES and self._clock.monotonic_s() - started > budget_s:
                break
            plain.append(self._plain_pass())
            hooked.append(self._hooked_pass(self._programs))
            if self._split_O.any():
                split.append(self._hooked_pass(self._splitting))
        forward_s_O = np.median([p.forward_s_O for p in hooked], axis=0)
        backward_s_O = np.median([p.backward_s_O for p in hooked], axis=0)
        forward_s_O *= median(forward_s for forward_s, _ in plain) / forward_s_O.sum()
        backward_s_O *= median(backward_s for _, backward_s in plain) / max(backward_s_O.sum(), 1e-12)
        input_s_O, weight_s_O = self._parts(hooked, split, backward_s_O[:-1])
        return OperatorMeasurement(
            binding=dict(self._binding),
            forward_s_O=forward_s_O[:-1],
            backward_s_O=backward_s_O[:-1],
            input_s_O=input_s_O,
            weight_s_O=weight_s_O,
            loss_forward_s=float(forward_s_O[-1]),
            loss_backward_s=float(backward_s_O[-1]),
            loss_saved_bytes=saved_bytes,
        )

    def _parts(
        self, hooked: Sequence[_Pass], split: Sequence[_Pass], backward_s_O: Array
    ) -> tuple[Array, Array]:
        """The backwards in two parts; what splitting costs, in the forward too, is in the first."""
        if not split:
            return backward_s_O, np.zeros_like(backward_s_O)
        scale = backward_s_O.sum() / max(np.median([p.backward_s_O[:-1].sum() for p in hooked]), 1e-12)
        first_s_O = np.median([p.forward_s_O + p.backward_s_O for p in split], axis=0)[:-1]
        first_s_O -= np.median([p.forward_s_O for p in hooked], axis=0)[:-1]
        weight_s_O = np.median([p.weight_s_O for p in split], axis=0)[:-1]
        return np.where(self._split_O, np.maximum(first_s_O, 0.0) * scale, backward_s_O), weight_s_O * scale

    def _now_s(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock.monotonic_s()

    def _call(self, program: Program, values: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        state = [self._state[name] for name in program.state]
        inputs = [values[name] for name in program.inputs]
        return program.function(state, inputs, program.sizes(self._binding), self._reseed, True)

    def _plain_pass(self) -> tuple[float, float]:
        before = self._now_s()
        outputs = self._call(self._whole, self._inputs)
        loss = self._loss(self._output.rebuild(dict(zip(self._graph.outputs, outputs, strict=True))))
        between = self._now_s()
        loss.backward()
        return between - before, self._now_s() - between

    def _hooked_pass(self, programs: Sequence[Program]) -> _Pass:
        count = len(self._graph.operators)
        forward_s_O = np.zeros(count + 1)
        owners: dict[Any, int] = {}
        values = dict(self._inputs)
        for index, program in enumerate(programs):
            state = [self._state[name] for name in program.state]
            inputs = [values[name] for name in program.inputs]
            sizes = program.sizes(self._binding)
            before = self._now_s()
            outputs = program.function(state, inputs, sizes, self._reseed, True)
            forward_s_O[index] = self._now_s() - before
            _own_nodes(outputs, index, owners)
            values.update(zip(program.outputs, outputs, strict=True))
            del inputs, outputs
            for name in self._dead_after[index]:
                values.pop(name, None)
        output = self._output.rebuild(values)
        before = self._now_s()
        loss = self._loss(output)
        forward_s_O[count] = self._now_s() - before
        del values, output
        _own_nodes([loss], count, owners)
        backward_s_O = self._timed_backward(loss, owners)
        return _Pass(forward_s_O=forward_s_O, backward_s_O=backward_s_O, weight_s_O=self._timed_weights())

    def _timed_backward(self, loss: torch.Tensor, owners: Mapping[Any, int]) -> Array:
        """From the start of one autograd node to the start of the next: work, gradient sums, accumulation."""
        starts: list[tuple[int, float]] = []
        handles = [
            node.register_prehook(lambda _, owner=owner: starts.append((owner, self._now_s())))
            for node, owner in owners.items()
        ]
        before = self._now_s()
        loss.backward()
        after = self._now_s()
        for handle in handles:
            handle.remove()
        backward_s_O = np.zeros(len(self._graph.operators) + 1)
        backward_s_O[-1] = (starts[0][1] if starts else after) - before
        for (owner, start), (_, end) in zip(starts, [*starts[1:], (0, after)], strict=True):
            backward_s_O[owner] += end - start
        return backward_s_O

    def _timed_weights(self) -> Array:
        weight_s_O = np.zeros(len(self._graph.operators) + 1)
        for rest in self._deferral.take():
            before = self._now_s()
            rest.accumulate()
            weight_s_O[rest.operator] += self._now_s() - before
        return weight_s_O

    def _loss_saved_bytes(self) -> float:
        """Memory the loss keeps for its backward beside the model's outputs; runs one whole pass."""
        outputs = self._call(self._whole, self._inputs)
        known = {t.untyped_storage().data_ptr() for t in (*outputs, *self._inputs.values())}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self._loss(self._output.rebuild(dict(zip(self._graph.outputs, outputs, strict=True))))
        loss.backward()
        return float(sum(size for pointer, size in kept.items() if pointer not in known))


def _own_state(captured: CapturedModel, device: torch.device) -> dict[str, torch.Tensor]:
    """Parameters that share memory with the model's but have gradients of their own; copies of buffers.

    Gradients exist from the start, so that every pass accumulates into them, as all microbatches of a
    step but the first do.
    """
    state: dict[str, torch.Tensor] = {}
    for name, value in captured.state.items():
        if name in captured.graph.parameters:
            own = value.detach().to(device).requires_grad_(captured.graph.parameters[name].trainable)
            own.grad = torch.zeros_like(own) if own.requires_grad else None
            state[name] = own
        else:
            state[name] = value.detach().to(device, copy=True)
    return state


def _own_nodes(tensors: Iterable[torch.Tensor], owner: int, owners: dict[Any, int]) -> None:
    """Gives all autograd nodes behind ``tensors`` that nobody owns yet to ``owner``."""
    pending: list[Any] = [tensor.grad_fn for tensor in tensors]
    while pending:
        node = pending.pop()
        if node is not None and node not in owners:
            owners[node] = owner
            pending += [earlier for earlier, _ in node.next_functions]


def measure_optimizer(
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    shapes: Sequence[tuple[int, ...]],
    *,
    clip_norm: float | None = None,
    device: torch.device | None = None,
    clock: Clock | None = None,
    budget_s: float = 0.5,
) -> tuple[float, float]:
    """Cost of one optimiser step, gradient clipping and zeroing included, on parameters made for it.

    Args:
        make_optimizer: parameters -> optimiser, as the task makes its own.
        shapes: of the model's trainable parameters; they are used up to ``OPTIMIZER_BYTES``.

    Returns:
        Seconds per byte of parameters, and bytes of optimiser state per byte of parameters.
    """
    clock, place = clock or SystemClock(), device or torch.device("cpu")
    parameters: list[nn.Parameter] = []
    size_bytes = 0
    for shape in shapes:
        if size_bytes < OPTIMIZER_BYTES:
            parameters.append(nn.Parameter(torch.rand(shape, device=place)))
            size_bytes += parameters[-1].numel() * parameters[-1].element_size()
    if not size_bytes:
        return 0.0, 0.0
    optimizer = make_optimizer(parameters)
    for parameter in parameters:
        parameter.grad = torch.rand_like(parameter)
    times_s: list[float] = []
    started = clock.monotonic_s()
    while len(times_s) < LEAST_UPDATES or (
        len(times_s) < MOST_UPDATES and clock.monotonic_s() - started < budget_s
    ):
        before = clock.monotonic_s()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        times_s.append(clock.monotonic_s() - before)
    state_bytes = sum(
        value.numel() * value.element_size()
        for held in optimizer.state.values()
        for value in held.values()
        if isinstance(value, torch.Tensor)
    )
    # The first step makes the optimiser's state and is not typical.
    return median(times_s[1:]) / size_bytes, state_bytes / size_bytes
