"""Moves parts of a model between live workers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed import Work

from forescale.engine.train.holdings import Holdings, large_slots, pack, read_block, unpack
from forescale.engine.train.peers import Peers
from forescale.graph.model import Parameter
from forescale.plan.moves import holders, moves
from forescale.plan.partition_plan import PartitionPlan


class Landing:
    """Memory for large tensors, touched before they arrive.

    The kernel hands out pages one fault at a time, which takes longer than receiving into them.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}

    def prepare(self, parameters: Iterable[Parameter], copies: int, device: torch.device) -> None:
        """Makes room for parameters with optimiser state: ``copies`` tensors of each one's shape."""
        for parameter in parameters:
            dtype = getattr(torch, parameter.dtype)
            for _ in range(copies):
                room = torch.empty(parameter.shape, dtype=dtype, device=device).fill_(0)
                self._free.setdefault((room.shape, dtype), []).append(room)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        free = self._free.get((torch.Size(shape), dtype))
        return free.pop() if free else torch.empty(shape, dtype=dtype, device=device)


def migrate(
    holdings: Holdings,
    peers: Peers,
    ranks: Mapping[str, int],
    before: PartitionPlan,
    after: PartitionPlan,
    landing: Landing,
) -> int:
    """Sends what other workers gain and takes what this one does; drops what it no longer needs.

    Each worker that gains something from this one is sent one block (a description and everything
    small), then the large tensors from where they lie: nothing large is copied on either side.

    Args:
        ranks: device name -> rank.

    Returns:
        Bytes sent.
    """
    graph = holdings.graph
    planned = moves(graph, before, after)
    outgoing: dict[int, list[str]] = {}
    for move in planned:
        if ranks[move.source] == peers.rank:
            outgoing.setdefault(ranks[move.target], []).append(move.name)
    sources = sorted({ranks[move.source] for move in planned if ranks[move.target] == peers.rank})
    parcels = {rank: pack(holdings, names) for rank, names in outgoing.items()}
    sends: list[Work] = []
    for rank, parcel in parcels.items():
        length = torch.tensor([parcel.block.numel()], device=peers.device)
        sends += [peers.send(tensor, rank) for tensor in (length, parcel.block, *parcel.large)]
    for name, value, state in _arrivals(peers, sources, landing):
        holdings.hold(name, value, state)
    for work in sends:
        work.wait()
    device = next(name for name, rank in ranks.items() if rank == peers.rank)
    keeps = {name for name, devices in holders(graph, after).items() if device in devices}
    holdings.release([name for name in holdings.tensors if name not in keeps])
    return sum(parcel.size_bytes for parcel in parcels.values())


def _arrivals(
    peers: Peers, sources: Sequence[int], landing: Landing
) -> list[tuple[str, torch.Tensor, dict[str, Any]]]:
    """Everything that is sent here; all sources send at the same time."""
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
    return [
        arrived
        for (entries, start), block, tensors in zip(described, blocks, large, strict=True)
        for arrived in unpack(entries, block, start, tensors)
    ]


def _receive(peers: Peers, sources: Sequence[int], tensors: Sequence[Sequence[torch.Tensor]]) -> None:
    works = [peers.receive(t, source) for source, ts in zip(sources, tensors, strict=True) for t in ts]
    for work in works:
        work.wait()
