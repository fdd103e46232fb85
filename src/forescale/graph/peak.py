"""Peak memory of any part of a model, from the record of one pass over all of it.

A stage's storages are those that its operators made. To them comes what it receives; what it sends stays
until its backward, as the engine keeps it. Needs no torch: it replays events with sizes put in.

Axes: O = operator, E = event of one phase of the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from forescale.core.errors import InvalidInput
from forescale.graph.cost import cost_table
from forescale.graph.model import Buffer, MemoryEvent, ModelGraph, Parameter, Size, Tensor
from forescale.graph.separable import separable_operators
from forescale.graph.size import compile_sizes, evaluate, tensor_bytes, total

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelWorkspace:
    """Memory that kernels take for themselves beside tensors, measured on a device.

    Each part grows with the bytes that the operator moves (``CostArrays``): fixed + ratio * moved. Negative
    where a kernel needs less than the record of tensors says.

    Attributes:
        forward, backward: above the record while the operator runs.
        kept: above the record from its forward to its backward.
    """

    forward: Growth
    backward: Growth
    kept: Growth


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """Bytes of each operator as a line over the bytes it moves."""

    fixed_bytes_O: Array
    ratio_O: Array

    def at(self, moved_bytes_O: Array) -> Array:
        return self.fixed_bytes_O + self.ratio_O * moved_bytes_O


@dataclass(frozen=True, slots=True, kw_only=True)
class LossMemory:
    """Memory of the loss, in bytes per byte of the model's outputs.

    Attributes:
        forward_ratio: most that exists during its forward beside the outputs.
        kept_ratio: what stays for the backward, outputs included if the loss keeps them.
        backward_ratio: most that exists during its backward, ``kept_ratio`` included.
    """

    forward_ratio: float
    kept_ratio: float
    backward_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBytes:
    """Memory of one stage for one size of microbatch.

    Attributes:
        state_bytes: parameters and buffers.
        trainable_bytes: its trainable parameters, and likewise their gradients.
        fed_bytes: what it reads of one microbatch's inputs.
        received_bytes: tensors it receives for one microbatch.
        sent_bytes: tensors it sends for one microbatch.
        forward_bytes: most that one forward adds, received tensors not counted.
        kept_bytes: what a forward leaves behind: saved and sent tensors.
        first_backward_bytes: most that exists of one microbatch in the backward that makes the gradients,
            these, ``kept_bytes`` and the gradients it receives included; received tensors not.
        backward_bytes: the same in a later backward, which adds to gradients that exist (not counted).
        received_gradient_bytes, sent_gradient_bytes: gradients that cross its borders.
        deferred_bytes: what stays where gradients of parameters are computed apart, until then.
    """

    state_bytes: float
    trainable_bytes: float
    fed_bytes: float
    received_bytes: float
    sent_bytes: float
    forward_bytes: float
    kept_bytes: float
    first_backward_bytes: float
    backward_bytes: float
    received_gradient_bytes: float
    sent_gradient_bytes: float
    deferred_bytes: float


class StageMemory:
    """The memory of one stage, compiled once for microbatches of all sizes."""

    def __init__(
        self,
        graph: ModelGraph,
        operators: Iterable[int],
        *,
        workspace: KernelWorkspace | None = None,
        loss: LossMemory | None = None,
    ) -> None:
        """Compiles the stage.

        Args:
            graph: with ``memory`` recorded.
            workspace: of the device the stage runs on; None counts tensors only.
            loss: given where the stage also computes the loss.

        Raises:
            InvalidInput: the graph's memory was not recorded.
        """
        if graph.operators and not graph.memory:
            raise InvalidInput(
                "the graph's memory was not recorded; call forescale.graph.saved.measure_saved"
            )
        self._graph = graph
        self._operators = frozenset(operators)
        self._workspace = workspace
        self._loss = loss
        self._costs = cost_table(graph)
        self._forward, self._backward = self._events(backward=False), self._events(backward=True)
        borders = self._borders()
        sizes = [*borders, *(e.size_bytes for e in (*self._forward, *self._backward))]
        self._sizes = compile_sizes(sizes, tuple(graph.symbols))
        self._border_count = len(borders)
        parameters = [graph.parameters[n] for n in _read(graph, self._operators, "parameters")]
        buffers = [graph.buffers[n] for n in _read(graph, self._operators, "buffers")]
        self._state_bytes = _constant_bytes([*parameters, *buffers])
        # In the backward that makes the gradients, one exists once the last reader in captured order has run.
        self._gradient_bytes_O = np.zeros(len(graph.operators) + 1)
        for parameter in parameters:
            if parameter.trainable:
                last = max(o for o in graph.parameter_readers[parameter.name] if o in self._operators)
                self._gradient_bytes_O[last] += _constant_bytes([parameter])

    def measure(self, binding: Mapping[str, int]) -> StageBytes:
        """Its memory for a microbatch."""
        values = np.array(self._sizes(binding), dtype=np.float64)
        borders = values[: self._border_count]
        fed, received, sent, received_gradient, sent_gradient, output, dropped, deferred = borders
        sizes_E = values[self._border_count :]
        split = len(self._forward)
        forward_E, backward_E, hidden = self._excess(binding)
        live_E = np.cumsum(sizes_E[:split] * _signs(self._forward))
        start = live_E[-1] if split else 0.0
        kept = start + hidden
        most_forward = float(np.max(live_E + forward_E, initial=0.0))
        loss_backward = 0.0
        if self._loss is not None:
            most_forward = max(most_forward, kept + self._loss.forward_ratio * output)
            start -= dropped
            kept = start + hidden + self._loss.kept_ratio * output
            loss_backward = start + hidden + self._loss.backward_ratio * output
        live_E = start + np.cumsum(sizes_E[split:] * _signs(self._backward))
        live_E += self._arriving(output, received_gradient)
        made_E = self._made_gradients()
        return StageBytes(
            state_bytes=self._state_bytes,
            trainable_bytes=float(self._gradient_bytes_O.sum()),
            fed_bytes=float(fed),
            received_bytes=float(received),
            sent_bytes=float(sent),
            forward_bytes=most_forward,
            kept_bytes=float(kept),
            first_backward_bytes=float(
                np.max(live_E + backward_E + made_E, initial=max(kept, loss_backward))
            ),
            backward_bytes=float(np.max(live_E + backward_E, initial=max(kept, loss_backward))),
            received_gradient_bytes=float(received_gradient),
            sent_gradient_bytes=float(sent_gradient),
            deferred_bytes=float(deferred),
        )

    def _events(self, *, backward: bool) -> list[MemoryEvent]:
        """Events of the stage's own storages in one phase, in order; what it sends does not end there."""
        memory, own = self._graph.memory, self._operators
        made = {e.storage for e in memory if e.begins and e.operator in own}
        held = {self._owner(tensor.name, made) for tensor in self._sent()}
        return [
            e
            for e in memory
            if e.backward is backward and e.operator in own and e.storage in made
            if e.begins or e.storage not in held
        ]

    def _owner(self, name: str, storages: set[str]) -> str:
        """Name of the storage that ``name`` is in: its own, or that of the tensor it is a view of."""
        while name not in storages and (producer := self._graph.tensors[name].producer) is not None:
            if not (inputs := self._graph.operators[producer].inputs):
                break
            name = inputs[0]
        return name

    def _sent(self) -> list[Tensor]:
        """Tensors that leave the stage."""
        outputs = () if self._loss is not None else self._graph.outputs
        made = [t for t in self._graph.tensors.values() if t.producer in self._operators]
        return [t for t in made if not self._operators.issuperset(t.consumers) or t.name in outputs]

    def _borders(self) -> list[Size]:
        """Bytes of inputs, received, sent, their gradients, the outputs, those of them no operator keeps.

        The last are what separable operators read, and the gradients of their results.
        """
        graph, own = self._graph, self._operators
        read = [graph.tensors[n] for n in _read(graph, own, "inputs")]
        fed = [t for t in read if t.producer is None]
        received = [t for t in read if t.producer is not None and t.producer not in own]
        sent = self._sent()
        outputs = [graph.tensors[n] for n in graph.outputs] if self._loss is not None else []
        saved = {s.name for s in graph.saved}
        separable = separable_operators(graph, own)
        read_again = _read(graph, separable, "inputs")
        groups = [
            fed,
            received,
            sent,
            [t for t in sent if t.requires_grad],
            [t for t in received if t.requires_grad],
            outputs,
            [t for t in outputs if t.name not in saved],
            [graph.tensors[n] for n in read_again if graph.tensors[n].producer is not None]
            + [graph.tensors[n] for o in separable for n in graph.operators[o].outputs if n],
        ]
        return [total(tensor_bytes(t.shape, t.dtype) for t in group) for group in groups]

    def _excess(self, binding: Mapping[str, int]) -> tuple[Array, Array, float]:
        """What kernels take beside tensors: at each event forward and backward, and between the two."""
        if self._workspace is None:
            return np.zeros(len(self._forward)), np.zeros(len(self._backward)), 0.0
        costs = self._costs(binding)
        own_O = np.isin(np.arange(len(self._graph.operators)), list(self._operators))
        kept_O = self._workspace.kept.at(costs.forward_bytes_O) * own_O
        up_to_O = np.cumsum(kept_O)
        forward_O = self._workspace.forward.at(costs.forward_bytes_O) + up_to_O - kept_O
        backward_O = self._workspace.backward.at(costs.backward_bytes_O) + up_to_O
        kept_bytes = float(up_to_O[-1])
        return forward_O[_operators(self._forward)], backward_O[_operators(self._backward)], kept_bytes

    def _arriving(self, output_bytes: float, received_bytes: float) -> Array:
        """Gradients the backward starts from: received ones are held to its end, the loss's are used up."""
        operators_E = _operators(self._backward)
        if self._loss is None:
            return np.full(len(operators_E), received_bytes)
        producers = {self._graph.tensors[n].producer for n in self._graph.outputs}
        last = max((k for k, o in enumerate(operators_E) if o in producers), default=-1)
        return np.where(np.arange(len(operators_E)) <= last, output_bytes, 0.0)

    def _made_gradients(self) -> Array:
        """Gradients of parameters that exist at each event of the first backward."""
        later_O = np.cumsum(self._gradient_bytes_O[::-1])[::-1]  # of this operator and all after it
        return later_O[_operators(self._backward) + 1]


def peak_bytes(
    stage: StageBytes,
    *,
    microbatches: int,
    in_flight: int,
    waiting: int = 0,
    recompute: bool = False,
    optimizer_state_ratio: float = 0.0,
) -> int:
    """Most memory that a stage holds at any time of a step, the optimiser's update not counted.

    Tensors for the next forward and the next backward are received ahead, and up to two microbatches'
    gradients are on their way out, as the engine does it.

    Args:
        in_flight: most microbatches between their forward and their backward.
        waiting: most microbatches whose gradients of parameters are still to be computed.
        recompute: whether only received and sent tensors are kept, and the backward runs the forward again.
        optimizer_state_ratio: bytes of optimiser state per byte of trainable parameters.
    """
    fixed = stage.state_bytes + optimizer_state_ratio * stage.trainable_bytes + microbatches * stage.fed_bytes
    between = stage.received_bytes + (stage.sent_bytes if recompute else stage.kept_bytes)
    again = stage.forward_bytes if recompute else 0.0
    order = _order(microbatches, in_flight)
    most = running = done = 0
    for position, forward in enumerate(order):
        following = order[position + 1] if position + 1 < len(order) else None
        live = fixed + running * between + min(done, 2) * stage.sent_gradient_bytes
        live += min(done, max(waiting - 1, 0)) * stage.deferred_bytes
        live += stage.trainable_bytes if done else 0.0
        live += {True: stage.received_bytes, False: stage.received_gradient_bytes, None: 0.0}[following]
        if forward:
            live += stage.received_bytes + stage.forward_bytes
            running += 1
        else:
            left = stage.deferred_bytes if waiting else 0.0
            live += max(stage.backward_bytes if done else stage.first_backward_bytes, again, left)
            live += stage.received_bytes - between
            running, done = running - 1, done + 1
        most = max(most, live)
    return round(most)


def workspace_table(
    graph: ModelGraph, workspace: KernelWorkspace | None = None
) -> Callable[[Mapping[str, int]], Array]:
    """Compiles what each operator needs beside saved storages: binding -> bytes, shape (O,).

    While an operator runs, forward or backward, there is what autograd saved up to and including it, and
    this. A stage's peak is about the largest such sum over its operators; :class:`StageMemory` is exact.
    """
    sizes = compile_sizes([event.size_bytes for event in graph.memory], tuple(graph.symbols))
    signs_E, operators_E = _signs(graph.memory), _operators(graph.memory)
    saved = {storage.name for storage in graph.saved}
    saving_E = np.array([float(e.begins and not e.backward and e.storage in saved) for e in graph.memory])
    backward_E = np.array([event.backward for event in graph.memory])
    costs = cost_table(graph)

    def table(binding: Mapping[str, int]) -> Array:
        sizes_E = np.array(sizes(binding), dtype=np.float64)
        saved_O = np.bincount(operators_E, sizes_E * saving_E, len(graph.operators) + 1).cumsum()
        need_E = np.cumsum(sizes_E * signs_E) - saved_O[operators_E]
        if workspace is not None:
            cost = costs(binding)
            forward_O = np.append(workspace.forward.at(cost.forward_bytes_O), 0.0)
            backward_O = np.append(workspace.backward.at(cost.backward_bytes_O), 0.0)
            need_E += np.where(backward_E, backward_O[operators_E], forward_O[operators_E])
        need_O = np.zeros(len(graph.operators) + 1)
        np.maximum.at(need_O, operators_E, need_E)
        return need_O[:-1]

    return table


def _order(microbatches: int, in_flight: int) -> list[bool]:
    """Forwards (True) and backwards of a step: so many forwards, then both in turn."""
    ahead = min(in_flight, microbatches)
    return [True] * ahead + [False, True] * (microbatches - ahead) + [False] * ahead


def _read(graph: ModelGraph, operators: Iterable[int], what: str) -> list[str]:
    """Names the operators read, each once."""
    return list(dict.fromkeys(n for o in sorted(operators) for n in getattr(graph.operators[o], what)))


def _constant_bytes(entries: Sequence[Parameter | Buffer]) -> float:
    return float(sum(evaluate(tensor_bytes(entry.shape, entry.dtype), {}) for entry in entries))


def _signs(events: Sequence[MemoryEvent]) -> Array:
    return np.array([1.0 if event.begins else -1.0 for event in events])


def _operators(events: Sequence[MemoryEvent]) -> npt.NDArray[np.intp]:
    return np.array([event.operator for event in events], dtype=np.intp)
