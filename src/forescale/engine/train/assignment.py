"""What a worker is told once: the model, and how to train it."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import cloudpickle
import torch
from torch import nn
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

    def encode(self, model: nn.Module) -> bytes:
        """The assignment as bytes for ``pickle.loads``; what is not importable travels by value.

        Raises:
            TaskFailed: the loss or the scheduler refers to a parameter of ``model``. A worker would use a
                copy of it that is never trained.
        """
        written = io.BytesIO()
        _WithoutParameters(written, model).dump(self)
        return written.getvalue()

    def loss_of(self, output: Any, batch: Any, device: torch.device) -> torch.Tensor:
        """The task's loss, under its autocast.

        Raises:
            TaskFailed: the loss is not a scalar tensor.
        """
        casting = torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()
        with casting:
            return _scalar(self.loss(output, batch))


class _WithoutParameters(cloudpickle.Pickler):
    """Refuses a model's parameters."""

    def __init__(self, file: io.BytesIO, model: nn.Module) -> None:
        super().__init__(file)
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    def persistent_id(self, obj: Any) -> None:
        if (name := self._names.get(id(obj))) is not None:
            raise TaskFailed(
                f"the loss (or the scheduler) uses the model's parameter {name}, which workers share; "
                "return what the loss needs from the model's forward"
            )


def _scalar(loss: object) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or loss.dim():
        raise TaskFailed("loss(output, batch) must return a scalar tensor")
    return loss
