"""What to train: a model, its loss, its optimizer and its batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from forescale.core.errors import TaskFailed

Batch = Any
"""A tensor, a tuple or a dict of tensors (nested as you like)."""

Inputs = Sequence[str | int] | Callable[[Batch], tuple[Sequence[Any], Mapping[str, Any]]]


@dataclass(frozen=True)
class TrainingTask:
    """Everything that defines a training run, but not where it runs.

    Args:
        model: any module whose forward does not depend on the values in its tensors.
        loss: ``loss(output, batch) -> scalar tensor``, the mean over the batch's rows.
        optimizer: an optimizer over the model's parameters, or a callable that makes one from
            ``model.parameters()``, e.g. ``lambda p: torch.optim.AdamW(p, lr=3e-4)``; its groups are kept.
        batches: any iterable. The model is called with the parts of a batch that its signature takes:
            a dict's keys by name, a tuple's first items by the number of required arguments.
        scheduler: callable that makes a learning-rate scheduler from the optimizer; stepped every step.
        clip_norm: largest global norm of the gradients.
        autocast: dtype of ``torch.autocast``, e.g. ``torch.bfloat16``.
        seed: seeds dropout and other random operators; the same however the model is cut.
        inputs: overrides which parts of a batch the model takes: names or positions, or a callable
            ``batch -> (args, kwargs)``.
        weight: weight of one microbatch in the step's loss (e.g. its number of unpadded tokens, when the
            loss is a mean over those); by default the number of rows.
    """

    model: nn.Module
    loss: Callable[[Any, Batch], torch.Tensor]
    optimizer: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer]
    batches: Iterable[Batch]
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    clip_norm: float | None = None
    autocast: torch.dtype | None = None
    seed: int = 0
    inputs: Inputs | None = None
    weight: Callable[[Batch], float] | None = None

    def call(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments and keyword arguments the model is called with.

        Raises:
            TaskFailed: the batch does not hold what the model takes.
        """
        if callable(self.inputs):
            args, kwargs = self.inputs(batch)
            return tuple(args), dict(kwargs)
        if isinstance(batch, torch.Tensor):
            return (batch,), {}
        if self.inputs is not None:
            return _chosen(batch, self.inputs)
        if isinstance(batch, Mapping):
            return (), self._named(batch)
        if isinstance(batch, (tuple, list)):
            return self._positional(tuple(batch))
        raise TaskFailed(f"a batch must be a tensor, tuple or dict of tensors, not {type(batch).__name__}")

    def _named(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        parameters = inspect.signature(self.model.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        taken = {name: value for name, value in batch.items() if name in parameters or takes_any}
        if not taken:
            takes, holds = ", ".join(parameters), ", ".join(map(str, batch))
            raise TaskFailed(
                f"the model takes ({takes}) but the batch holds ({holds}); say which with inputs="
            )
        return taken

    def _positional(self, batch: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        parameters = inspect.signature(self.model.forward).parameters.values()
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        required = sum(p.default is p.empty for p in positional)
        if required > len(batch):
            raise TaskFailed(f"the model takes {required} arguments but the batch holds {len(batch)} items")
        return batch[: max(required, 1)], {}


def _chosen(batch: Batch, inputs: Sequence[str | int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        if isinstance(batch, Mapping):
            return (), {str(key): batch[key] for key in inputs}
        return tuple(batch[int(position)] for position in inputs), {}
    except (KeyError, IndexError, ValueError) as error:
        raise TaskFailed(f"inputs={list(inputs)!r} names what the batch does not hold: {error}") from error


def batch_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Size of axis 0 of the first tensor the model takes."""
    for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return int(leaf.shape[0])
    raise TaskFailed("the batch holds no tensor with rows for the model")


def microbatch_rows(rows: int, microbatches: int) -> tuple[int, ...]:
    """Rows of each microbatch: as even as possible, larger ones first, none empty."""
    count = min(rows, microbatches)
    base, extra = divmod(rows, count)
    return tuple(base + (index < extra) for index in range(count))


def split_rows(tree: Any, rows: Sequence[int]) -> list[Any]:
    """Splits every tensor of ``tree`` with ``sum(rows)`` rows; others go to every part whole."""
    total = sum(rows)
    leaves, spec = pytree.tree_flatten(tree)
    parts = [
        leaf.split(list(rows))
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == total
        else [leaf] * len(rows)
        for leaf in leaves
    ]
    return [pytree.tree_unflatten([part[index] for part in parts], spec) for index in range(len(rows))]
