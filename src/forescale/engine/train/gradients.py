"""From accumulated gradients to an optimiser step, over all workers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from forescale.engine.train.collectives import sum_over
from forescale.engine.train.parts import cut, paste
from forescale.engine.train.peers import Peers
from forescale.graph.model import ModelGraph
from forescale.plan.extents import WHOLE, Extent
from forescale.plan.moves import Holding, gradient_sums, held_by

_BUCKET_BYTES = 16 << 20
"""Of gradients that travel together (Li et al., *PyTorch Distributed*, VLDB 2020)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedGradient:
    """A gradient, or the part of one, that several workers add up.

    Attributes:
        extent: where it lies in this worker's gradient.
        ranks: all that hold it, in pipeline order.
        adds: whether this worker's gradient counts; if not, it is in another's already.
    """

    name: str
    extent: Extent
    ranks: tuple[int, ...]
    adds: bool


def shared_gradients(
    graph: ModelGraph, held: Mapping[str, Sequence[Holding]], device: str, ranks: Mapping[str, int]
) -> tuple[SharedGradient, ...]:
    """The sums a device takes part in.

    Args:
        held: see :func:`forescale.plan.moves.holdings`.
        ranks: device name -> rank.
    """
    trainable = {n: h for n, h in held.items() if n in graph.parameters and graph.parameters[n].trainable}
    extents = held_by(trainable, device)
    return tuple(
        SharedGradient(
            name=one.name,
            extent=one.extent.within(extents[one.name]),
            ranks=tuple(ranks[d] for d in one.devices),
            adds=device in one.adding,
        )
        for one in gradient_sums(trainable)
        if device in one.devices
    )


def sum_shared(
    parameters: Mapping[str, nn.Parameter], shared: Iterable[SharedGradient], peers: Peers
) -> None:
    """Adds up the gradients of parameters that several workers hold; every holder ends with the same sum.

    Args:
        shared: what this worker takes part in, in the same order on all workers.
    """
    groups: dict[tuple[tuple[int, ...], torch.dtype], list[SharedGradient]] = {}
    for one in shared:
        groups.setdefault((one.ranks, parameters[one.name].dtype), []).append(one)
    for (ranks, _), group in groups.items():
        for bucket in _buckets(group, parameters):
            gradients = [_contribution(parameters[one.name], one) for one in bucket]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            sum_over(flat, ranks, peers)
            sizes = [gradient.numel() for gradient in gradients]
            for one, gradient, total in zip(bucket, gradients, flat.split(sizes), strict=True):
                _set(parameters[one.name], one.extent, total.view(gradient.shape))


def _contribution(parameter: nn.Parameter, one: SharedGradient) -> torch.Tensor:
    if one.adds and parameter.grad is not None:
        return cut(parameter.grad, one.extent)
    return parameter.new_zeros(one.extent.shape(parameter.shape))


def _set(parameter: nn.Parameter, extent: Extent, total: torch.Tensor) -> None:
    if extent == WHOLE:
        parameter.grad = total
        return
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    paste(parameter.grad, extent, total)


def _buckets(
    shared: Iterable[SharedGradient], parameters: Mapping[str, nn.Parameter]
) -> Iterator[list[SharedGradient]]:
    """Neighbours together, up to a size."""
    bucket: list[SharedGradient] = []
    bucket_bytes = 0
    for one in shared:
        parameter = parameters[one.name]
        size_bytes = math.prod(one.extent.shape(parameter.shape)) * parameter.element_size()
        if bucket and bucket_bytes + size_bytes > _BUCKET_BYTES:
            yield bucket
            bucket, bucket_bytes = [], 0
        bucket.append(one)
        bucket_bytes += size_bytes
    yield bucket


def clip(owned: Sequence[nn.Parameter], held: Sequence[nn.Parameter], norm: float, peers: Peers) -> None:
    """Scales all gradients so that their global norm is at most ``norm``, as ``clip_grad_norm_`` does.

    Args:
        owned: parameters this worker counts (each element of a parameter is counted by one worker).
        held: parameters whose gradients this worker scales.
    """
    gradients = [p.grad for p in owned if p.grad is not None]
    local = nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
    squared = peers.sum((local.to(peers.device, torch.float64) ** 2).reshape(1))
    total = squared.sqrt().to(local.dtype)[0]
    nn.utils.clip_grads_with_norm_([p for p in held if p.grad is not None], norm, total)
