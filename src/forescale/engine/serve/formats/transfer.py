"""Arrays to tensors on a device and back.

To and from a GPU they go through pinned memory, which the GPU reads and writes itself: all inputs, the model
and all outputs are queued at once, and waited for once. torch keeps pinned memory for the next batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from forescale.core.cluster import Device, DeviceKind
from forescale.engine.serve.arrays import Array

if TYPE_CHECKING:
    import torch


class Transfer:
    """Between this process's memory and a device."""

    def __init__(self, device: Device) -> None:
        import torch

        self._is_cuda = device.kind is DeviceKind.CUDA
        self.place = torch.device("cuda:0" if self._is_cuda else "cpu")

    def tensor(self, array: Array) -> torch.Tensor:
        """On a CPU it shares the array's memory."""
        import torch

        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.place, non_blocking=True) if self._is_cuda else tensor

    def arrays(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> Mapping[str, Array]:
        """By name, when all that was queued has been done."""
        import torch

        if self._is_cuda:
            pinned = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
            for host, tensor in zip(pinned, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            torch.cuda.current_stream().synchronize()
            tensors = pinned
        return {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
