"""What the shards of one replica tell each other: sums and gathers within a forward and its backward.

Shoeybi et al., *Megatron-LM*, 2019, §3: ``spread`` and ``total`` are its conjugate operators f and g.
Shards may have parts of different sizes.

All shards of a replica run the same collectives in the same order: their operators differ in sizes alone,
they run the same microbatches in the same order, and autograd goes back through operators in the reverse of
the order they were called in. Two shards of one replica send each other nothing else during a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.autograd import Function

from forescale.engine.train.peers import Peers
from forescale.engine.train.stopwatch import Activity, Stopwatch

_TAG = 1 << 30
"""Above the tags of all tensors that travel between stages."""


def sum_over(flat: torch.Tensor, ranks: Sequence[int], peers: Peers, *, tag: int = 0) -> None:
    """Sums in place over workers: each adds up one piece and sends it to the others.

    Patarasuk and Yuan, *Bandwidth Optimal All-reduce Algorithms*, 2009, without their ring. One worker adds
    each piece, so that all holders stay equal to the bit. Two workers send each other everything, which is
    no more and takes half as many turns: a sum of two numbers is the same everywhere.
    """
    others = [rank for rank in ranks if rank != peers.rank]
    if len(others) == 1:
        other = torch.empty_like(flat)
        exchange(dict.fromkeys(others, flat), dict.fromkeys(others, other), peers, tag=tag)
        flat.add_(other)
        return
    pieces = dict(zip(ranks, flat.tensor_split(len(ranks)), strict=True))
    own = pieces[peers.rank]
    parts = {rank: torch.empty_like(own) for rank in others}
    exchange({rank: pieces[rank] for rank in others}, parts, peers, tag=tag)
    parts[peers.rank] = own
    own.copy_(torch.stack([parts[rank] for rank in ranks]).sum(0))
    exchange(dict.fromkeys(others, own), {rank: pieces[rank] for rank in others}, peers, tag=tag)


def exchange(
    sent: Mapping[int, torch.Tensor], received: Mapping[int, torch.Tensor], peers: Peers, *, tag: int = 0
) -> None:
    """Sends to and receives from several workers at once."""
    works = [peers.receive(tensor, rank, tag=tag) for rank, tensor in received.items() if tensor.numel()]
    works += [peers.send(tensor, rank, tag=tag) for rank, tensor in sent.items() if tensor.numel()]
    for work in works:
        work.wait()


@dataclass(frozen=True, slots=True)
class Shards:
    """The workers that run the shards of one replica, in order.

    Time in its methods counts as waiting for other workers, whatever it is part of.
    """

    ranks: Sequence[int]
    peers: Peers
    stopwatch: Stopwatch

    def operators(self) -> Mapping[str, Callable[..., torch.Tensor]]:
        """What the targets that :func:`forescale.graph.sharding.shard_operators` inserts stand for."""
        return {
            "collective:spread": lambda x: _Spread.apply(x, self),
            "collective:total": lambda x: _Total.apply(x, self),
            "collective:gather": lambda x, *parts: _Gather.apply(x, self, _Parts(*parts)),
            "collective:part": lambda x, *parts: _Part.apply(x, self, _Parts(*parts)),
        }

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all shards."""
        with self.stopwatch.time(Activity.WAIT):
            whole = x.clone(memory_format=torch.contiguous_format)
            sum_over(whole.view(-1), self.ranks, self.peers, tag=_TAG)
        return whole

    def gather(self, own: torch.Tensor, parts: _Parts) -> torch.Tensor:
        """The whole of which every shard has a part."""
        with self.stopwatch.time(Activity.WAIT):
            pieces = {
                rank: own.new_empty(parts.shape(own.shape, index)) for index, rank in enumerate(self.ranks)
            }
            received = {rank: piece for rank, piece in pieces.items() if rank != self.peers.rank}
            pieces[self.peers.rank] = own.reshape(pieces[self.peers.rank].shape).contiguous()
            exchange(dict.fromkeys(received, pieces[self.peers.rank]), received, self.peers, tag=_TAG)
            whole = torch.cat([pieces[rank] for rank in self.ranks], parts.axis + 1)
        return whole.flatten(parts.axis, parts.axis + 1)

    def part(self, whole: torch.Tensor, parts: _Parts) -> torch.Tensor:
        """This shard's part of a whole that every shard has."""
        index = self.ranks.index(self.peers.rank)
        start, stop = (bound * parts.inner for bound in parts.bounds[index : index + 2])
        split = whole.unflatten(parts.axis, (parts.outer, -1))
        return split[(slice(None),) * (parts.axis + 1) + (slice(start, stop),)].flatten(
            parts.axis, parts.axis + 1
        )


@dataclass(frozen=True, slots=True)
class _Parts:
    """How an axis is divided: it is seen as ``outer`` x units x ``inner``; bounds of the parts in units."""

    axis: int
    outer: int
    inner: int
    bounds: Sequence[int]

    def shape(self, own: Sequence[int], index: int) -> list[int]:
        """Shape of another shard's part, the axis split, from that of one's own."""
        sizes = [(stop - start) * self.inner for start, stop in pairwise(self.bounds)]
        return [*own[: self.axis], self.outer, sizes[index], *own[self.axis + 1 :]]


class _Spread(Function):
    """Every shard reads the whole; gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shards: Shards) -> torch.Tensor:
        ctx.shards = shards
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return ctx.shards.total(gradients[0]), None


class _Total(Function):
    """Partial results are summed; every shard has the gradient of the sum."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor, shards: Shards) -> torch.Tensor:
        return shards.total(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # noqa: ARG004 - its name is autograd's
        return gradients[0], None


class _Gather(Function):
    """Every shard gets the whole, and takes its part of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shards: Shards, parts: _Parts) -> torch.Tensor:
        ctx.shards, ctx.parts = shards, parts
        return shards.gather(x, parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return ctx.shards.part(gradients[0], ctx.parts), None, None


class _Part(Function):
    """Every shard goes on with its part, and gets the whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shards: Shards, parts: _Parts) -> torch.Tensor:
        ctx.shards, ctx.parts = shards, parts
        return shards.part(x, parts).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return ctx.shards.gather(gradients[0], ctx.parts), None, None
