"""Captures a chain of modules whose inside cannot be traced, as operators that are whole modules.

A module is taken apart where its forward does nothing but call its children one after the other, which
symbolic tracing of that forward alone proves: it fails at any branch on data or shape. The chain found is
then run beside the model, on the same random numbers, and must give the same result.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.func import functional_call

from forescale.graph.model import BufferUpdate, ModelGraph, Operator, Size, SymbolSource, Tensor
from forescale.graph.node import dtype_name
from forescale.graph.state import State

_ROWS = "rows"


class WholeModule:
    """A module as a function of its inputs, parameters and buffers.

    It returns its outputs' tensors and then the new values of its buffers; nothing is changed in place.
    """

    def __init__(
        self, module: nn.Module, parameters: Mapping[str, str], buffers: Mapping[str, str], autocast: torch.dtype | None
    ) -> None:
        self._module = module
        self._names = (*parameters, *buffers)
        self._buffers = tuple(buffers)
        self._autocast = autocast

    def __call__(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs, held = values[: -len(self._names) or None], values[len(values) - len(self._names) :]
        state = dict(zip(self._names, held, strict=True))
        state |= {name: state[name].clone() for name in self._buffers}
        kind = inputs[0].device.type
        with torch.autocast(kind, self._autocast) if self._autocast else nullcontext():
            output = functional_call(self._module, state, inputs)
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        return (*tensors, *(state[name].detach() for name in self._buffers))
