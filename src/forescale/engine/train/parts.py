"""Cuts extents out of tensors and puts them together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch

from forescale.plan.extents import WHOLE, Extent


def cut(tensor: torch.Tensor, extent: Extent) -> torch.Tensor:
    """The elements of an extent; where possible, a view."""
    for axis, spans in extent.axes:
        pieces = [tensor.narrow(axis, start, stop - start) for start, stop in spans]
        tensor = torch.cat(pieces, axis) if len(pieces) > 1 else pieces[0]
    return tensor


def paste(tensor: torch.Tensor, extent: Extent, value: torch.Tensor) -> None:
    """Sets the elements of an extent."""
    for spans in product(*(_placed(spans) for _, spans in extent.axes)):
        target, source = tensor, value
        for (axis, _), (start, offset, length) in zip(extent.axes, spans, strict=True):
            target, source = target.narrow(axis, start, length), source.narrow(axis, offset, length)
        target.copy_(source)


def _placed(spans: tuple[tuple[int, int], ...]) -> Iterator[tuple[int, int, int]]:
    """Start, where it is among all spans, and length of each."""
    offset = 0
    for start, stop in spans:
        yield start, offset, stop - start
        offset += stop - start


def cut_state(state: Mapping[str, Any], value: torch.Tensor, extent: Extent) -> dict[str, Any]:
    """Optimiser state of an extent of the parameter ``value``: what is like it is cut, the rest stays."""
    if extent == WHOLE:
        return dict(state)
    return {key: cut(held, extent) if alike(held, value) else held for key, held in state.items()}


def owning(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory of its own, without what it was cut from."""
    return tensor.clone(memory_format=torch.contiguous_format)


def alike(held: object, value: torch.Tensor) -> bool:
    """Whether what an optimizer holds for a parameter has a number for each of its elements."""
    return isinstance(held, torch.Tensor) and held.shape == value.shape
