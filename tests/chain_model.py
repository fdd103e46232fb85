"""A chain of operators and what it costs, as small as a planning problem can be.

All operators are equal but for their growth: the first half's cost grows with the length of the batch,
the second half's with its square, so that long batches want other cuts than short ones.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    SymbolSource,
    Tensor,
)
from forescale.plan.problem import MicrobatchCosts, PartitionProblem

ROWS = 8
GB = 10**9


def chain_graph(operators: int = 24, *, changes_buffer: bool = False) -> ModelGraph:
    """The chain; what changes a buffer has no replicas, so that its plans are pipelines."""

    def tensor(i: int) -> Tensor:
        readers = (i,) if i < operators else ()
        shape = ("rows", "length", 16)
        return Tensor(
            name=f"t{i}",
            producer=i - 1 if i else None,
            consumers=readers,
            shape=shape,
            dtype="float32",
            requires_grad=i > 0,
        )

    def operator(i: int) -> Operator:
        return Operator(
            index=i,
            name=f"op{i}",
            target="aten.linear.default",
            args=({"tensor": f"t{i}"}, {"parameter": f"p{i}"}),
            kwargs={},
            outputs=(f"t{i + 1}",),
            returns_tuple=False,
            module_path=f"layers.{i}",
            source="",
            random=False,
            inputs=(f"t{i}",),
            parameters=(f"p{i}",),
            buffers=(),
            mutated_buffers=(),
        )

    parameters = {
        f"p{i}": Parameter(name=f"p{i}", aliases=(), shape=(256, 256), dtype="float32", trainable=True)
        for i in range(operators)
    }
    return ModelGraph(
        operators=tuple(operator(i) for i in range(operators)),
        tensors={f"t{i}": tensor(i) for i in range(operators + 1)},
        parameters=parameters,
        buffers={"last": Buffer(name="last", aliases=(), shape=(1,), dtype="float32", persistent=True)}
        if changes_buffer
        else {},
        buffer_updates=(BufferUpdate(buffer="last", tensor=f"t{operators}"),) if changes_buffer else (),
        inputs=("t0",),
        outputs=(f"t{operators}",),
        symbols={
            "rows": SymbolSource(tensor="t0", axis=0),
            "length": SymbolSource(tensor="t0", axis=1),
        },
        example={"rows": ROWS, "length": 128},
        saved=tuple(
            SavedStorage(name=f"t{i}", operators=(i,), size_bytes="rows*length*64")
            for i in range(1, operators)
        ),
    )


def batch(length: int) -> dict[str, int]:
    return {"rows": ROWS, "length": length}


@dataclass(frozen=True, kw_only=True)
class ChainCosts:
    """A cost model of the chain, exact for a cluster whose devices run at their stated speeds."""

    devices: int = 2
    memory_bytes: int = GB
    graph: ModelGraph = field(default_factory=lambda: chain_graph(changes_buffer=True))

    def problem(self, binding: Mapping[str, int], speeds: Mapping[str, float]) -> PartitionProblem:
        names = [f"cpu{i}" for i in range(self.devices)]
        cluster = Cluster(
            devices=tuple(
                Device(
                    name=name,
                    kind=DeviceKind.CPU,
                    memory_bytes=self.memory_bytes,
                    speed=speeds.get(name, 1.0),
                )
                for name in names
            ),
            default_link=Link(bandwidth_bytes_per_s=1e9, latency_s=1e-4, occupies_device=True),
        )
        counts = [m for m in (1, 2, 4, 8) if m <= binding["rows"]]
        return PartitionProblem(
            graph=self.graph,
            cluster=cluster,
            costs={m: self._costs(binding, m, cluster) for m in counts},
            optimizer_s_per_byte_D=np.array([1e-9 / device.speed for device in cluster.devices]),
            optimizer_state_ratio=2.0,
        )

    def _costs(self, binding: Mapping[str, int], microbatches: int, cluster: Cluster) -> MicrobatchCosts:
        rows, length = binding["rows"] / microbatches, binding["length"] / 128
        operators = len(self.graph.operators)
        growth_O = np.where(np.arange(operators) < operators // 2, length, length**2)
        forward_s_O = 1e-4 + 3e-4 * rows * growth_O
        slowness_D = np.array([[1.0 / device.speed] for device in cluster.devices])
        activation_bytes = int(rows * binding["length"] * 64)
        return MicrobatchCosts(
            forward_s_DO=slowness_D * forward_s_O,
            backward_s_DO=2.0 * slowness_D * forward_s_O,
            input_s_DO=2.0 * slowness_D * forward_s_O,
            weight_s_DO=np.zeros((len(slowness_D), operators)),
            loss_forward_s_D=1e-5 * slowness_D[:, 0],
            loss_backward_s_D=1e-5 * slowness_D[:, 0],
            tensor_bytes=dict.fromkeys(self.graph.tensors, activation_bytes),
            saved_bytes_R=np.full(len(self.graph.saved), float(activation_bytes)),
            workspace_bytes_O=np.zeros(operators),
            loss_saved_bytes=0.0,
        )
