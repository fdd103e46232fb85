"""From accumulated gradients to an optimiser step, over all workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from forescale.engine.train.peers import Peers


def sum_tied(
    parameters: Mapping[str, nn.Parameter], holders: Mapping[str, Sequence[int]], peers: Peers
) -> None:
    """Adds up the gradients of parameters that several workers hold; every holder ends with the same sum.

    Args:
        holders: for every such parameter, the ranks that hold it, in pipeline order.
    """
    for name, ranks in holders.items():
        if peers.rank not in ranks:
            continue
        parameter = parameters[name]
        own = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        room = torch.contiguous_format  # whatever the layout of ``own``, it is sent like that
        others = {rank: torch.empty_like(own, memory_format=room) for rank in ranks if rank != peers.rank}
        works = [peers.receive(gradient, rank) for rank, gradient in others.items()]
        works += [peers.send(own, rank) for rank in others]
        for work in works:
            work.wait()
        # The same order everywhere, so that all holders stay equal to the bit.
        parts = [own if rank == peers.rank else others[rank] for rank in ranks]
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        parameter.grad = total


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
