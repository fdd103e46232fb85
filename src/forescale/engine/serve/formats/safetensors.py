"""Weights as safetensors, for an architecture that the options name; see ``architectures.py``.

Options: ``architecture`` and ``config``. Neither file nor options hold code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from forescale.core.cluster import Device
from forescale.core.errors import InvalidInput
from forescale.core.signature import Signature
from forescale.engine.serve.arrays import Array
from forescale.engine.serve.formats import LoadedModel, Order, declared_signature
from forescale.engine.serve.formats.architectures import architecture_of
from forescale.engine.serve.formats.transfer import Transfer

if TYPE_CHECKING:
    from torch import Tensor, nn


def inspect(order: Order) -> Signature:
    """The signature that was given: forward's arguments do not tell their shapes."""
    declared = declared_signature(order)
    architecture_of(order, declared)
    return declared


def load(order: Order, device: Device) -> LoadedModel:
    """Build the architecture and fill in the weights; every weight must be there, and no other."""
    import torch

    declared = declared_signature(order)
    architecture = architecture_of(order, declared)
    transfer = Transfer(device)
    model = architecture.build()
    _fill(model, _weights(order))
    model.eval().to(transfer.place)
    names = [spec.name for spec in declared.outputs]

    def run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        with torch.inference_mode():
            tensors = {name: transfer.tensor(array) for name, array in inputs.items()}
            outputs = architecture.forward(model, tensors)
            return transfer.arrays(names, [outputs[name] for name in names])

    return LoadedModel(signature=declared, run=run)


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
