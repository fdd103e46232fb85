"""Sums of gradients over workers, with threads for workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from forescale.engine.train.gradients import SharedGradient, sum_shared
from forescale.plan.extents import WHOLE, Extent
from unit.engine.threads import on_workers

SHAPES = {"tied": (3, 5), "large": (4_500_000,), "small": (7,), "one": (1,), "wide": torch.Size((2, 3, 4, 4))}
HOLDERS = {"tied": (0, 2), "large": (0, 1, 2), "small": (0, 1, 2), "one": (0, 1, 2), "wide": (1, 2)}


def gradient(name: str, rank: int) -> torch.Tensor:
    value = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(rank))
    return value.to(memory_format=torch.channels_last) if name == "wide" else value


def held(rank: int) -> dict[str, nn.Parameter]:
    parameters = {n: nn.Parameter(torch.zeros(SHAPES[n])) for n, ranks in HOLDERS.items() if rank in ranks}
    for name, parameter in parameters.items():
        if (name, rank) != ("small", 1):  # a replica without a microbatch has none
            parameter.grad = gradient(name, rank)
    return parameters


def summed(
    owned: Sequence[Mapping[str, nn.Parameter]], shared: Sequence[Sequence[SharedGradient]]
) -> list[Any]:
    """Adds up what workers hold; returns them."""
    _, workers = on_workers(
        len(owned), lambda peers: sum_shared(owned[peers.rank], shared[peers.rank], peers)
    )
    return workers


def test_every_holder_ends_with_the_same_sum_to_the_bit() -> None:
    owned = [held(rank) for rank in range(3)]
    shared = [
        [
            SharedGradient(name=name, extent=WHOLE, ranks=ranks, adds=True)
            for name, ranks in HOLDERS.items()
            if rank in ranks
        ]
        for rank in range(3)
    ]
    workers = summed(owned, shared)
    for name, ranks in HOLDERS.items():
        parts = [gradient(name, rank) for rank in ranks if (name, rank) != ("small", 1)]
        sums = [owned[rank][name].grad for rank in ranks]
        torch.testing.assert_close(sums[0], torch.stack(parts).sum(0), check_stride=False)
        assert all(torch.equal(sums[0], other) for other in sums[1:])  # type: ignore[arg-type]
    # Everybody adds up a third and sends it on: 4/3 of what all hold, not twice as much.
    assert workers[0].sent_bytes < 1.4 * 4 * (4_500_000 + 100)


def test_a_whole_parameter_and_its_parts_are_added_up() -> None:
    """The first worker holds two rows, the second the third; two more, of one replica, hold all."""
    top, rest = Extent(((0, ((0, 2),)),)), Extent(((0, ((2, 3),)),))
    parameters = [nn.Parameter(torch.zeros(rows, 4)) for rows in (2, 1, 3, 3)]
    values = torch.arange(12.0).view(3, 4)
    for parameter, own in zip(parameters, (values[:2], values[2:], 100 * values, 100 * values), strict=True):
        parameter.grad = own.clone()

    def part(extent: Extent, *ranks: int, adds: bool = True) -> SharedGradient:
        return SharedGradient(name="w", extent=extent, ranks=ranks, adds=adds)

    shared = [
        [part(WHOLE, 0, 2, 3)],
        [part(WHOLE, 1, 2, 3)],
        [part(top, 0, 2, 3), part(rest, 1, 2, 3)],
        [part(top, 0, 2, 3, adds=False), part(rest, 1, 2, 3, adds=False)],
    ]
    summed([{"w": parameter} for parameter in parameters], shared)
    for parameter, expected in zip(parameters, (values[:2], values[2:], values, values), strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, 101 * expected)
