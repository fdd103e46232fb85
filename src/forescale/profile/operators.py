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
from forescale.profile.halves import Half
from forescale.profile.measurement import Array, OperatorMeasurement

Loss = Callable[[Any], torch.Tensor]
"""Output of the model -> scalar loss; the batch is already inside, on the device of the measurement."""

LEAST_PASSES, MOST_PASSES = 2, 25
OPTIMIZER_BYTES = 64 << 20
"""Parameters the optimiser is timed with: more than caches hold, little enough to be quick."""
LEAST_UPDATES, MOST_UPDATES = 3, 20


def measure_operators(
    captured: CapturedModel,
    microbatches: Sequence[tuple[Sequence[torch.Tensor], Loss]],
    *,
    device: torch.device | None = None,
    reseed: Reseed | None = None,
    half: Half | None = None,
    clock: Clock | None = None,
    budget_s: float = 4.0,
) -> tuple[tuple[OperatorMeasurement, ...], Array | None]:
    """Seconds of every operator for each microbatch, with this process's thread and affinity settings.

    The microbatches take turns, pass by pass: where the machine changes its speed meanwhile, it does so for
    all of them. The model's parameters, buffers and gradients and the random state stay as they are.

    Args:
        microbatches: inputs in the order of ``graph.inputs``, and what the model's output is judged by.
        device: where to run (default: CPU).
        reseed: what training calls before a random operator; its time is part of the operator's
            (default: seeds the CPU generator).
        half: of the same model, to be measured too, with the first microbatch.
        budget_s: about how long to measure each; at least ``LEAST_PASSES`` passes of each sort are made.

    Returns:
        The measurements, and with ``half`` its ``unsplit_O``.
    """
    place, clock = device or torch.device("cpu"), clock or SystemClock()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if place.type == "cuda" else ()):
        compiled = _Compiled(captured, place, reseed or _seed)
        measured = _in_turns([_Passes(compiled, *m, clock) for m in microbatches], clock, budget_s)
        if half is None:
            return measured, None
        # Apart from the others: it has parameters of its own, so all take longer to read theirs.
        inputs, loss = microbatches[0]
        named = dict(zip(compiled.graph.inputs, inputs, strict=True))
        halved = _Compiled(half.captured, place, reseed or _seed)
        own = _Passes(halved, [named[name] for name in halved.graph.inputs], loss, clock)
        both = _in_turns([_Passes(compiled, inputs, loss, clock), own], clock, budget_s / 2)
        return measured, half.unsplit_O(*both)


def _in_turns(sizes: Sequence[_Passes], clock: Clock, budget_s: float) -> tuple[OperatorMeasurement, ...]:
    started = clock.monotonic_s()
    for number in range(MOST_PASSES):
        if number >= LEAST_PASSES and clock.monotonic_s() - started > budget_s * len(sizes):
            break
        for passes in sizes:
            passes.add()
    return tuple(passes.measured() for passes in sizes)


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


class _Compiled:
    """A model's operators, each by itself and all together, with state of their own."""

    def __init__(self, captured: CapturedModel, device: torch.device, reseed: Reseed) -> None:
        self.graph, self.output = captured.graph, captured.output
        self.device = device
        self._reseed = reseed
        self._state = _own_state(captured, device)
        indices = range(len(self.graph.operators))
        outputs = [[name for name in operator.outputs if name] for operator in self.graph.operators]
        self.deferral = Deferral()
        wraps = self.deferral.wraps(self.graph, indices)
        self.programs, self.splitting = (
            [
                compile_program(self.graph, [index], outputs[index], device, captured.modules, wrapped)
                for index in indices
            ]
            for wrapped in (None, wraps)
        )
        self.split_O = np.isin(indices, list(wraps))
        self.whole = compile_program(self.graph, indices, self.graph.outputs, device, captured.modules)
        last_use = {
            name: index
            for index in indices
            for name in (*self.graph.operators[index].inputs, *outputs[index])
        }
        self.dead_after: list[list[str]] = [[] for _ in indices]
        for name, index in last_use.items():
            if name not in self.graph.outputs:
                self.dead_after[index].append(name)

    def call(
        self, program: Program, values: Mapping[str, torch.Tensor], sizes: Sequence[float]
    ) -> tuple[torch.Tensor, ...]:
        state = [self._state[name] for name in program.state]
        inputs = [values[name] for name in program.inputs]
        return program.function(state, inputs, sizes, self._reseed, True)


class _Passes:
    """Passes of one microbatch; making it runs one, which warms up."""

    def __init__(self, compiled: _Compiled, inputs: Sequence[torch.Tensor], loss: Loss, clock: Clock) -> None:
        self._compiled, self._graph, self._output = compiled, compiled.graph, compiled.output
        self._device, self._loss, self._clock = compiled.device, loss, clock
        self._inputs = {
            name: tensor.to(self._device) for name, tensor in zip(self._graph.inputs, inputs, strict=True)
        }
        self._binding = self._graph.bind({name: tuple(tensor.shape) for name, tensor in self._inputs.items()})
        self._hooked: list[_Pass] = []
        self._split: list[_Pass] = []
        self._plain: list[tuple[float, float]] = []
        self._saved_bytes = self._loss_saved_bytes()

    def add(self) -> None:
        """One more pass of each sort."""
        self._plain.append(self._plain_pass())
        self._hooked.append(self._hooked_pass(self._compiled.programs))
        if self._compiled.split_O.any():
            self._split.append(self._hooked_pass(self._compiled.splitting))

    def measured(self) -> OperatorMeasurement:
        forward_s_O = np.median([p.forward_s_O for p in self._hooked], axis=0)
        backward_s_O = np.median([p.backward_s_O for p in self._hooked], axis=0)
        forward_s_O *= median(forward_s for forward_s, _ in self._plain) / forward_s_O.sum()
        backward_s_O *= median(backward_s for _, backward_s in self._plain) / max(backward_s_O.sum(), 1e-12)
        input_s_O, weight_s_O = self._parts(backward_s_O[:-1])
        return OperatorMeasurement(
            binding=dict(self._binding),
            forward_s_O=forward_s_O[:-1],
            backward_s_O=backward_s_O[:-1],
            input_s_O=input_s_O,
            weight_s_O=weight_s_O,
            loss_forward_s=float(forward_s_O[-1]),
            loss_backward_s=float(backward_s_O[-1]),
            loss_saved_bytes=self._saved_bytes,
        )

    def _parts(self, backward_s_O: Array) -> tuple[Array, Array]:
        """The backwards in two parts; what splitting costs, in the forward too, is in the first."""
        hooked, split, split_O = self._hooked, self._split, self._compiled.split_O
        if not split:
            return backward_s_O, np.zeros_like(backward_s_O)
        scale = backward_s_O.sum() / max(np.median([p.backward_s_O[:-1].sum() for p in hooked]), 1e-12)
        first_s_O = np.median([p.forward_s_O + p.backward_s_O for p in split], axis=0)[:-1]
        first_s_O -= np.median([p.forward_s_O for p in hooked], axis=0)[:-1]
        weight_s_O = np.median([p.weight_s_O for p in split], axis=0)[:-1]
        return np.where(split_O, np.maximum(first_s_O, 0.0) * scale, backward_s_O), weight_s_O * scale

    def _now_s(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock.monotonic_s()

    def _run_whole(self) -> tuple[torch.Tensor, ...]:
        whole = self._compiled.whole
        return self._compiled.call(whole, self._inputs, whole.sizes(self._binding))

    def _plain_pass(self) -> tuple[float, float]:
        before = self._now_s()
        outputs = self._run_whole()
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
            sizes = program.sizes(self._binding)
            before = self._now_s()
            outputs = self._compiled.call(program, values, sizes)
            forward_s_O[index] = self._now_s() - before
            _own_nodes(outputs, index, owners)
            values.update(zip(program.outputs, outputs, strict=True))
            del outputs
            for name in self._compiled.dead_after[index]:
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
        for rest in self._compiled.deferral.take():
            before = self._now_s()
            rest.accumulate()
            weight_s_O[rest.operator] += self._now_s() - before
        return weight_s_O

    def _loss_saved_bytes(self) -> float:
        """Memory the loss keeps for its backward beside the model's outputs; runs one whole pass."""
        outputs = self._run_whole()
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
