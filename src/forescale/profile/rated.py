"""What a model costs on devices that are not here, from their rates: a roofline (Williams et al., 2009).

Axes: D = device, O = operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from forescale.core.cluster import Device, DeviceKind
from forescale.graph.cost import CostArrays
from forescale.graph.model import ModelGraph
from forescale.graph.separable import separable_operators
from forescale.profile.hardware import DISPATCH_S
from forescale.profile.measurement import Array
from forescale.profile.model import Costs, KindProfile, ModelProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a device sustains; ``half_flops_per_s`` in bfloat16 or float16, the other in float32."""

    flops_per_s: float
    half_flops_per_s: float
    memory_bandwidth_bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class RatedProfile(ModelProfile):
    """A model's graph with costs that follow from rates, by the device's name, and not from measurement.

    An operator takes its arithmetic or its memory traffic, whichever is longer, and the time to start it; the
    loss reads the outputs and writes as much. Kernels take no memory for themselves.
    """

    rates: Mapping[str, Rates]

    @classmethod
    def of(cls, graph: ModelGraph, rates: Mapping[str, Rates], optimizer_state_ratio: float) -> RatedProfile:
        """With ``saved`` and ``memory`` of the graph recorded."""
        unmeasured = KindProfile(measurements=(), optimizer_s_per_byte=0.0)
        return cls(
            graph=graph,
            kinds=dict.fromkeys(DeviceKind, unmeasured),
            optimizer_state_ratio=optimizer_state_ratio,
            rates=rates,
        )

    def microbatch_costs(self, binding: Mapping[str, int], devices: Sequence[Device]) -> Costs:
        sizes, work = self.sizes(binding), self.work(binding)
        half_O = np.array([_is_half(self.graph, o.outputs) for o in self.graph.operators], dtype=np.bool_)
        seconds = [self._seconds_O(work, half_O, device) for device in devices]
        loss_s_D = np.array(
            [2 * sizes.output_bytes / self._bandwidth(device) / device.speed for device in devices]
        )
        backward_s_DO = np.stack([backward_s_O for _, backward_s_O in seconds])
        weight_share_O = self._weight_share_O
        return Costs(
            forward_s_DO=np.stack([forward_s_O for forward_s_O, _ in seconds]),
            backward_s_DO=backward_s_DO,
            input_s_DO=(1 - weight_share_O) * backward_s_DO,
            weight_s_DO=weight_share_O * backward_s_DO,
            loss_forward_s_D=loss_s_D,
            loss_backward_s_D=loss_s_D,
            tensor_bytes=sizes.tensor_bytes,
            saved_bytes_R=sizes.saved_bytes_R,
            workspace_bytes_O=sizes.workspace_bytes_O,
            loss_saved_bytes=sizes.output_bytes,  # as cross entropy keeps its logarithms
        )

    def optimizer_s_per_byte(self, devices: Sequence[Device]) -> Array:
        """Parameters, gradients and state are read; parameters and state written."""
        moved = 3 + 2 * self.optimizer_state_ratio
        return np.array([moved / self._bandwidth(device) / device.speed for device in devices])

    @cached_property
    def _weight_share_O(self) -> Array:
        """How much of a backward are gradients of parameters: half of a product, if its input has one too."""
        share_O = np.zeros(len(self.graph.operators))
        for index in separable_operators(self.graph, range(len(share_O))):
            inputs = [self.graph.tensors[name] for name in self.graph.operators[index].inputs]
            share_O[index] = 0.5 if any(tensor.requires_grad for tensor in inputs) else 1.0
        return share_O

    def _bandwidth(self, device: Device) -> float:
        return self.rates[device.name].memory_bandwidth_bytes_per_s

    def _seconds_O(
        self, work: CostArrays, half_O: np.ndarray[tuple[int], np.dtype[np.bool_]], device: Device
    ) -> tuple[Array, Array]:
        rates = self.rates[device.name]
        rate_O = np.where(half_O, rates.half_flops_per_s, rates.flops_per_s)

        def seconds(flops_O: Array, bytes_O: Array) -> Array:
            roof_s_O: Array = np.maximum(flops_O / rate_O, bytes_O / rates.memory_bandwidth_bytes_per_s)
            started_s_O: Array = roof_s_O + DISPATCH_S * (bytes_O > 0)
            return started_s_O / device.speed

        return (
            seconds(work.forward_flops_O, work.forward_bytes_O),
            seconds(work.backward_flops_O, work.backward_bytes_O),
        )


def _is_half(graph: ModelGraph, outputs: Iterable[str | None]) -> bool:
    return any(graph.tensors[name].dtype in ("bfloat16", "float16") for name in outputs if name)
