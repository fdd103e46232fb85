"""Batches of torch's models: arrays to tensors on a device, the model, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from forescale.core.cluster import Device, DeviceKind
from forescale.engine.serve.arrays import Array
from forescale.engine.serve.formats import Runner, at_once

if TYPE_CHECKING:
    import torch

    from forescale.engine.serve.formats.pipeline import Compute


def place_of(device: Device) -> torch.device:
    """Where a replica's process finds its device."""
    import torch

    return torch.device("cuda:0" if device.kind is DeviceKind.CUDA else "cpu")


def runner(device: Device, inputs: Sequence[str], outputs: Sequence[str], compute: Compute) -> Runner:
    """Run a model on a device.

    Args:
        inputs, outputs: names, in the order in which ``compute`` takes and gives tensors on the device.
    """
    import torch

    if device.kind is DeviceKind.CUDA:
        from forescale.engine.serve.formats.pipeline import Pipeline

        return Pipeline(place_of(device), inputs, outputs, compute).start

    def run(arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        with torch.inference_mode():  # the tensors share the arrays' memory
            tensors = compute([torch.from_numpy(arrays[name]) for name in inputs])
            return {name: tensor.numpy() for name, tensor in zip(outputs, tensors, strict=True)}

    return at_once(run)
