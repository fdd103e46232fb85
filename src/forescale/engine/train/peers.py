"""Tensors between workers: point-to-point messages over torch.distributed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work


@dataclass(slots=True)
class Peers:
    """This worker's connections to all others; ranks are positions in the cluster.

    Messages from one worker to another arrive in the order they were sent within a direction
    (``ahead``: to later stages, and everything outside a step; ``back``: gradients), which is all
    NCCL offers; gloo also matches tags.
    """

    rank: int
    world_size: int
    device: torch.device
    ahead: ProcessGroup
    back: ProcessGroup

    @classmethod
    def connect(cls, *, host: str, port: int, rank: int, world_size: int, device: torch.device) -> Peers:
        """Joins the process group; blocks until every worker has."""
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage] - it is documented
            host, port, is_master=False, timeout=timedelta(seconds=120)
        )
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        ranks = list(range(world_size))
        return cls(
            rank=rank,
            world_size=world_size,
            device=device,
            ahead=_group(ranks),
            back=_group(ranks),
        )

    def send(self, tensor: torch.Tensor, to: int, *, back: bool = False, tag: int = 0) -> Work:
        """Starts sending; the tensor must not change until the work is done (which keeps it alive)."""
        work = dist.isend(tensor.contiguous(), to, group=self.back if back else self.ahead, tag=tag)
        assert work is not None, "every worker is in both groups"
        return work

    def receive(self, tensor: torch.Tensor, source: int, *, back: bool = False, tag: int = 0) -> Work:
        """Starts receiving into ``tensor``."""
        work = dist.irecv(tensor, source, group=self.back if back else self.ahead, tag=tag)
        assert work is not None, "every worker is in both groups"
        return work

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """All-reduces ``value`` in place."""
        dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        self.sum(torch.zeros(1, device=self.device))

    def close(self) -> None:
        dist.destroy_process_group()


def _group(ranks: list[int]) -> ProcessGroup:
    group = dist.new_group(ranks)
    assert isinstance(group, ProcessGroup), "every worker is in every group"
    return group
