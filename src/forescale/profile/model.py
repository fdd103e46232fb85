"""What a model costs: seconds and bytes of every operator, for a microbatch of any size, on any device.

Needs no torch, so a recorded run can be planned again anywhere.

Axes: D = device, O = operator, R = saved storage (order of ``graph.saved``), K = measured microbatch,
P = operator, with the loss as one more behind the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypedDict

import numpy as np

from forescale.core.cluster import Device, DeviceKind
from forescale.core.errors import InvalidInput
from forescale.graph.cost import CostArrays, cost_table
from forescale.graph.model import ModelGraph
from forescale.graph.peak import StageBytes, StageMemory, workspace_table
from forescale.graph.size import compile_sizes, tensor_bytes
from forescale.profile.measurement import Array, MemoryMeasurement, OperatorMeasurement
from forescale.profile.roofline import Roofline, fit_roofline

KEPT_BINDINGS = 1024
"""Sizes of microbatches whose costs are remembered; the least recently used go first."""
LEAST_ROOF_S = 1e-9
"""Keeps ratios of rooflines finite for operators that do nothing."""


class Costs(TypedDict):
    """Costs of one microbatch: the fields of ``plan.problem.MicrobatchCosts``, by their names."""

    forward_s_DO: Array
    backward_s_DO: Array
    input_s_DO: Array
    weight_s_DO: Array
    loss_forward_s_D: Array
    loss_backward_s_D: Array
    tensor_bytes: Mapping[str, int]
    saved_bytes_R: Array
    workspace_bytes_O: Array
    loss_saved_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KindProfile:
    """What was measured on one device kind.

    Attributes:
        measurements: one or more sizes of microbatch. Between them costs are interpolated; beyond, they
            follow the roofline from the nearest.
        optimizer_s_per_byte: seconds of an optimiser step per byte of trainable parameters.
        memory: what kernels and the loss take beside tensors; None counts tensors only.
        unsplit_O: see :meth:`forescale.profile.halves.Half.unsplit_O`; None takes an operator's seconds to be
            shared out among its shards.
    """

    measurements: tuple[OperatorMeasurement, ...]
    optimizer_s_per_byte: float
    memory: MemoryMeasurement | None = None
    unsplit_O: Array | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Of one microbatch on one device kind at speed 1; the loss is the last entry.

    ``input_s_P`` and ``weight_s_P`` are the backward in two parts, see ``OperatorMeasurement``.
    """

    forward_s_P: Array
    backward_s_P: Array
    input_s_P: Array
    weight_s_P: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """Sizes for one microbatch."""

    tensor_bytes: Mapping[str, int]
    saved_bytes_R: Array
    workspace_bytes_O: Array
    output_bytes: float


@dataclass(frozen=True, kw_only=True)
class ModelProfile:
    """A model's graph with measured costs; see the module.

    Seconds of a microbatch that was not measured are those of the nearest measured ones, times the ratio of
    the operator's rooflines; between two measured ones that ratio's error is interpolated.

    Attributes:
        optimizer_state_ratio: bytes of optimiser state per byte of trainable parameters.
    """

    graph: ModelGraph
    kinds: Mapping[DeviceKind, KindProfile]
    optimizer_state_ratio: float

    def microbatch_costs(self, binding: Mapping[str, int], devices: Sequence[Device]) -> Costs:
        """Everything the planner wants to know about one microbatch.

        Args:
            binding: the graph's symbols for the microbatch.
            devices: in the order of axis D; a device's ``speed`` divides its seconds.

        Raises:
            InvalidInput: a device's kind was not measured, or a size has no value for the binding.
        """
        sizes = self.sizes(binding)
        speed_D1 = np.array([[device.speed] for device in devices])
        seconds = [self.seconds(binding, device.kind) for device in devices]
        forward_s_DP = np.stack([s.forward_s_P for s in seconds]) / speed_D1
        backward_s_DP = np.stack([s.backward_s_P for s in seconds]) / speed_D1
        return Costs(
            forward_s_DO=forward_s_DP[:, :-1],
            backward_s_DO=backward_s_DP[:, :-1],
            input_s_DO=np.stack([s.input_s_P for s in seconds])[:, :-1] / speed_D1,
            weight_s_DO=np.stack([s.weight_s_P for s in seconds])[:, :-1] / speed_D1,
            loss_forward_s_D=forward_s_DP[:, -1],
            loss_backward_s_D=backward_s_DP[:, -1],
            tensor_bytes=sizes.tensor_bytes,
            saved_bytes_R=sizes.saved_bytes_R,
            workspace_bytes_O=sizes.workspace_bytes_O,
            loss_saved_bytes=self._loss_saved_bytes(sizes.output_bytes),
        )

    def optimizer_s_per_byte(self, devices: Sequence[Device]) -> Array:
        """Seconds of the optimiser step per byte of trainable parameters, shape (D,)."""
        return np.array([self._kind(device.kind).optimizer_s_per_byte / device.speed for device in devices])

    def unsplit(self, devices: Sequence[Device]) -> Array:
        """Which part of each operator's seconds a shard spends however small it is, shape (D, O)."""
        none_O = np.zeros(len(self.graph.operators))
        known = [self._kind(device.kind).unsplit_O for device in devices]
        return np.stack([none_O if unsplit_O is None else unsplit_O for unsplit_O in known])

    def seconds(self, binding: Mapping[str, int], kind: DeviceKind) -> Seconds:
        """Seconds of every operator, and of the loss, at speed 1."""
        return self._seconds(_key(binding), kind)

    def stage_bytes(
        self, operators: tuple[int, ...], binding: Mapping[str, int], kind: DeviceKind, *, with_loss: bool
    ) -> StageBytes:
        """Memory of a stage for one microbatch, see :func:`forescale.graph.peak.peak_bytes`."""
        return self._stage_memory(operators, kind, with_loss).measure(binding)

    def roofline(self, kind: DeviceKind) -> Roofline:
        """Effective rates of ``kind``, fitted to all that was measured on it."""
        return self._rooflines[kind]

    def sizes(self, binding: Mapping[str, int]) -> Bytes:
        """Bytes of tensors, of what is saved, and beside it, for one microbatch."""
        return self._sizes(_key(binding))

    def work(self, binding: Mapping[str, int]) -> CostArrays:
        """FLOPs and bytes of every operator."""
        return self._cost_table(dict(binding))

    def to_json(self) -> dict[str, Any]:
        """All but the graph, which has its own format."""
        return {
            "optimizer_state_ratio": self.optimizer_state_ratio,
            "kinds": {
                kind.value: {
                    "optimizer_s_per_byte": profile.optimizer_s_per_byte,
                    "memory": profile.memory and profile.memory.to_json(),
                    "unsplit_O": None if profile.unsplit_O is None else profile.unsplit_O.tolist(),
                    "measurements": [measurement.to_json() for measurement in profile.measurements],
                }
                for kind, profile in self.kinds.items()
            },
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], graph: ModelGraph) -> ModelProfile:
        kinds = {
            DeviceKind(kind): KindProfile(
                measurements=tuple(OperatorMeasurement.from_json(m) for m in profile["measurements"]),
                optimizer_s_per_byte=profile["optimizer_s_per_byte"],
                memory=profile["memory"] and MemoryMeasurement.from_json(profile["memory"]),
                unsplit_O=None if profile["unsplit_O"] is None else np.asarray(profile["unsplit_O"]),
            )
            for kind, profile in value["kinds"].items()
        }
        return cls(graph=graph, kinds=kinds, optimizer_state_ratio=value["optimizer_state_ratio"])

    def _kind(self, kind: DeviceKind) -> KindProfile:
        if kind not in self.kinds:
            measured = ", ".join(self.kinds) or "nothing"
            raise InvalidInput(
                f"the model was not measured on a {kind} device (only on {measured}); profile it there"
            )
        return self.kinds[kind]

    # --- seconds ---------------------------------------------------------------------------------

    @cached_property
    def _cost_table(self) -> Callable[[Mapping[str, int]], CostArrays]:
        return cost_table(self.graph)

    @cached_property
    def _seconds(self) -> Callable[[_Key, DeviceKind], Seconds]:
        return lru_cache(maxsize=KEPT_BINDINGS)(self._predict)

    def _loads_P(self, binding: Mapping[str, int]) -> tuple[tuple[Array, Array], ...]:
        """(FLOPs, bytes) of the forward, of the backward, and for each of its parts those of the whole.

        The loss reads the output and writes as much.
        """
        work = self._cost_table(binding)
        loss_bytes = 2 * self._sizes(_key(binding)).output_bytes
        backward = (np.append(work.backward_flops_O, 0.0), np.append(work.backward_bytes_O, loss_bytes))
        forward = (np.append(work.forward_flops_O, 0.0), np.append(work.forward_bytes_O, loss_bytes))
        return forward, backward, backward, backward

    @cached_property
    def _rooflines(self) -> Mapping[DeviceKind, Roofline]:
        return {kind: self._fit(profile) for kind, profile in self.kinds.items()}

    def _fit(self, profile: KindProfile) -> Roofline:
        seconds: list[Array] = []
        flops: list[Array] = []
        size_bytes: list[Array] = []
        for measured in profile.measurements:
            for seconds_P, load_P in zip(
                _seconds_P(measured)[:2], self._loads_P(measured.binding)[:2], strict=True
            ):
                seconds.append(seconds_P)
                flops.append(load_P[0])
                size_bytes.append(load_P[1])
        return fit_roofline(np.concatenate(seconds), np.concatenate(flops), np.concatenate(size_bytes))

    @cached_property
    def _points(self) -> Mapping[DeviceKind, tuple[tuple[Array, Array], ...]]:
        """Per kind and phase: the measured microbatches' rooflines, and measured seconds over roofline."""
        points: dict[DeviceKind, tuple[tuple[Array, Array], ...]] = {}
        for kind, profile in self.kinds.items():
            loads = [self._loads_P(measured.binding) for measured in profile.measurements]
            phases: list[tuple[Array, Array]] = []
            for phase in range(len(_seconds_P(profile.measurements[0]))):
                roof_s_KP = np.stack([_roof_s_P(self._rooflines[kind], *load[phase]) for load in loads])
                seconds_KP = np.stack([_seconds_P(measured)[phase] for measured in profile.measurements])
                phases.append((roof_s_KP, seconds_KP / roof_s_KP))
            points[kind] = tuple(phases)
        return points

    def _predict(self, key: _Key, kind: DeviceKind) -> Seconds:
        self._kind(kind)
        predicted: list[Array] = []
        for load_P, (roof_s_KP, excess_KP) in zip(self._loads_P(dict(key)), self._points[kind], strict=True):
            roof_s_P = _roof_s_P(self._rooflines[kind], *load_P)
            predicted.append(roof_s_P * _interpolate(roof_s_P, roof_s_KP, excess_KP))
        forward_s_P, backward_s_P, input_s_P, weight_s_P = predicted
        return Seconds(
            forward_s_P=forward_s_P, backward_s_P=backward_s_P, input_s_P=input_s_P, weight_s_P=weight_s_P
        )

    # --- bytes -----------------------------------------------------------------------------------

    @cached_property
    def _stage_memory(self) -> Callable[[tuple[int, ...], DeviceKind, bool], StageMemory]:
        def compiled(operators: tuple[int, ...], kind: DeviceKind, with_loss: bool) -> StageMemory:
            memory = self._kind(kind).memory
            workspace, loss = (memory.workspace, memory.loss) if memory else (None, None)
            return StageMemory(self.graph, operators, workspace=workspace, loss=loss if with_loss else None)

        return lru_cache(maxsize=KEPT_BINDINGS)(compiled)

    @cached_property
    def _sizes(self) -> Callable[[_Key], Bytes]:
        graph = self.graph
        place = {name: index for index, name in enumerate(graph.tensors)}
        sizes = [tensor_bytes(tensor.shape, tensor.dtype) for tensor in graph.tensors.values()]
        table = compile_sizes([*sizes, *(saved.size_bytes for saved in graph.saved)], tuple(graph.symbols))
        workspaces = [
            workspace_table(graph, kind.memory and kind.memory.workspace) for kind in self.kinds.values()
        ]
        outputs = [place[name] for name in graph.outputs]

        def measure(key: _Key) -> Bytes:
            values = np.array(table(dict(key)), dtype=np.float64)
            tensor_T = values[: len(sizes)]
            return Bytes(
                tensor_bytes=dict(zip(graph.tensors, map(int, tensor_T), strict=True)),
                saved_bytes_R=values[len(sizes) :],
                workspace_bytes_O=np.max([workspace(dict(key)) for workspace in workspaces], axis=0),
                output_bytes=float(tensor_T[outputs].sum()),
            )

        return lru_cache(maxsize=KEPT_BINDINGS)(measure)

    def _loss_saved_bytes(self, output_bytes: float) -> float:
        """What the loss keeps grows with the model's output."""
        ratios = [
            measured.loss_saved_bytes / max(self._sizes(_key(measured.binding)).output_bytes, 1.0)
            for profile in self.kinds.values()
            for measured in profile.measurements
        ]
        return output_bytes * max(ratios, default=0.0)


_Key = tuple[tuple[str, int], ...]
"""A binding that can be looked up."""


def _key(binding: Mapping[str, int]) -> _Key:
    return tuple(sorted(binding.items()))


def _roof_s_P(roofline: Roofline, flops_P: Array, bytes_P: Array) -> Array:
    return np.maximum(roofline.seconds(flops_P, bytes_P), LEAST_ROOF_S)


def _seconds_P(measured: OperatorMeasurement) -> tuple[Array, ...]:
    """Of the forward, the backward, and its two parts."""
    return (
        np.append(measured.forward_s_O, measured.loss_forward_s),
        np.append(measured.backward_s_O, measured.loss_backward_s),
        np.append(measured.input_s_O, measured.loss_backward_s),
        np.append(measured.weight_s_O, 0.0),
    )


def _interpolate(at_P: Array, points_KP: Array, values_KP: Array) -> Array:
    """Per column: ``values`` at ``at``, linear between the points and constant beyond them."""
    order_KP = np.argsort(points_KP, axis=0, kind="stable")
    points_KP = np.take_along_axis(points_KP, order_KP, axis=0)
    values_KP = np.take_along_axis(values_KP, order_KP, axis=0)
    result_P = values_KP[0].copy()
    for left in range(len(points_KP) - 1):
        gap_P = points_KP[left + 1] - points_KP[left]
        # What costs the same in both was measured twice: take the mean.
        weight_P = np.where(
            gap_P > 0, np.clip((at_P - points_KP[left]) / np.maximum(gap_P, 1e-300), 0.0, 1.0), 0.5
        )
        result_P += weight_P * (values_KP[left + 1] - values_KP[left])
    return result_P
