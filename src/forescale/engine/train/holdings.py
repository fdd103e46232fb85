"""The tensors one worker holds: parameters with their optimiser state, and buffers."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from forescale.engine.train.optimizer import WorkerOptimizer
from forescale.graph.model import ModelGraph

_ALIGNMENT_BYTES = 64


@dataclass(slots=True)
class Holdings:
    """Everything of the model that lives on one worker.

    Attributes:
        tensors: parameters and buffers by name. Replaced values are assigned, never copied into:
            autograd may still hold the old ones.
    """

    graph: ModelGraph
    optimizer: WorkerOptimizer
    device: torch.device
    tensors: dict[str, torch.Tensor]

    def hold(self, name: str, value: torch.Tensor, state: dict[str, Any] | None = None) -> None:
        """Takes over a parameter or buffer."""
        value = value.to(self.device)
        if (parameter := self.graph.parameters.get(name)) is None:
            self.tensors[name] = value
            return
        held = nn.Parameter(value, requires_grad=parameter.trainable)
        self.tensors[name] = held
        self.optimizer.hold(name, held, state)

    def release(self, names: Iterable[str]) -> None:
        gone = [self.tensors.pop(name) for name in names]
        self.optimizer.release(p for p in gone if isinstance(p, nn.Parameter))

    def trainable(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.tensors.items() if isinstance(p, nn.Parameter) and p.requires_grad}

    def state(self, name: str) -> dict[str, Any]:
        """Optimiser state of a parameter; empty for buffers and before the first step."""
        tensor = self.tensors[name]
        return self.optimizer.state(tensor) if isinstance(tensor, nn.Parameter) else {}


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a tensor lies in a parcel; ``on_host`` for state that the optimizer keeps on the CPU."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    on_host: bool


def pack(holdings: Holdings, names: Iterable[str]) -> torch.Tensor:
    """Puts tensors with their optimiser state into one block of bytes on the device."""
    entries: list[tuple[str, _Slot, dict[str, Any]]] = []
    tensors: list[tuple[_Slot, torch.Tensor]] = []
    offset = 0

    def place(tensor: torch.Tensor) -> _Slot:
        nonlocal offset
        slot = _Slot(offset, tuple(tensor.shape), tensor.dtype, tensor.device != holdings.device)
        offset += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        tensors.append((slot, tensor))
        return slot

    for name in names:
        state = {k: place(v) if isinstance(v, torch.Tensor) else v for k, v in holdings.state(name).items()}
        entries.append((name, place(holdings.tensors[name].detach()), state))
    header = pickle.dumps(entries)
    start = -(-(8 + len(header)) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    parcel = torch.empty(start + offset, dtype=torch.uint8, device=holdings.device)
    prefix = len(header).to_bytes(8, "little") + header
    parcel[: len(prefix)].copy_(torch.frombuffer(bytearray(prefix), dtype=torch.uint8))
    for slot, tensor in tensors:
        _view(parcel[start:], slot).copy_(tensor)
    return parcel


def unpack(parcel: torch.Tensor) -> Iterable[tuple[str, torch.Tensor, dict[str, Any]]]:
    """Name, value and optimiser state of everything in a parcel, as tensors of their own."""
    length = int.from_bytes(bytes(parcel[:8].tolist()), "little")
    start = -(-(8 + length) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    entries: list[tuple[str, _Slot, Mapping[str, Any]]] = pickle.loads(parcel[8 : 8 + length].cpu().numpy().tobytes())  # noqa: S301 - from our own worker
    for name, slot, state in entries:
        yield (
            name,
            _view(parcel[start:], slot).clone(),
            {k: _taken(parcel[start:], v) if isinstance(v, _Slot) else v for k, v in state.items()},
        )


def _view(block: torch.Tensor, slot: _Slot) -> torch.Tensor:
    size_bytes = torch.Size(slot.shape).numel() * slot.dtype.itemsize
    return block[slot.offset : slot.offset + size_bytes].view(slot.dtype).view(slot.shape)


def _taken(block: torch.Tensor, slot: _Slot) -> torch.Tensor:
    view = _view(block, slot)
    return view.cpu() if slot.on_host and block.device.type != "cpu" else view.clone()
