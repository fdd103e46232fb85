"""Weights as safetensors, for an architecture that the options name; see ``architectures.py``.

Options: ``architecture`` and ``config``. Neither file nor options hold code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from forescale.core.cluster import Device
from forescale.core.errors import InvalidInput
from forescale.core.signature import Signature
from forescale.engine.serve.formats import LoadedModel, Order, declared_signature
from forescale.engine.serve.formats.architectures import architecture_of
from forescale.engine.serve.formats.transfer import place_of, runner

if TYPE_CHECKING:
    from torch import Tensor, nn


def inspect(order: Order) -> Signature:
    """The signature that was given: forward's arguments do not tell their shapes."""
    declared = declared_signature(order)
    architecture_of(order, declared)
    return declared


def load(order: Order, device: Device) -> LoadedModel:
    """Build the architecture and fill in the weights; every weight must be there, and no other."""
    declared = declared_signature(order)
    architecture = architecture_of(order, declared)
    model = architecture.build()
    _fill(model, _weights(order))
    model.eval().to(place_of(device))
    inputs, outputs = ([spec.name for spec in specs] for specs in (declared.inputs, declared.outputs))

    def compute(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        found = architecture.forward(model, dict(zip(inputs, tensors, strict=True)))
        return [found[name] for name in outputs]

    return LoadedModel(signature=declared, run=runner(device, inputs, outputs, compute))


def _weights(order: Order) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(order.path)
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{order.path.name} is no safetensors file ({error})") from error


def _fill(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    try:
        absent, unknown = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # shapes
        raise InvalidInput(
            f"the weights do not fit the config: {str(error).splitlines()[-1].strip()}"
        ) from error
    # A tied weight is saved under one of its names.
    filled = {
        id(weight) for name, weight in model.named_parameters(remove_duplicate=False) if name in weights
    }
    tied = {name for name, weight in model.named_parameters(remove_duplicate=False) if id(weight) in filled}
    missing = [name for name in absent if name not in tied]
    if missing or unknown:
        raise InvalidInput(
            f"the weights do not fit the config: {len(missing)} are missing {missing[:3]}, "
            f"{len(unknown)} are unknown {unknown[:3]}"
        )
