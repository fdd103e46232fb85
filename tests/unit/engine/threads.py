"""Threads for workers, and queues for the links between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

import torch

Links = Mapping[tuple[int, int], "Queue[tuple[int, torch.Tensor]]"]


@dataclass
class Arrival:
    queue: Queue[tuple[int, torch.Tensor]] | None = None
    into: torch.Tensor | None = None
    tag: int = 0

    def wait(self) -> None:
        if self.queue is not None and self.into is not None:
            tag, tensor = self.queue.get(timeout=20)
            assert tag == self.tag
            self.into.copy_(tensor)


@dataclass
class Worker:
    """Stands for ``Peers``: tensors arrive in the order they were sent."""

    rank: int
    links: Links
    sent_bytes: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def send(self, tensor: torch.Tensor, to: int, *, tag: int = 0) -> Arrival:
        self.links[self.rank, to].put((tag, tensor.clone()))
        self.sent_bytes += tensor.nbytes
        return Arrival()

    def receive(self, tensor: torch.Tensor, source: int, *, tag: int = 0) -> Arrival:
        return Arrival(self.links[source, self.rank], tensor, tag)


def on_workers(count: int, run: Callable[[Any], Any]) -> tuple[list[Any], list[Worker]]:
    """What ``run`` returns on each of so many workers, to which it is given the worker's ``Peers``."""
    links: Links = {(a, b): Queue() for a in range(count) for b in range(count)}
    workers = [Worker(rank, links) for rank in range(count)]
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, workers)), workers
