"""Measures the model on a worker's device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from forescale.engine.train.assignment import Assignment
from forescale.engine.train.randomness import operator_seed
from forescale.graph.capture import CapturedModel
from forescale.graph.kernels import measure_loss_memory, measure_workspace
from forescale.graph.model import ModelGraph
from forescale.graph.size import evaluate
from forescale.profile.halves import Half
from forescale.profile.measurement import Array, MemoryMeasurement, OperatorMeasurement
from forescale.profile.operators import measure_operators, measure_optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerProfile:
    """What one worker measured.

    Attributes:
        measurements: one per microbatch.
        unsplit_O: see :meth:`forescale.profile.halves.Half.unsplit_O`; None where nothing will be split.
        optimizer_s_per_byte: seconds of the optimizer per byte of trainable parameters.
    """

    measurements: tuple[OperatorMeasurement, ...]
    unsplit_O: Array | None
    optimizer_s_per_byte: float
    memory: MemoryMeasurement


def profile_model(
    assignment: Assignment,
    microbatches: Sequence[tuple[Mapping[str, torch.Tensor], Any]],
    device: torch.device,
    *,
    budget_s: float,
) -> WorkerProfile:
    """Times every operator, and the optimizer, and measures the memory that tensors do not tell of.

    Args:
        microbatches: batch inputs and batches of the sizes to measure.
        budget_s: about how long to take for each.
    """
    captured = assignment.captured
    graph = captured.graph
    timed = replace(captured, state={**_invented(graph), **captured.state})
    optimizer_s_per_byte, _ = measure_optimizer(
        assignment.optimizer.fresh,
        [p.shape for p in graph.parameters.values() if p.trainable],
        clip_norm=assignment.clip_norm,
        device=device,
    )
    splits = len(assignment.ranks) > 1 and assignment.optimizer.shardable
    measurements, unsplit_O = measure_operators(
        timed,
        [
            (
                [inputs[name] for name in graph.inputs],
                lambda output, batch=batch: assignment.loss_of(output, batch, device),
            )
            for inputs, batch in microbatches
        ],
        device=device,
        reseed=lambda operator: operator_seed(device, 0, 0, 0, operator),
        half=Half.of(timed) if splits else None,
        budget_s=budget_s,
    )
    return WorkerProfile(
        measurements=measurements,
        unsplit_O=unsplit_O,
        optimizer_s_per_byte=optimizer_s_per_byte,
        memory=_measure_memory(assignment, timed, microbatches, device),
    )


def _measure_memory(
    assignment: Assignment,
    timed: CapturedModel,
    microbatches: Sequence[tuple[Mapping[str, torch.Tensor], Any]],
    device: torch.device,
) -> MemoryMeasurement:
    graph = timed.graph
    inputs, batch = microbatches[0]
    binding = graph.bind({name: tuple(tensor.shape) for name, tensor in inputs.items()})
    outputs = [
        torch.zeros([evaluate(size, binding) for size in graph.tensors[n].shape]).to(
            getattr(torch, graph.tensors[n].dtype)
        )
        for n in graph.outputs
    ]

    def loss(values: Sequence[torch.Tensor]) -> torch.Tensor:
        output = timed.output.rebuild(dict(zip(graph.outputs, values, strict=True)))
        return assignment.loss_of(output, batch, device)

    return MemoryMeasurement(
        workspace=measure_workspace(graph, timed.state, [i for i, _ in microbatches], device, timed.modules),
        loss=measure_loss_memory(loss, outputs, device),
    )


def _invented(graph: ModelGraph) -> dict[str, torch.Tensor]:
    """Parameters to time operators with: their values do not matter, but zeros and denormals would."""
    return {
        p.name: torch.empty(p.shape, dtype=getattr(torch, p.dtype)).normal_(0.0, 0.02)
        for p in graph.parameters.values()
    }
