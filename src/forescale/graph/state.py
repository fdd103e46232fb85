"""The parameters, buffers and constants of a model."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from forescale.core.errors import CaptureFailed
from forescale.graph.model import Buffer, Parameter
from forescale.graph.node import dtype_name


class State:
    """A model's parameters, buffers and constants, each distinct tensor under one name.

    Attributes:
        names: name of every parameter and buffer, aliases included -> the name of the distinct tensor.
        placeholders: name of a node of the exported program -> kind and name.

    Raises:
        CaptureFailed: parameters share memory without being the same tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self.parameters: dict[str, Parameter] = {}
        self.buffers: dict[str, Buffer] = {}
        self.names: dict[str, str] = {}
        self.placeholders: dict[str, tuple[str, str]] = {}
        self._register_model(model)
        self._refuse_overlaps()

    def bind(self, exported: ExportedProgram) -> None:
        """Learns which placeholder of the exported program is which tensor."""
        signature = exported.graph_signature
        for placeholder, target in signature.inputs_to_parameters.items():
            self.placeholders[placeholder] = ("parameter", self.names[own_name(target)])
        for placeholder, target in signature.inputs_to_buffers.items():
            self.placeholders[placeholder] = ("buffer", self.names[own_name(target)])
        for placeholder, target in signature.inputs_to_lifted_tensor_constants.items():
            self._constant(placeholder, target, exported.constants[target])

    def _register_model(self, model: nn.Module) -> None:
        aliases: dict[int, list[str]] = {}
        values: dict[int, torch.Tensor] = {}
        entries = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        for name, value in entries:
            aliases.setdefault(id(value), []).append(name)
            values[id(value)] = value
        persistent = model.state_dict(keep_vars=True).keys()
        for key, names in aliases.items():
            value, first = values[key], names[0]
            self.values[first] = value
            self.names.update(dict.fromkeys(names, first))
            shape, dtype = tuple(value.shape), dtype_name(value.dtype)
            if isinstance(value, nn.Parameter):
                self.parameters[first] = Parameter(
                    name=first,
                    aliases=tuple(names[1:]),
                    shape=shape,
                    dtype=dtype,
                    trainable=value.requires_grad,
                )
            else:
                self.buffers[first] = Buffer(
                    name=first,
                    aliases=tuple(names[1:]),
                    shape=shape,
                    dtype=dtype,
                    persistent=any(name in persistent for name in names),
                )

    def _refuse_overlaps(self) -> None:
        """Two parameters in the same memory would part as soon as two workers hold them."""
        spans = sorted(
            (value.data_ptr(), value.data_ptr() + value.numel() * value.element_size(), name)
            for name, value in self.values.items()
            if name in self.parameters and value.numel() and not value.is_meta
        )
        for (_, end, first), (start, _, second) in pairwise(spans):
            if start < end:
                raise CaptureFailed(
                    f"the parameters {first} and {second} share memory but are different tensors; "
                    "tie them by assigning one and the same nn.Parameter to both"
                )

    def _constant(self, placeholder: str, target: str, value: Any) -> None:
        name = f"constant:{target}"
        self.values[name] = value
        self.buffers[name] = Buffer(
            name=name, aliases=(), shape=tuple(value.shape), dtype=dtype_name(value.dtype), persistent=False
        )
        self.placeholders[placeholder] = ("buffer", name)


def own_name(name: str | None) -> str:
    """The model's own name of something in the exported program, where the model is one level down."""
    return (name or "").removeprefix("model.")
