"""What a worker is told once: the model, and how to train it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from forescale.core.errors import TaskFailed
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

    def loss_of(self, output: Any, batch: Any, device: torch.device) -> torch.Tensor:
        """The task's loss, under its autocast.

        Raises:
            TaskFailed: the loss is not a scalar tensor.
        """
        casting = torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()
        with casting:
            return _scalar(self.loss(output, batch))


def _scalar(loss: object) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or loss.dim():
        raise TaskFailed("loss(output, batch) must return a scalar tensor")
    return loss
