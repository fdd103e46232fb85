"""Sums over workers, with threads for workers and queues for links."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue
from typing import Any

import torch
from torch import nn

from forescale.engine.train.gradients import sum_shared


@dataclass
class Arrival:
    queue: Queue[torch.Tensor] | None = None
    into: torch.Tensor | None = None

    def wait(self) -> None:
        if self.queue is not None and self.into is not None:
            self.into.copy_(self.queue.get(timeout=20))


@dataclass
class Worker:
    """Stands for ``Peers``: tensors arrive in the order they were sent."""

    rank: int
    links: dict[tuple[int, int], Queue[torch.Tensor]]
    sent_bytes: int = 0

    def send(self, tensor: torch.Tensor, to: int) -> Arrival:
        self.links[self.rank, to].put(tensor.clone())
        self.sent_bytes += tensor.nbytes
        return Arrival()

    def receive(self, tensor: torch.Tensor, source: int) -> Arrival:
        return Arrival(self.links[source, self.rank], tensor)


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


def test_every_holder_ends_with_the_same_sum_to_the_bit() -> None:
    links: Any = defaultdict(Queue)
    for source in range(3):
        for target in range(3):
            _ = links[source, target]
    workers = [Worker(rank, links) for rank in range(3)]
    owned = [held(rank) for rank in range(3)]

    def run(rank: int) -> None:
        peers: Any = workers[rank]
        sum_shared(owned[rank], HOLDERS, peers)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(run, range(3)))
    for name, ranks in HOLDERS.items():
        parts = [gradient(name, rank) for rank in ranks if (name, rank) != ("small", 1)]
        sums = [owned[rank][name].grad for rank in ranks]
        torch.testing.assert_close(sums[0], torch.stack(parts).sum(0), check_stride=False)
        assert all(torch.equal(sums[0], other) for other in sums[1:])  # type: ignore[arg-type]
    # Everybody adds up a third and sends it on: 4/3 of what all hold, not twice as much.
    assert workers[0].sent_bytes < 1.4 * 4 * (4_500_000 + 100)
