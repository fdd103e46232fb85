"""Tensors between workers: point-to-point messages over torch.distributed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from itertools import combinations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work


@dataclass(frozen=True, slots=True)
class Peers:
    """This worker's connections to all others; ranks are positions in the cluster.

    There are two groups, ``ahead`` and ``back``. Within a group NCCL carries out everything between two
    workers in the order each of them asked for it, so two that send to each other at once need both. In a
    step, tensors travel ahead and gradients back; outside, and among shards of one replica, messages to
    higher ranks travel ahead. The order is all that says which message is which on NCCL; gloo also matches
    tags.
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
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Not told the device, NCCL gives every pair of workers a stream of its own. Told, it would connect
        # all at once but put everything a worker sends and receives in one line, and wait for ever where
        # stages that skip others need another order.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        ranks = list(range(world_size))
        peers = cls(rank=rank, world_size=world_size, device=device, ahead=_group(ranks), back=_group(ranks))
        peers._meet()
        return peers

    def _meet(self) -> None:
        """Connects all pairs, in the same order everywhere.

        NCCL connects two workers when they first talk, and whoever comes first waits for the other: in
        the midst of a step, that could be in a circle.
        """
        token = torch.zeros(1, device=self.device)
        for pair in combinations(range(self.world_size), 2):
            if self.rank not in pair:
                continue
            for back in (False, True):
                source, target = reversed(pair) if back else pair
                if self.rank == source:
                    self.send(token, target, back=back).wait()
                else:
                    self.receive(token, source, back=back).wait()

    def send(self, tensor: torch.Tensor, to: int, *, back: bool | None = None, tag: int = 0) -> Work:
        """Starts sending; the tensor must not change until the work is done (which keeps it alive).

        On a GPU, waiting for the work holds up what the device does next, not the caller.

        Args:
            back: whether it travels back or ahead; by the ranks if not given.
        """
        group = self.back if (to < self.rank if back is None else back) else self.ahead
        work = dist.isend(tensor.contiguous(), to, group=group, tag=tag)
        assert work is not None, "every worker is in both groups"
        return work

    def receive(self, tensor: torch.Tensor, source: int, *, back: bool | None = None, tag: int = 0) -> Work:
        """Starts receiving into ``tensor``; see :meth:`send`."""
        group = self.back if (source > self.rank if back is None else back) else self.ahead
        work = dist.irecv(tensor, source, group=group, tag=tag)
        assert work is not None, "every worker is in both groups"
        return work

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """All-reduces ``value`` in place."""
        dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        """Returns when the devices of all workers have done what they were asked before."""
        self.sum(torch.zeros(1, device=self.device)).item()

    def settle(self) -> None:
        """Returns when this worker's device has done what it was asked, transfers included."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        dist.destroy_process_group()


def _group(ranks: list[int]) -> ProcessGroup:
    group = dist.new_group(ranks)
    assert isinstance(group, ProcessGroup), "every worker is in every group"
    return group
