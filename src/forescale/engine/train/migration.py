"""Moves parts of a model between live workers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import Work

from forescale.engine.train.holdings import Holdings, large_slots, pack, read_block, unpack
from forescale.engine.train.parts import alike, owning, paste
from forescale.engine.train.peers import Peers
from forescale.graph.model import ModelGraph
from forescale.plan.extents import WHOLE, Extent
from forescale.plan.moves import Holding, Move, gathered, held_by, transfers
from forescale.plan.moves import holdings as held_under
from forescale.plan.partition_plan import PartitionPlan

Held = Mapping[str, Sequence[Holding]]
"""Holders of every tensor by its name."""

Value = tuple[torch.Tensor, dict[str, Any]]
"""A parameter or buffer, or a part of one, with its optimiser state."""


class Landing:
    """Memory for large tensors, touched before they arrive.

    The kernel hands out pages one fault at a time, which takes longer than receiving into them.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}

    def prepare(self, shape: Sequence[int], dtype: torch.dtype, copies: int, device: torch.device) -> None:
        """Makes room for so many tensors of one shape."""
        for _ in range(copies):
            room = torch.empty(shape, dtype=dtype, device=device).fill_(0)
            self._free.setdefault((room.shape, dtype), []).append(room)

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        free = self._free.get((torch.Size(shape), dtype))
        return free.pop() if free else torch.empty(shape, dtype=dtype, device=device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """From one distribution of the model to another, as one device sees it.

    Attributes:
        moves: all devices' moves.
        before, after: how much of each tensor this device holds.
    """

    device: str
    moves: tuple[Move, ...]
    before: Mapping[str, Extent]
    after: Mapping[str, Extent]

    @classmethod
    def of(cls, graph: ModelGraph, device: str, before: Held, after: Held) -> Change:
        return cls(
            device=device,
            moves=transfers(graph, before, after),
            before=held_by(before, device),
            after=held_by(after, device),
        )

    @classmethod
    def between(cls, graph: ModelGraph, device: str, before: PartitionPlan, after: PartitionPlan) -> Change:
        return cls.of(graph, device, held_under(graph, before), held_under(graph, after))

    @property
    def made(self) -> tuple[str, ...]:
        """What this device holds afterwards and did not hold, or held more or less of."""
        return tuple(name for name, extent in self.after.items() if self.before.get(name) != extent)

    def arriving(self) -> Mapping[str, list[Move]]:
        """By name, in the order of the moves."""
        found: dict[str, list[Move]] = {}
        for move in self.moves:
            if move.target == self.device:
                found.setdefault(move.name, []).append(move)
        return found

    def make_room(self, graph: ModelGraph, copies: int, landing: Landing, place: torch.device) -> None:
        """Prepares the landing of what will arrive.

        Args:
            copies: tensors of a parameter's shape, itself and its optimiser state.
        """
        arriving = self.arriving()
        for name in self.made:
            if (parameter := graph.parameters.get(name)) is None:
                continue
            extents = [move.extent for move in arriving.get(name, [])]
            if extents != [self.after[name]]:  # it is put together from parts
                extents.append(self.after[name])
            for extent in extents:
                landing.prepare(extent.shape(parameter.shape), getattr(torch, parameter.dtype), copies, place)


def migrate(
    holdings: Holdings, peers: Peers, ranks: Mapping[str, int], change: Change, landing: Landing
) -> int:
    """Sends what other workers gain and takes what this one does; drops what it no longer needs.

    Args:
        ranks: device name -> rank.

    Returns:
        Bytes sent.
    """
    values, sent_bytes = exchanged(holdings, peers, ranks, change, landing)
    holdings.release([n for n in holdings.tensors if n not in change.after or n in values])
    for name, (value, state) in values.items():
        holdings.hold(name, value, state)
    return sent_bytes


def whole_values(
    holdings: Holdings, peers: Peers, ranks: Mapping[str, int], device: str, plan: PartitionPlan
) -> Mapping[str, Value]:
    """What this device writes of the model's state, put together where its stage's shards split it."""
    buffers = holdings.graph.buffers
    held = held_under(holdings.graph, plan)
    have = {n: holders for n, holders in held.items() if n not in buffers or buffers[n].persistent}
    change = Change.of(holdings.graph, device, have, gathered(have))
    values, _ = exchanged(holdings, peers, ranks, change, Landing())
    return {name: values[name] if name in values else holdings.part(name, WHOLE) for name in change.after}


def exchanged(
    holdings: Holdings, peers: Peers, ranks: Mapping[str, int], change: Change, landing: Landing
) -> tuple[Mapping[str, Value], int]:
    """What this worker is to hold instead of, or beside, what it holds; and the bytes it sent to others.

    Each worker that gains something from this one is sent one block (a description and everything
    small), then the large tensors from where they lie: nothing large is copied on either side, unless it is
    put together from parts.
    """
    outgoing: dict[int, list[tuple[str, Extent]]] = {}
    for move in change.moves:
        if move.source == change.device:
            part = move.extent.within(change.before[move.name])
            outgoing.setdefault(ranks[move.target], []).append((move.name, part))
    arriving = change.arriving()
    sources = sorted({ranks[move.source] for several in arriving.values() for move in several})
    parcels = {rank: pack(holdings, wanted) for rank, wanted in outgoing.items()}
    sends: list[Work] = []
    for rank, parcel in parcels.items():
        length = torch.tensor([parcel.block.numel()], device=peers.device)
        sends += [peers.send(tensor, rank) for tensor in (length, parcel.block, *parcel.large)]
    arrived = _arrivals(peers, sources, landing)
    values: dict[str, Value] = {}
    for name in change.made:
        parts = [(move.extent, arrived[ranks[move.source], name]) for move in arriving.get(name, [])]
        values[name] = _put_together(name, parts, holdings, change, landing)
    for work in sends:
        work.wait()
    return values, sum(parcel.size_bytes for parcel in parcels.values())


def _put_together(
    name: str,
    parts: list[tuple[Extent, Value]],
    holdings: Holdings,
    change: Change,
    landing: Landing,
) -> Value:
    """One tensor from the parts that arrived and what is kept."""
    wanted, own = change.after[name], change.before.get(name)
    if [extent for extent, _ in parts] == [wanted]:
        return parts[0][1]
    if own is not None and (kept := own.meet(wanted)) is not None:
        parts = [(kept, holdings.part(name, kept.within(own))), *parts]
    tensor = (holdings.graph.parameters.get(name) or holdings.graph.buffers[name]).shape
    shape = wanted.shape(tensor)

    def joined(pieces: Iterable[tuple[Extent, torch.Tensor]]) -> torch.Tensor:
        found = list(pieces)
        first = found[0][1]
        if len(found) == 1:
            return owning(first)
        whole = landing.take(shape, first.dtype, first.device)
        for extent, piece in found:
            paste(whole, extent.within(wanted), piece)
        return whole

    _, (first, first_state) = parts[0]
    state = {
        key: joined((extent, state[key]) for extent, (_, state) in parts) if alike(value, first) else value
        for key, value in first_state.items()
    }
    return joined((extent, value) for extent, (value, _) in parts), state


def _arrivals(peers: Peers, sources: Sequence[int], landing: Landing) -> dict[tuple[int, str], Value]:
    """Everything that is sent here, by source and name; all sources send at the same time."""
    lengths = [torch.empty(1, dtype=torch.int64, device=peers.device) for _ in sources]
    _receive(peers, sources, [[length] for length in lengths])
    blocks = [torch.empty(int(t.item()), dtype=torch.uint8, device=peers.device) for t in lengths]
    _receive(peers, sources, [[block] for block in blocks])
    described = [read_block(block) for block in blocks]
    large = [
        [landing.take(slot.shape, slot.dtype, peers.device) for slot in large_slots(entries)]
        for entries, _ in described
    ]
    _receive(peers, sources, large)
    return {
        (source, name): (value, state)
        for source, (entries, start), block, tensors in zip(sources, described, blocks, large, strict=True)
        for name, value, state in unpack(entries, block, start, tensors)
    }


def _receive(peers: Peers, sources: Sequence[int], tensors: Sequence[Sequence[torch.Tensor]]) -> None:
    works = [peers.receive(t, source) for source, ts in zip(sources, tensors, strict=True) for t in ts]
    for work in works:
        work.wait()
