"""Reads a captured model (:mod:`forescale.graph.json_format`) as a graph to be placed; needs no PyTorch.

Axes: O = operator, K = device kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from forescale.core.errors import InvalidInput
from forescale.graph.cost import CostArrays, cost_table
from forescale.graph.json_format import from_json
from forescale.graph.model import ModelGraph, Size
from forescale.graph.size import compile_sizes, tensor_bytes, violated
from forescale.plan.cluster_file import ClusterFile, DeviceGroup
from forescale.plan.placement.devices import MS_PER_S, TRAINING_STATE, device_kinds, tensor_of, unit_devices
from forescale.plan.placement.problem import Array, Net, PlacementProblem
from forescale.profile.hardware import DISPATCH_S

_MOST_COPIES = 2
"""Of a parameter; of one with more readers, memory would be counted too often where they share a device."""


def read_model_graph(text: str, cluster: ClusterFile, *, batch: Mapping[str, int]) -> PlacementProblem:
    """One training step of a model on one batch; the unit of time is the millisecond.

    Work is a roofline: the arithmetic or the memory traffic of an operator, whichever takes a device longer,
    forward and backward as the graph counts them, and the time to start it. A tensor costs its bytes over the
    slowest link on the way, twice if a gradient comes back. Trained parameters take ``TRAINING_STATE`` (4:
    gradients, AdamW) times their bytes; what is saved for the backward (if not measured, every result that is
    no view) counts where it is first needed. A parameter that two operators read (tied embeddings) counts
    with both, even on one device, and its gradient travels between them; more readers stay together.

    Args:
        batch: values of the graph's symbols, where not those of the batch it was captured with.

    Raises:
        InvalidInput: not that format, a symbol the graph lacks or a batch it is not right for, or a group of
            devices without rates.
    """
    graph = from_json(text)
    names = [operator.name for operator in graph.operators]
    if len(set(names)) < len(names):
        raise InvalidInput("two operators of the graph have the same name")
    binding = _binding(graph, batch)
    costs = cost_table(graph)(binding)
    half_O = np.array([_is_half(graph, operator.outputs) for operator in graph.operators], dtype=np.bool_)
    return PlacementProblem(
        nodes=tuple(names),
        work_KN=np.stack([_work_ms_O(costs, half_O, group) for group in cluster.groups]),
        memory_bytes_N=_memory_bytes_O(graph, costs, binding),
        nets=_nets(graph, cluster, binding),
        together=_together(graph),
        backward_N=np.zeros(len(names), dtype=np.bool_),
        kinds=device_kinds(cluster),
        unit_devices=unit_devices(cluster),
    )


def _binding(graph: ModelGraph, batch: Mapping[str, int]) -> dict[str, int]:
    for symbol, value in batch.items():
        if symbol not in graph.symbols:
            known = [f"{name} (axis {s.axis} of {s.tensor})" for name, s in graph.symbols.items()]
            raise InvalidInput(
                f"the graph has no symbol {symbol}; it has {', '.join(known) or 'none: its shapes are fixed'}"
            )
        if value < 1:
            raise InvalidInput(f"{symbol} is {value}; it must be at least 1")
    binding = {**graph.example, **batch}
    if (condition := violated(graph.conditions, binding)) is not None:
        raise InvalidInput(f"the graph is not right for this batch: {condition} must not be negative")
    return binding


def _is_half(graph: ModelGraph, outputs: Iterable[str | None]) -> bool:
    return any(graph.tensors[name].dtype in ("bfloat16", "float16") for name in outputs if name)


def _work_ms_O(costs: CostArrays, half_O: npt.NDArray[np.bool_], group: DeviceGroup) -> Array:
    rate, half_rate = group.flops_per_s, group.half_flops_per_s
    bandwidth = group.memory_bandwidth_bytes_per_s
    if rate is None or half_rate is None or bandwidth is None:
        raise InvalidInput(
            f"for a model, devices.{group.name} needs a profile, or flops_per_s and "
            "memory_bandwidth_bytes_per_s"
        )
    rate_O = np.where(half_O, half_rate, rate)
    work_s_O = np.zeros(len(half_O))
    for flops_O, bytes_O in (
        (costs.forward_flops_O, costs.forward_bytes_O),
        (costs.backward_flops_O, costs.backward_bytes_O),
    ):
        work_s_O += np.maximum(flops_O / rate_O, bytes_O / bandwidth) + DISPATCH_S * (bytes_O > 0)
    return MS_PER_S * work_s_O


def _nets(graph: ModelGraph, cluster: ClusterFile, binding: Mapping[str, int]) -> tuple[Net, ...]:
    sent: list[tuple[Size, tuple[int, ...], bool]] = [
        (tensor_bytes(tensor.shape, tensor.dtype), (tensor.producer, *tensor.consumers), tensor.requires_grad)
        for tensor in graph.tensors.values()
        if tensor.producer is not None and tensor.consumers
    ]
    # The gradients of two copies are summed: one goes there, the sum comes back.
    for name, readers in _copied(graph).items():
        if (parameter := graph.parameters[name]).trainable:
            sent.append((tensor_bytes(parameter.shape, parameter.dtype), readers, True))
    sizes_bytes = compile_sizes([size for size, _, _ in sent], tuple(graph.symbols))(binding)
    return tuple(
        tensor_of(cluster, size_bytes, nodes, gradient=gradient)
        for (_, nodes, gradient), size_bytes in zip(sent, sizes_bytes, strict=True)
    )


def _together(graph: ModelGraph) -> tuple[tuple[int, ...], ...]:
    """Readers of one parameter, if more than two, and readers and writers of one changing buffer."""
    shared = (readers for readers in graph.parameter_readers.values() if len(readers) > _MOST_COPIES)
    return (*shared, *graph.colocated)


def _copied(graph: ModelGraph) -> dict[str, tuple[int, ...]]:
    """Parameters of which each reader has a copy, with the readers: tied embeddings."""
    return {
        name: readers for name, readers in graph.parameter_readers.items() if len(readers) == _MOST_COPIES
    }


def _memory_bytes_O(graph: ModelGraph, costs: CostArrays, binding: Mapping[str, int]) -> Array:
    held = [*_state(graph), *_activations(graph, costs)]
    sizes_bytes = compile_sizes([size for _, size, _ in held], tuple(graph.symbols))(binding)
    memory_bytes_O = np.zeros(len(graph.operators))
    for (owner, _, factor), size_bytes in zip(held, sizes_bytes, strict=True):
        memory_bytes_O[owner] += factor * size_bytes
    return memory_bytes_O


_Held = tuple[int, Size, float]
"""An operator, the bytes of something it has, and how many times it has it."""


def _state(graph: ModelGraph) -> Iterator[_Held]:
    """Parameters and buffers, with the first operator that reads them; of copies, with every one."""
    copied = _copied(graph)
    for name, readers in graph.parameter_readers.items():
        if readers:
            parameter = graph.parameters[name]
            size = tensor_bytes(parameter.shape, parameter.dtype)
            for reader in copied.get(name, readers[:1]):
                yield reader, size, TRAINING_STATE if parameter.trainable else 1.0
    first: dict[str, int] = {}
    for operator in graph.operators:
        for name in operator.buffers:
            first.setdefault(name, operator.index)
    for name, reader in first.items():
        yield reader, tensor_bytes(graph.buffers[name].shape, graph.buffers[name].dtype), 1.0


def _activations(graph: ModelGraph, costs: CostArrays) -> Iterator[_Held]:
    """What is saved for the backward; if that was not measured, all results that are no views."""
    for storage in graph.saved:
        if storage.operators:
            yield storage.operators[0], storage.size_bytes, 1.0
    if not graph.saved:
        for tensor in graph.tensors.values():
            if tensor.producer is not None and costs.forward_bytes_O[tensor.producer] > 0:
                yield tensor.producer, tensor_bytes(tensor.shape, tensor.dtype), 1.0
