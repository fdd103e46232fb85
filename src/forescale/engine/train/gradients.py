"""From accumulated gradients to an optimiser step, over all workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from forescale.engine.train.peers import Peers

_BUCKET_BYTES = 16 << 20
"""Of gradients that travel together (Li et al., *PyTorch Distributed*, VLDB 2020)."""


def sum_shared(
    parameters: Mapping[str, nn.Parameter], holders: Mapping[str, Sequence[int]], peers: Peers
) -> None:
    """Adds up the gradients of parameters that several workers hold; every holder ends with the same sum.

    Args:
        holders: for every such parameter, the ranks that hold it, in pipeline order.
    """
    groups: dict[tuple[tuple[int, ...], torch.dtype], list[nn.Parameter]] = {}
    for name, ranks in holders.items():
        if peers.rank in ranks:
            groups.setdefault((tuple(ranks), parameters[name].dtype), []).append(parameters[name])
    for (ranks, _), group in groups.items():
        for bucket in _buckets(group):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            _sum_over(flat, ranks, peers)
            sizes = [parameter.numel() for parameter in bucket]
            for parameter, total in zip(bucket, flat.split(sizes), strict=True):
                parameter.grad = total.view(parameter.shape)


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours together, up to a size."""
    bucket: list[nn.Parameter] = []
    size_bytes = 0
    for parameter in parameters:
        if bucket and size_bytes + parameter.nbytes > _BUCKET_BYTES:
            yield bucket
            bucket, size_bytes = [], 0
        bucket.append(parameter)
        size_bytes += parameter.nbytes
    yield bucket


def _sum_over(flat: torch.Tensor, ranks: Sequence[int], peers: Peers) -> None:
    """Sums in place over workers: each adds up one piece and sends it to the others.

    Patarasuk and Yuan, *Bandwidth Optimal All-reduce Algorithms*, 2009, without their ring. One worker adds
    each piece, so that all holders stay equal to the bit.
    """
    pieces = dict(zip(ranks, flat.tensor_split(len(ranks)), strict=True))
    own = pieces[peers.rank]
    others = [rank for rank in ranks if rank != peers.rank]
    parts = {rank: torch.empty_like(own) for rank in others}
    _exchange({rank: pieces[rank] for rank in others}, parts, peers)
    parts[peers.rank] = own
    own.copy_(torch.stack([parts[rank] for rank in ranks]).sum(0))
    _exchange(dict.fromkeys(others, own), {rank: pieces[rank] for rank in others}, peers)


def _exchange(sent: Mapping[int, torch.Tensor], received: Mapping[int, torch.Tensor], peers: Peers) -> None:
    works = [peers.receive(tensor, rank) for rank, tensor in received.items() if tensor.numel()]
    works += [peers.send(tensor, rank) for rank, tensor in sent.items() if tensor.numel()]
    for work in works:
        work.wait()


def clip(owned: Sequence[nn.Parameter], held: Sequence[nn.Parameter], norm: float, peers: Peers) -> None:
    """Scales all gradients so that their global norm is at most ``norm``, as ``clip_grad_norm_`` does.

    Args:
        owned: parameters this worker counts (each parameter is counted by one worker).
        held: parameters whose gradients this worker scales.
    """
    gradients = [p.grad for p in owned if p.grad is not None]
    local = nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
    squared = peers.sum((local.to(peers.device, torch.float64) ** 2).reshape(1))
    total = squared.sqrt().to(local.dtype)[0]
    nn.utils.clip_grads_with_norm_([p for p in held if p.grad is not None], norm, total)
