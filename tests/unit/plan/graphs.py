"""Small graphs and planning problems for tests, built without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from forescale.core.cluster import Cluster, Device, DeviceKind, Link
from forescale.graph.model import (
    Buffer,
    BufferUpdate,
    ModelGraph,
    Operator,
    Parameter,
    SavedStorage,
    Tensor,
)
from forescale.graph.separable import separable_operators
from forescale.plan.problem import MicrobatchCosts, PartitionProblem

FAST = Link(bandwidth_bytes_per_s=1e9, latency_s=1e-6)
LOOPBACK = Link(bandwidth_bytes_per_s=1e6, latency_s=1e-4, occupies_device=True)


@dataclass(kw_only=True)
class GraphBuilder:
    """Adds operators one by one; every operator makes one float32 tensor, named like it."""

    elements: dict[str, int] = field(default_factory=dict)
    operators: list[Operator] = field(default_factory=list)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    updates: list[BufferUpdate] = field(default_factory=list)
    saved: list[SavedStorage] = field(default_factory=list)
    without_gradient: set[str] = field(default_factory=set)

    def add(
        self,
        name: str,
        *inputs: str,
        elements: int = 8,
        parameters: Sequence[str] = (),
        buffers: Sequence[str] = (),
        updates: str | None = None,
        requires_grad: bool = True,
        module: str = "",
        separable: bool = False,
    ) -> str:
        """``separable``: gradients of its parameters can be computed apart from that of its first input."""
        arguments = ({"tensor": inputs[0]}, *({"parameter": name} for name in parameters))
        operator = Operator(
            index=len(self.operators),
            name=name,
            target="aten.linear.default" if separable else "aten.add.Tensor",
            args=arguments if separable else (),
            kwargs={},
            outputs=(name,),
            returns_tuple=False,
            module_path=module,
            source="model.py:1",
            random=False,
            inputs=inputs,
            parameters=tuple(parameters),
            buffers=tuple(buffers),
            mutated_buffers=(),
        )
        self.operators.append(operator)
        self.elements[name] = elements
        if not requires_grad:
            self.without_gradient.add(name)
        if updates is not None:
            self.updates.append(BufferUpdate(buffer=updates, tensor=name))
        return name

    def parameter(self, name: str, elements: int, *, trainable: bool = True) -> str:
        self.parameters[name] = Parameter(
            name=name, aliases=(), shape=(elements,), dtype="float32", trainable=trainable
        )
        return name

    def buffer(self, name: str, elements: int) -> str:
        self.buffers[name] = Buffer(
            name=name, aliases=(), shape=(elements,), dtype="float32", persistent=True
        )
        return name

    def save(self, name: str, *operators: int) -> None:
        size_bytes = 4 * self.elements.get(name, 8)
        self.saved.append(SavedStorage(name=name, operators=operators, size_bytes=size_bytes))

    def build(self, outputs: Sequence[str], inputs: Mapping[str, int]) -> ModelGraph:
        made = {o.name: o.index for o in self.operators}
        self.elements.update(inputs)
        tensors = {
            name: Tensor(
                name=name,
                producer=made.get(name),
                consumers=tuple(o.index for o in self.operators if name in o.inputs),
                shape=(self.elements[name],),
                dtype="float32",
                requires_grad=name in made and name not in self.without_gradient,
            )
            for name in [*inputs, *made]
        }
        return ModelGraph(
            operators=tuple(self.operators),
            tensors=tensors,
            parameters=self.parameters,
            buffers=self.buffers,
            buffer_updates=tuple(self.updates),
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            symbols={},
            example={},
            saved=tuple(self.saved),
        )


def chain(
    count: int, *, elements: int = 8, parameter_elements: int = 0, separable: bool = False
) -> ModelGraph:
    """``count`` operators in a row, each with its own parameter and saving its input."""
    builder = GraphBuilder()
    previous = "x"
    for index in range(count):
        parameters = [builder.parameter(f"weight{index}", parameter_elements)] if parameter_elements else []
        previous = builder.add(
            f"op{index}",
            previous,
            elements=elements,
            parameters=parameters,
            module=f"layers.{index}",
            separable=separable,
        )
        if index:
            builder.save(f"op{index - 1}", index)
    return builder.build([previous], {"x": elements})


def devices(*speeds: float, memory_bytes: int = 10**9, delay_s: float = 0.0) -> tuple[Device, ...]:
    """Slow ones let messages wait."""
    return tuple(
        Device(
            name=f"cpu{index}",
            kind=DeviceKind.CPU,
            memory_bytes=memory_bytes,
            speed=speed,
            delay_s=(1 - speed) * delay_s,
        )
        for index, speed in enumerate(speeds)
    )


def problem(
    graph: ModelGraph,
    *,
    speeds: Sequence[float] = (1.0, 1.0),
    seconds: Sequence[float] | None = None,
    counts: Sequence[int] = (1, 2, 4),
    link: Link = FAST,
    links: Mapping[tuple[str, str], Link] | None = None,
    memory_bytes: int = 10**9,
    delay_s: float = 0.0,
    overhead_s: float = 0.0,
    optimizer_s_per_byte: float = 0.0,
    loss_s: float = 0.0,
    clips_norm: bool = False,
    weight_share: float = 0.0,
) -> PartitionProblem:
    """A problem whose operators take ``seconds`` for a whole batch forward, twice that backward.

    Smaller microbatches take proportionally less and ``overhead_s`` more, each. Gradients of parameters take
    ``weight_share`` of the backward where they can be computed apart.
    """
    separable_O = np.isin(
        np.arange(len(graph.operators)), list(separable_operators(graph, range(len(graph.operators))))
    )
    cost_s_O = np.array(seconds if seconds is not None else [1.0] * len(graph.operators))
    slowness_D1 = 1 / np.array(speeds)[:, None]

    def costs(count: int) -> MicrobatchCosts:
        backward_s_DO = slowness_D1 * 2 * (cost_s_O / count + overhead_s)
        weight_s_DO = weight_share * separable_O * backward_s_DO
        return MicrobatchCosts(
            forward_s_DO=slowness_D1 * (cost_s_O / count + overhead_s),
            backward_s_DO=backward_s_DO,
            input_s_DO=backward_s_DO - weight_s_DO,
            weight_s_DO=weight_s_DO,
            loss_forward_s_D=slowness_D1[:, 0] * loss_s / count,
            loss_backward_s_D=slowness_D1[:, 0] * loss_s / count,
            tensor_bytes={n: 4 * int(t.shape[0]) // count for n, t in graph.tensors.items()},
            saved_bytes_R=np.array([float(s.size_bytes) for s in graph.saved]) / count,
            workspace_bytes_O=np.full(len(graph.operators), 16.0) / count,
            loss_saved_bytes=32.0 / count,
        )

    return PartitionProblem(
        graph=graph,
        cluster=Cluster(
            devices=devices(*speeds, memory_bytes=memory_bytes, delay_s=delay_s),
            default_link=link,
            links=links or {},
        ),
        costs={count: costs(count) for count in counts},
        optimizer_s_per_byte_D=np.full(len(speeds), optimizer_s_per_byte) * slowness_D1[:, 0],
        optimizer_state_ratio=2.0,
        clips_norm=clips_norm,
    )
