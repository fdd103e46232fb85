"""Times the model on a worker's device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from forescale.engine.train.assignment import Assignment
from forescale.engine.train.randomness import operator_seed
from forescale.graph.model import ModelGraph
from forescale.profile.measurement import OperatorMeasurement
from forescale.profile.operators import measure_operators, measure_optimizer


def time_microbatch(
    assignment: Assignment,
    inputs: Mapping[str, torch.Tensor],
    batch: Any,
    device: torch.device,
    *,
    budget_s: float,
    with_optimizer: bool,
) -> tuple[OperatorMeasurement, float]:
    """Seconds of every operator for one microbatch, and of the optimizer per byte (0 unless asked for)."""
    captured = assignment.captured
    graph = captured.graph
    measurement = measure_operators(
        replace(captured, state={**_invented(graph), **captured.state}),
        [inputs[name] for name in graph.inputs],
        lambda output: assignment.loss_of(output, batch, device),
        device=device,
        reseed=lambda operator: operator_seed(device, 0, 0, 0, operator),
        budget_s=budget_s,
    )
    if not with_optimizer:
        return measurement, 0.0
    optimizer_s_per_byte, _ = measure_optimizer(
        assignment.optimizer.fresh,
        [p.shape for p in graph.parameters.values() if p.trainable],
        clip_norm=assignment.clip_norm,
        device=device,
    )
    return measurement, optimizer_s_per_byte


def _invented(graph: ModelGraph) -> dict[str, torch.Tensor]:
    """Parameters to time operators with: their values do not matter, but zeros and denormals would."""
    return {
        p.name: torch.empty(p.shape, dtype=getattr(torch, p.dtype)).normal_(0.0, 0.02)
        for p in graph.parameters.values()
    }
