"""Finds models whose forward depends on Python state that an earlier call left behind.

A trace sees one call. An attribute that the forward sets (a counter, a hidden state) keeps in the trace the
value it had then, so such a model would silently train as another one.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from forescale.core.errors import CaptureFailed

_Attributes = Mapping[tuple[str, str], Any]

# Kept by torch itself: parameters and buffers are compared by value, and the mode is set by the caller.
_OF_TORCH = frozenset(nn.Module().__dict__)


class Attributes:
    """What a model's modules hold beside parameters, buffers and modules.

    Attributes:
        changed: names of the attributes that were not the objects they had been, at the last look.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._before = self._now()
        self.changed: list[str] = []

    def _now(self) -> _Attributes:
        return {
            (path, name): value
            for path, module in self._modules.items()
            for name, value in module.__dict__.items()
            if name not in _OF_TORCH
        }

    def look(self) -> None:
        now, gone = self._now(), object()
        self.changed = [
            f"{path}.{name}".lstrip(".")
            for path, name in {**self._before, **now}
            if now.get((path, name), gone) is not self._before.get((path, name), gone)
        ]

    def restore(self) -> None:
        for path, name in self._now().keys() - self._before.keys():
            del self._modules[path].__dict__[name]
        for (path, name), value in self._before.items():
            self._modules[path].__dict__[name] = value


def refuse_memory(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    autocast: torch.dtype | None,
    suspects: Sequence[str] = ("an attribute",),
) -> None:
    """Calls the model twice, with the same weights, buffers and random numbers.

    Raises:
        CaptureFailed: the results differ.
    """
    kind = next(t.device.type for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
    with torch.no_grad(), torch.autocast(kind, autocast) if autocast else nullcontext(), _undone(model):
        first = _called(model, args, kwargs)
        second = _called(model, args, kwargs)
    if len(first) != len(second) or not all(
        a.shape == b.shape and torch.allclose(a, b, equal_nan=True)
        for a, b in zip(first, second, strict=True)
    ):
        raise CaptureFailed(
            f"its result depends on what an earlier call left in {', '.join(suspects[:3])}; "
            "make it a buffer (register_buffer)"
        )


def _called(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        output = model(*args, **kwargs)
    leaves = [t.clone() for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
    _reset(model, buffers)
    return leaves


def _reset(model: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    for name, value in buffers.items():
        model.get_buffer(name).copy_(value)


@contextmanager
def _undone(model: nn.Module) -> Generator[None]:
    """Takes back what calls change in the model, assigned buffers included."""
    attributes = Attributes(model)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    try:
        yield
    finally:
        attributes.restore()
        for name, buffer in buffers.items():
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, buffer)
