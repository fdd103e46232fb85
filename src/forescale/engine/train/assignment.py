"""What a worker is told once: the model, and how to train it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from forescale.engine.train.optimizer import OptimizerTemplate
from forescale.graph.capture import CapturedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What every worker is told once.

    Attributes:
        captured: the model without its parameters' values.
        ranks: device name -> rank.
    """

    captured: CapturedModel
    optimizer: OptimizerTemplate
    scheduler: Callable[[Optimizer], LRScheduler] | None
    loss: Callable[[Any, Any], torch.Tensor]
    clip_norm: float | None
    autocast: torch.dtype | None
    seed: int
    ranks: Mapping[str, int]
