"""Moves parts of a model between live workers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from forescale.engine.train.holdings import Holdings, pack, unpack
from forescale.engine.train.peers import Peers
from forescale.plan.moves import holders, moves
from forescale.plan.partition_plan import PartitionPlan


def migrate(holdings: Holdings, peers: Peers, ranks: dict[str, int], before: PartitionPlan, after: PartitionPlan) -> int:
    """Sends what other workers gain and takes what this one does; drops what it no longer needs.

    One block of bytes goes to each worker that gains something from this one: headers, parameters,
    buffers and optimiser state together.

    Args:
        ranks: device name -> rank.

    Returns:
        Bytes sent.
    """
    graph = holdings.graph
    planned = moves(graph, before, after)
    me = peers.rank
    outgoing: dict[int, list[str]] = {}
    for move in planned:
        if ranks[move.source] == me:
            outgoing.setdefault(ranks[move.target], []).append(move.name)
    sources = sorted({ranks[move.source] for move in planned if ranks[move.target] == me})
    parcels = {rank: pack(holdings, names) for rank, names in outgoing.items()}
    sends = [peers.send(_length(parcel, peers), rank) for rank, parcel in parcels.items()]
    sends += [peers.send(parcel, rank) for rank, parcel in parcels.items()]
    for parcel in _arrivals(peers, sources):
        for name, value, state in unpack(parcel):
            holdings.hold(name, value, state)
    for work in sends:
        work.wait()
    device = next(name for name, rank in ranks.items() if rank == me)
    keeps = {name for name, devices in holders(graph, after).items() if device in devices}
    holdings.release([name for name in holdings.tensors if name not in keeps])
    return sum(parcel.numel() for parcel in parcels.values())


def _length(parcel: torch.Tensor, peers: Peers) -> torch.Tensor:
    return torch.tensor([parcel.numel()], device=peers.device)


def _arrivals(peers: Peers, sources: Sequence[int]) -> list[torch.Tensor]:
    lengths = [torch.empty(1, dtype=torch.int64, device=peers.device) for _ in sources]
    for work in [peers.receive(t, source) for t, source in zip(lengths, sources, strict=True)]:
        work.wait()
    parcels = [torch.empty(int(t.item()), dtype=torch.uint8, device=peers.device) for t in lengths]
    for work in [peers.receive(t, source) for t, source in zip(parcels, sources, strict=True)]:
        work.wait()
    return parcels
