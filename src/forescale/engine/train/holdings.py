"""The tensors one worker holds: parameters with their optimiser state, and buffers."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from forescale.engine.train.optimizer import WorkerOptimizer
from forescale.engine.train.parts import cut, cut_state, owning
from forescale.graph.model import ModelGraph
from forescale.plan.extents import WHOLE, Extent

_ALIGNMENT_BYTES = 64
_LARGE_BYTES = 1 << 18  # from here on, a message of its own costs less than a copy


@dataclass(frozen=True, slots=True)
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

    def hold_part(self, name: str, whole: torch.Tensor, state: dict[str, Any], extent: Extent) -> None:
        """Takes over an extent of a whole parameter or buffer."""
        if extent == WHOLE:
            self.hold(name, whole, state)
            return
        parts = {
            k: owning(v) if isinstance(v, torch.Tensor) else v
            for k, v in cut_state(state, whole, extent).items()
        }
        self.hold(name, owning(cut(whole, extent)), parts)

    def release(self, names: Iterable[str]) -> None:
        gone = [self.tensors.pop(name) for name in names]
        self.optimizer.release(p for p in gone if isinstance(p, nn.Parameter))

    def size_bytes(self) -> int:
        """Parameters, buffers and optimiser state."""
        states = [v for n in self.tensors for v in self.state(n).values() if isinstance(v, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in (*self.tensors.values(), *states))

    def trainable(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.tensors.items() if isinstance(p, nn.Parameter) and p.requires_grad}

    def state(self, name: str) -> dict[str, Any]:
        """Optimiser state of a parameter; empty for buffers and before the first step."""
        tensor = self.tensors[name]
        return self.optimizer.state(tensor) if isinstance(tensor, nn.Parameter) else {}

    def part(self, name: str, extent: Extent) -> tuple[torch.Tensor, dict[str, Any]]:
        """A extent of what is held, with its optimiser state, where possible as views."""
        whole = self.tensors[name].detach()
        return cut(whole, extent), cut_state(self.state(name), whole, extent)


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor on its way; ``on_host`` for state that the optimizer keeps on the CPU.

    ``offset`` is its place among the small tensors, None if it travels by itself.
    """

    offset: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    on_host: bool

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def within(self, block: torch.Tensor, start: int) -> torch.Tensor:
        assert self.offset is not None
        first = start + self.offset
        return block[first : first + self.size_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Parcel:
    """Tensors with their optimiser state, ready to be sent.

    Large tensors are sent from where they lie; one block of bytes holds a description and all small ones.
    """

    block: torch.Tensor
    large: tuple[torch.Tensor, ...]

    @property
    def size_bytes(self) -> int:
        return self.block.numel() + sum(t.numel() * t.element_size() for t in self.large)


Entry = tuple[str, Slot, dict[str, Any]]


def pack(holdings: Holdings, wanted: Iterable[tuple[str, Extent]]) -> Parcel:
    """Gathers what another worker is to be sent: names, and how much of what is held under them."""
    entries: list[Entry] = []
    small: list[tuple[Slot, torch.Tensor]] = []
    large: list[torch.Tensor] = []
    offset = 0

    def place(tensor: torch.Tensor) -> Slot:
        nonlocal offset
        on_host = tensor.device != holdings.device
        size_bytes = tensor.numel() * tensor.element_size()
        if size_bytes >= _LARGE_BYTES and not on_host:
            large.append(tensor.contiguous())
            return Slot(None, tuple(tensor.shape), tensor.dtype, on_host)
        slot = Slot(offset, tuple(tensor.shape), tensor.dtype, on_host)
        offset += _aligned(size_bytes)
        small.append((slot, tensor))
        return slot

    for name, extent in wanted:
        value, states = holdings.part(name, extent)
        slot = place(value)
        state = {k: place(v) if isinstance(v, torch.Tensor) else v for k, v in states.items()}
        entries.append((name, slot, state))
    header = pickle.dumps(entries)
    prefix = len(header).to_bytes(8, "little") + header
    start = _aligned(len(prefix))
    block = torch.empty(start + offset, dtype=torch.uint8, device=holdings.device)
    block[: len(prefix)].copy_(torch.frombuffer(bytearray(prefix), dtype=torch.uint8))
    for slot, tensor in small:
        slot.within(block, start).copy_(tensor)
    return Parcel(block, tuple(large))


def read_block(block: torch.Tensor) -> tuple[list[Entry], int]:
    """The description in a parcel's block, and where its small tensors start."""
    length = int.from_bytes(bytes(block[:8].tolist()), "little")
    entries: list[Entry] = pickle.loads(block[8 : 8 + length].cpu().numpy().tobytes())  # noqa: S301 - from our own worker
    return entries, _aligned(8 + length)


def large_slots(entries: Iterable[Entry]) -> list[Slot]:
    """The tensors that travel by themselves, in the order they are sent."""
    return [
        slot
        for _, value, state in entries
        for slot in (value, *(s for s in state.values() if isinstance(s, Slot)))
        if slot.offset is None
    ]


def unpack(
    entries: Iterable[Entry], block: torch.Tensor, start: int, large: Iterable[torch.Tensor]
) -> Iterable[tuple[str, torch.Tensor, dict[str, Any]]]:
    """Name, value and optimiser state of everything in a parcel, as tensors of their own."""
    arrived = iter(large)

    def taken(slot: Slot) -> torch.Tensor:
        if slot.offset is None:
            return next(arrived)
        return slot.within(block, start).to("cpu" if slot.on_host else block.device, copy=True)

    for name, value, state in entries:
        yield name, taken(value), {k: taken(v) if isinstance(v, Slot) else v for k, v in state.items()}


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
