"""Peak memory of any part of a model, from the record of one pass over all of it.

A stage's storages are those that its operators made. To them comes what it receives; what it sends stays
until its backward, as the engine keeps it. Needs no torch: it replays events with sizes put in.

Axes: O = operator, E = event of one phase of the stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from forescale.core.errors import InvalidInput
from forescale.graph.cost import cost_table
from forescale.graph.model import Buffer, MemoryEvent, ModelGraph, Parameter, Size
from forescale.graph.size import compile_sizes, evaluate, tensor_bytes, total

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelWorkspace:
    """Memory that kernels take for themselves beside tensors, measured on a device.

    Attributes:
        forward_ratio_O, backward_ratio_O: bytes per byte that the operator moves (``CostArrays``).
            Negative where a kernel needs less than the record says.
    """

    forward_ratio_O: Array
    backward_ratio_O: Array


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
        fed, received, sent, received_gradient, sent_gradient, output, dropped = values[: self._border_count]
        sizes_E = values[self._border_count :]
        split = len(self._forward)
        forward_E, backward_E = self._excess(binding)
        live_E = np.cumsum(sizes_E[:split] * _signs(self._forward))
        kept = live_E[-1] if split else 0.0
        most_forward = float(np.max(live_E + forward_E, initial=0.0))
        start = kept
        loss_backward = 0.0
        if self._loss is not None:
            most_forward = max(most_forward, kept + self._loss.forward_ratio * output)
            start = kept - dropped
            kept = start + self._loss.kept_ratio * output
            loss_backward = start + self._loss.backward_ratio * output
        live_E = (
            start
            + np.cumsum(sizes_E[split:] * _signs(self._backward))
            + self._arriving(output, received_gradient)
        )
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
        )

    def _events(self, *, backward: bool) -> list[MemoryEvent]:
        """Events of the stage's own storages in one phase, in order."""
        own = {e.storage for e in self._graph.memory if e.begins and e.operator in self._operators}
        return [
            e
            for e in self._graph.memory
            if e.backward is backward and e.operator in self._operators and e.storage in own
        ]

    def _borders(self) -> list[Size]:
        """Bytes of batch inputs, received, sent, their gradients, the outputs, and those nobody keeps for backward."""
        graph, own = self._graph, self._operators
        read = [graph.tensors[n] for n in _read(graph, own, "inputs")]
        fed = [t for t in read if t.producer is None]
        received = [t for t in read if t.producer is not None and t.producer not in own]
        made = [t for t in graph.tensors.values() if t.producer in own]
        outputs = [graph.tensors[n] for n in graph.outputs] if self._loss is not None else []
        sent = [
            t for t in made if not own.issuperset(t.consumers) or (t.name in graph.outputs and not outputs)
        ]
        saved = {s.name for s in graph.saved}
        groups = [
            fed,
            received,
            sent,
            [t for t in sent if t.requires_grad],
            [t for t in received if t.requires_grad],
            outputs,
            [t for t in outputs if t.name not in saved],
        ]
        return [total(tensor_bytes(t.shape, t.dtype) for t in group) for group in groups]

    def _excess(self, binding: Mapping[str, int]) -> tuple[Array, Array]:
        """What kernels take beside tensors while each event's operator runs."""
        if self._workspace is None:
            return np.zeros(len(self._forward)), np.zeros(len(self._backward))
        costs = self._costs(binding)
        forward_O = costs.forward_bytes_O * self._workspace.forward_ratio_O
        backward_O = costs.backward_bytes_O * self._workspace.backward_ratio_O
        return forward_O[_operators(self._forward)], backward_O[_operators(self._backward)]

    def _arriving(self, output_bytes: float, received_bytes: float) -> Array:
        """Gradients the backward starts from: the engine holds received ones to the end, the loss's are used up."""
        if self._loss is None:
            return np.full(len(self._backward), received_bytes)
        producers = {self._graph.tensors[n].producer for n in self._graph.outputs}
        last = max((k for k, e in enumerate(self._backward) if e.operator in producers), default=-1)
        return np.where(np.arange(len(self._backward)) <= last, output_bytes, 0.0)

    def _made_gradients(self) -> Array:
        """Gradients of parameters that exist at each event of the first backward."""
        later_O = np.cumsum(self._gradient_bytes_O[::-1])[::-1]  # of this operator and all after it
        return later_O[_operators(self._backward) + 1]


def peak_bytes(
    stage: StageBytes,
    *,
    microbatches: int,
    in_flight: int,
    recompute: bool = False,
    optimizer_state_ratio: float = 0.0,
) -> int:
    """Most memory that a stage holds at any time of a step.

    Tensors for the next forward and the next backward are received ahead, and up to two microbatches'
    gradients are on their way out, as the engine does it.

    Args:
        in_flight: most microbatches between their forward and their backward.
        recompute: whether only received and sent tensors are kept, and the forward runs again before the backward.
        optimizer_state_ratio: bytes of optimiser state per byte of trainable parameters.
    """
    fixed = stage.state_bytes + optimizer_state_ratio * stage.trainable_bytes + microbatches * stage.fed_bytes
    waiting = stage.received_bytes + (stage.sent_bytes if recompute else stage.kept_bytes)
    steady = microbatches > in_flight
    ahead = max(stage.received_bytes if steady else 0.0, stage.received_gradient_bytes if in_flight > 1 else 0.0)
    leaving = min(2, microbatches - 1) * stage.sent_gradient_bytes
    gradients = stage.trainable_bytes
    others = (in_flight - 1) * waiting
    forward = others + stage.received_bytes + stage.forward_bytes + stage.received_gradient_bytes
    backward = max(stage.backward_bytes, stage.forward_bytes) if recompute else stage.backward_bytes
    first = max(stage.first_backward_bytes, stage.forward_bytes) if recompute else stage.first_backward_bytes
    moments = [
        forward + (gradients + leaving if steady else 0.0),
        others + stage.received_bytes + first + ahead,
    ]
    if microbatches > 1:
        still = others if steady else max(others - waiting, 0.0)
        moments.append(gradients + leaving + still + stage.received_bytes + backward + ahead)
    return round(fixed + max(moments))


def _read(graph: ModelGraph, operators: Iterable[int], what: str) -> list[str]:
    """Names the operators read, each once."""
    return list(dict.fromkeys(n for o in sorted(operators) for n in getattr(graph.operators[o], what)))


def _constant_bytes(entries: Sequence[Parameter | Buffer]) -> float:
    return float(sum(evaluate(tensor_bytes(entry.shape, entry.dtype), {}) for entry in entries))


def _signs(events: Sequence[MemoryEvent]) -> Array:
    return np.array([1.0 if event.begins else -1.0 for event in events])


def _operators(events: Sequence[MemoryEvent]) -> npt.NDArray[np.intp]:
    return np.array([event.operator for event in events], dtype=np.intp)
