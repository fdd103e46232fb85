"""Graphs of real operators, which can be split between devices, and problems with them, without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from forescale.core.cluster import Cluster, Link
from forescale.graph.cost import cost_table
from forescale.graph.flows import references
from forescale.graph.model import ModelGraph, Operator, Parameter, SavedStorage, SymbolSource, Tensor
from forescale.graph.size import evaluate, tensor_bytes
from forescale.plan.problem import MicrobatchCosts, PartitionProblem
from unit.plan.graphs import FAST, devices


def perceptron(*widths: int) -> ModelGraph:
    """Linear layers with GELU between them, which save what they read."""
    operators: list[Operator] = []
    shapes: dict[str, tuple[str | int, ...]] = {"x": ("rows", widths[0])}
    parameters: dict[str, Parameter] = {}

    def add(name: str, target: str, *args: dict[str, str], width: int) -> dict[str, str]:
        found = list(references(args))
        operators.append(
            Operator(
                index=len(operators), name=name, target=target, args=args, kwargs={}, outputs=(name,),
                returns_tuple=False, module_path=f"layers.{name}", source="model.py:1", random=False,
                inputs=tuple(n for kind, n in found if kind == "tensor"),
                parameters=tuple(n for kind, n in found if kind == "parameter"),
                buffers=(), mutated_buffers=(),
            )
        )  # fmt: skip
        shapes[name] = ("rows", width)
        return {"tensor": name}

    def parameter(name: str, *shape: int) -> dict[str, str]:
        parameters[name] = Parameter(name=name, aliases=(), shape=shape, dtype="float32", trainable=True)
        return {"parameter": name}

    last = {"tensor": "x"}
    for layer, (before, after) in enumerate(pairwise(widths)):
        if layer:
            last = add(f"gelu{layer}", "aten.gelu.default", last, width=before)
        weight, bias = parameter(f"weight{layer}", after, before), parameter(f"bias{layer}", after)
        last = add(f"linear{layer}", "aten.linear.default", last, weight, bias, width=after)
    made = {o.name: o.index for o in operators}
    tensors = {
        name: Tensor(
            name=name,
            producer=made.get(name),
            consumers=tuple(o.index for o in operators if name in o.inputs),
            shape=shape,
            dtype="float32",
            requires_grad=name != "x",
        )
        for name, shape in shapes.items()
    }
    saved = [
        SavedStorage(name=name, operators=t.consumers, size_bytes=tensor_bytes(t.shape, t.dtype))
        for name, t in tensors.items()
        if t.consumers
    ]
    return ModelGraph(
        operators=tuple(operators),
        tensors=tensors,
        parameters=parameters,
        buffers={},
        buffer_updates=(),
        inputs=("x",),
        outputs=(operators[-1].name,),
        symbols={"rows": SymbolSource(tensor="x", axis=0)},
        example={"rows": 8},
        saved=tuple(saved),
    )


def perceptron_problem(
    graph: ModelGraph,
    *,
    speeds: Sequence[float] = (1.0, 1.0),
    rows: int = 8,
    counts: Sequence[int] = (1,),
    flops_per_s: float = 1e9,
    link: Link = FAST,
    links: Mapping[tuple[str, str], Link] | None = None,
    memory_bytes: int = 10**9,
    delay_s: float = 0.0,
    unsplit: float | None = None,
    optimizer_s_per_byte: float = 0.0,
    loss_s: float = 0.0,
    shardable: bool = True,
) -> PartitionProblem:
    """Operators take as long as their FLOPs; ``unsplit``: of what shards of every second one take."""
    table, slowness_D1 = cost_table(graph), 1 / np.array(speeds)[:, None]

    def costs(count: int) -> MicrobatchCosts:
        binding = {"rows": rows // count}
        cost = table(binding)
        loss_s_D = slowness_D1[:, 0] * loss_s / count
        backward_s_DO = slowness_D1 * cost.backward_flops_O / flops_per_s
        return MicrobatchCosts(
            forward_s_DO=slowness_D1 * cost.forward_flops_O / flops_per_s,
            backward_s_DO=backward_s_DO,
            input_s_DO=backward_s_DO,
            weight_s_DO=np.zeros_like(backward_s_DO),
            loss_forward_s_D=loss_s_D,
            loss_backward_s_D=loss_s_D,
            tensor_bytes={
                n: evaluate(tensor_bytes(t.shape, t.dtype), binding) for n, t in graph.tensors.items()
            },
            saved_bytes_R=np.array([float(evaluate(s.size_bytes, binding)) for s in graph.saved]),
            workspace_bytes_O=np.array([4.0 * int(graph.tensors[o.name].shape[1]) for o in graph.operators]),
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
        optimizer_s_per_byte_D=optimizer_s_per_byte * slowness_D1[:, 0],
        optimizer_state_ratio=2.0,
        shardable=shardable,
        unsplit_DO=None if unsplit is None else np.ones_like(slowness_D1) * unsplit * _every_second(graph),
    )


def _every_second(graph: ModelGraph) -> np.ndarray:
    return 1 - np.arange(len(graph.operators)) % 2
