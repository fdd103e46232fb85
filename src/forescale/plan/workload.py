"""A planning problem as arrays, made once for the thousands of splits that are then compared.

Axes: C = choice of microbatch count (ascending), D = device, O = operator, the loss being the last one,
I = item (tensor, storage, parameter ...), E = pair of an item and an operator that reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from forescale.graph.model import Buffer, ModelGraph, Parameter, SavedStorage
from forescale.graph.separable import separable_operators
from forescale.graph.size import evaluate, tensor_bytes
from forescale.plan.problem import Array, MicrobatchCosts, PartitionProblem

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Incidence:
    """Which operators read which items: pairs E, sorted by item. ``source_E``: what makes the item, or -1."""

    item_E: IntArray
    operator_E: IntArray
    source_E: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Everything the costs of a split are summed from.

    Attributes:
        counts: the microbatch counts to choose from, ascending; position in it is axis C.
        tensors: tensors made by operators, with those that read them (the loss reads the outputs).
        input_s_CDO, weight_s_CDO: the backward in two parts, see ``MicrobatchCosts``.
        deferred_bytes_CO: what stays from the first part to the second, what it reads shared out among those
            that read it.
        message_bytes_CI: what a tensor is when sent; ``gradient_bytes_CI`` its gradient, 0 if it has none.
        storages: memory that autograd keeps, made by ``source`` and kept if a reader is in its stage.
        inputs: parts of the batch; all microbatches' parts are there from the start of a step.
        parameters, buffers: tensors of the model.
    """

    problem: PartitionProblem
    counts: tuple[int, ...]
    forward_s_CDO: Array
    backward_s_CDO: Array
    input_s_CDO: Array
    weight_s_CDO: Array
    deferred_bytes_CO: Array
    workspace_bytes_CO: Array
    tensors: Incidence
    message_bytes_CI: Array
    gradient_bytes_CI: Array
    storages: Incidence
    storage_of_I: IntArray
    saved_bytes_CI: Array
    inputs: Incidence
    input_bytes_CI: Array
    parameters: Incidence
    parameter_bytes_I: Array
    trainable_bytes_I: Array
    buffers: Incidence
    buffer_bytes_I: Array

    @property
    def loss(self) -> int:
        """Index of the loss on axis O."""
        return len(self.problem.graph.operators)


def tabulate(problem: PartitionProblem) -> Workload:
    graph = problem.graph
    counts = tuple(sorted(problem.costs))
    costs = [problem.costs[count] for count in counts]
    loss = len(graph.operators)
    readers = {
        name: (*tensor.consumers, *((loss,) if name in graph.outputs else ()))
        for name, tensor in graph.tensors.items()
    }
    made = {n: r for n, r in readers.items() if graph.tensors[n].producer is not None and r}
    fed = {n: r for n, r in readers.items() if graph.tensors[n].producer is None and r}
    kept = kept_storages(graph)
    storages = [graph.saved[index] for index in kept]
    carries = np.array([graph.tensors[name].requires_grad for name in made], dtype=float)
    message_bytes_CI = _tensor_bytes(costs, made)
    parameters = list(graph.parameters.values())
    parameter_bytes_I = _state_bytes(parameters)
    buffers = {
        name: tuple(o.index for o in graph.operators if name in o.buffers or name in o.mutated_buffers)
        for name in graph.buffers
    }
    return Workload(
        problem=problem,
        counts=counts,
        forward_s_CDO=np.stack([_with_loss(c.forward_s_DO, c.loss_forward_s_D) for c in costs]),
        backward_s_CDO=np.stack([_with_loss(c.backward_s_DO, c.loss_backward_s_D) for c in costs]),
        input_s_CDO=np.stack([_with_loss(c.input_s_DO, c.loss_backward_s_D) for c in costs]),
        weight_s_CDO=np.stack([_with_loss(c.weight_s_DO, np.zeros(len(c.weight_s_DO))) for c in costs]),
        deferred_bytes_CO=_deferred_bytes(graph, costs),
        workspace_bytes_CO=np.stack([np.append(c.workspace_bytes_O, 0.0) for c in costs]),
        tensors=_incidence(made.values(), [graph.tensors[name].producer or 0 for name in made]),
        message_bytes_CI=message_bytes_CI,
        gradient_bytes_CI=message_bytes_CI * carries,
        storages=_incidence(
            [*(storage.operators for storage in storages), (loss,)],
            [*(_maker(graph, storage) for storage in storages), loss],
        ),
        storage_of_I=_places(made, [storage.name for storage in storages]),
        saved_bytes_CI=np.stack([np.append(c.saved_bytes_R[kept], c.loss_saved_bytes) for c in costs]),
        inputs=_incidence(fed.values()),
        input_bytes_CI=_tensor_bytes(costs, fed),
        parameters=_incidence(graph.parameter_readers[p.name] for p in parameters),
        parameter_bytes_I=parameter_bytes_I,
        trainable_bytes_I=parameter_bytes_I * np.array([p.trainable for p in parameters], dtype=float),
        buffers=_incidence(buffers.values()),
        buffer_bytes_I=_state_bytes(graph.buffers.values()),
    )


def kept_storages(graph: ModelGraph) -> list[int]:
    """Those on axis I of ``storages`` but the last, which is the loss's: all but parts of the batch."""
    fed = {name for name, tensor in graph.tensors.items() if tensor.producer is None}
    return [index for index, s in enumerate(graph.saved) if s.operators and s.name not in fed]


def _maker(graph: ModelGraph, storage: SavedStorage) -> int:
    """The operator that makes a storage; one that no graph tensor owns is made by its first reader."""
    tensor = graph.tensors.get(storage.name)
    return min(storage.operators) if tensor is None or tensor.producer is None else tensor.producer


def _deferred_bytes(graph: ModelGraph, costs: Sequence[MicrobatchCosts]) -> Array:
    """Tensors that the operators read, which are needed again, and their results' gradients."""
    separable = separable_operators(graph, range(len(graph.operators)))
    readers = Counter(name for index in separable for name in graph.operators[index].inputs)
    size_bytes_CO = np.zeros((len(costs), len(graph.operators) + 1))
    for index in separable:
        operator = graph.operators[index]
        read = [name for name in operator.inputs if graph.tensors[name].producer is not None]
        for choice, cost in enumerate(costs):
            kept = sum(cost.tensor_bytes[name] / readers[name] for name in read)
            made = sum(cost.tensor_bytes[name] for name in operator.outputs if name)
            size_bytes_CO[choice, index] = kept + made
    return size_bytes_CO


def _with_loss(seconds_DO: Array, loss_s_D: Array) -> Array:
    return np.concatenate([seconds_DO, loss_s_D[:, None]], axis=1)


def _tensor_bytes(costs: Iterable[MicrobatchCosts], names: Mapping[str, object]) -> Array:
    return np.array([[float(c.tensor_bytes[name]) for name in names] for c in costs])


def _state_bytes(tensors: Iterable[Parameter | Buffer]) -> Array:
    return np.array([float(evaluate(tensor_bytes(t.shape, t.dtype), {})) for t in tensors])


def _places(names: Iterable[str], among: list[str]) -> IntArray:
    """Position of every name in ``among``, -1 if it is not there."""
    place = {name: index for index, name in enumerate(among)}
    return np.array([place.get(name, -1) for name in names], dtype=np.int64)


def _incidence(readers: Iterable[tuple[int, ...]], sources: Iterable[int] | None = None) -> Incidence:
    lists = list(readers)
    lengths = [len(operators) for operators in lists]
    source_I = np.full(len(lists), -1) if sources is None else np.array(list(sources), dtype=np.int64)
    return Incidence(
        item_E=np.repeat(np.arange(len(lists)), lengths),
        operator_E=np.array([operator for operators in lists for operator in operators], dtype=np.int64),
        source_E=np.repeat(source_I, lengths),
    )
