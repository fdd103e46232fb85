"""What to train: a model, its loss, its optimizer and its batches."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from forescale.core.errors import TaskFailed

Batch = Any
"""A tensor, or a tuple, list, mapping or dataclass of tensors (nested as you like)."""

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

    Raises:
        TaskFailed: the model is no module, the loss not callable, or ``clip_norm`` not positive.
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

    def __post_init__(self) -> None:
        model: Any = self.model  # what the user gave, whatever the annotation says
        if not isinstance(model, nn.Module):
            raise TaskFailed(f"model must be a torch.nn.Module, not {type(model).__name__}")
        if not callable(self.loss):
            raise TaskFailed(f"loss must be callable as loss(output, batch), not {type(self.loss).__name__}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise TaskFailed(f"clip_norm is {self.clip_norm}; it must be above 0")

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
    """Size of axis 0 of the first tensor the model takes, at least 1.

    Raises:
        TaskFailed: there is no such tensor, or it is empty.
    """
    for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            if not leaf.shape[0]:
                raise TaskFailed("the batch has no rows; leave such batches out")
            return int(leaf.shape[0])
    raise TaskFailed("the batch holds no tensor with rows for the model")


def microbatch_rows(rows: int, microbatches: int) -> tuple[int, ...]:
    """Rows of each microbatch: as even as possible, larger ones first, none empty."""
    count = min(rows, microbatches)
    base, extra = divmod(rows, count)
    return tuple(base + (index < extra) for index in range(count))


def split_rows(batch: Batch, rows: Sequence[int]) -> list[Batch]:
    """Splits what has ``sum(rows)`` rows: tensors, arrays, and lists of other things; the rest goes to all.

    Raises:
        TaskFailed: the batch is an object that cannot be looked into.
    """
    total = sum(rows)
    known = (torch.Tensor, Mapping, list, tuple, type(None))  # None where no loss is computed
    if len(rows) > 1 and not isinstance(batch, known) and not is_dataclass(batch):
        raise TaskFailed(
            f"a batch of type {type(batch).__name__} cannot be split into microbatches; "
            "make it a tensor, tuple, dict or dataclass"
        )

    def has_rows(value: Any) -> bool:
        if isinstance(value, (torch.Tensor, np.ndarray)):
            return value.ndim > 0 and len(value) == total
        return isinstance(value, list) and len(value) == total and not _holds_tensors(value)

    ends = list(accumulate(rows))
    return [
        map_batch(lambda leaf, a=end - count, b=end: leaf[a:b] if has_rows(leaf) else leaf, batch, has_rows)
        for count, end in zip(rows, ends, strict=True)
    ]


def map_batch(
    function: Callable[[Any], Any], batch: Batch, is_leaf: Callable[[Any], bool] = lambda _: False
) -> Batch:
    """A copy of a batch with ``function`` applied to what its mappings, sequences and dataclasses hold."""
    if is_leaf(batch):
        return function(batch)
    if isinstance(batch, Mapping):
        mapped = {key: map_batch(function, value, is_leaf) for key, value in batch.items()}
        if not isinstance(batch, MutableMapping):
            return mapped
        made = copy.copy(batch)
        made.update(mapped)
        return made
    if isinstance(batch, (list, tuple)):
        items = [map_batch(function, item, is_leaf) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    if is_dataclass(batch) and not isinstance(batch, type):
        made = copy.copy(batch)
        for field in fields(batch):  # a frozen one, too; and without its __post_init__
            object.__setattr__(made, field.name, map_batch(function, getattr(batch, field.name), is_leaf))
        return made
    return function(batch)


def _holds_tensors(value: Any) -> bool:
    found: list[Any] = []
    map_batch(lambda leaf: found.append(leaf) if isinstance(leaf, torch.Tensor) else None, value)
    return bool(found)
