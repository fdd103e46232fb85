"""Tensors between the stages of a plan, some of which may be on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.distributed import Work

Binding = Mapping[str, int]


class Connections(Protocol):
    """What the post needs of :class:`forescale.engine.train.peers.Peers`."""

    @property
    def rank(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def send(self, tensor: torch.Tensor, to: int, *, back: bool | None = None, tag: int = 0) -> Work: ...

    def receive(
        self, tensor: torch.Tensor, source: int, *, back: bool | None = None, tag: int = 0
    ) -> Work: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """One tensor of one microbatch on its way to a stage that reads it, or its gradient on its way back.

    Attributes:
        reader: position of the stage that reads the tensor.
    """

    name: str
    reader: int
    microbatch: int
    back: bool


class Post:
    """Sends and receives for all stages of a device.

    Devices that take turns send each other tensors ahead and gradients back in both directions and in no
    common order. There, what one device sends another is received in the order of sending, which both know,
    and each direction has a group of its own: NCCL tells messages apart by nothing else.

    Args:
        names: of all tensors that may be sent.
        shapes: tensor -> its sizes in a microbatch, for what this device sends or receives.
        dtypes: of the same.
    """

    def __init__(
        self,
        peers: Connections,
        *,
        names: Iterable[str],
        shapes: Mapping[str, Callable[[Binding], list[int]]],
        dtypes: Mapping[str, torch.dtype],
        stages: int,
        take_turns: bool,
    ) -> None:
        self._peers = peers
        self._number = {name: number for number, name in enumerate(names)}
        self._shapes, self._dtypes = shapes, dtypes
        self._stages = stages
        self._take_turns = take_turns
        self._bindings: Sequence[Binding] = ()
        self._incoming: dict[int, list[Letter]] = {}
        self._arriving: dict[Letter, tuple[Work, torch.Tensor]] = {}
        self._handed_over: dict[Letter, torch.Tensor] = {}

    def begin(self, bindings: Sequence[Binding], incoming: Mapping[int, Sequence[Letter]]) -> None:
        """Begins a step.

        Args:
            bindings: of the microbatches.
            incoming: if devices take turns: rank -> what it will send here, in that order.
        """
        self._bindings = bindings
        self._incoming = {rank: list(reversed(letters)) for rank, letters in incoming.items()}

    def expect(self, letter: Letter, source: int) -> None:
        """Starts receiving a letter, if it does not come from this device."""
        if source == self._peers.rank or letter in self._arriving:
            return
        if not self._take_turns:
            self._receive(letter, source)
            return
        incoming = self._incoming[source]
        while letter not in self._arriving:
            self._receive(incoming.pop(), source)

    def take(self, letter: Letter) -> torch.Tensor:
        """Waits for a letter that is expected."""
        if (tensor := self._handed_over.pop(letter, None)) is not None:
            return tensor
        work, tensor = self._arriving.pop(letter)
        work.wait()
        return tensor

    def send(self, letter: Letter, tensor: torch.Tensor, target: int) -> list[Work]:
        """Starts sending; nothing is left to wait for if the reader is here."""
        if target == self._peers.rank:
            self._handed_over[letter] = tensor
            return []
        return [self._peers.send(tensor, target, back=self._back(letter), tag=self._tag(letter))]

    def _receive(self, letter: Letter, source: int) -> None:
        sizes = self._shapes[letter.name](self._bindings[letter.microbatch])
        tensor = torch.empty(sizes, dtype=self._dtypes[letter.name], device=self._peers.device)
        work = self._peers.receive(tensor, source, back=self._back(letter), tag=self._tag(letter))
        self._arriving[letter] = work, tensor

    def _back(self, letter: Letter) -> bool | None:
        return None if self._take_turns else letter.back

    def _tag(self, letter: Letter) -> int:
        number = self._number[letter.name] + letter.microbatch * len(self._number)
        return (number * self._stages + letter.reader) * 2 + letter.back
