"""How fast tensors travel between two devices of this machine."""

from __future__ import annotations

import datetime
import os
import threading
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store

from forescale.core.clock import Clock
from forescale.core.cluster import Link
from forescale.core.errors import InvalidInput

LARGE_BYTES = 4 << 20
"""About what one microbatch sends over a cut."""
SMALL_BYTES = 64
LEAST_ROUNDS = 5
ROUNDS = {"small": (SMALL_BYTES, 50), "large": (LARGE_BYTES, 20)}
"""Bytes of the messages, and most rounds."""
WORK_SIZES = (512, 256, 1024)
"""Of the matrix product before each message: about two milliseconds, more than a core's own caches hold."""
TIMEOUT = datetime.timedelta(seconds=20)


def measure_loopback(
    cores: Sequence[int], peer_cores: Sequence[int], *, clock: Clock, budget_s: float = 0.4
) -> Link:
    """The link between two CPU devices: gloo over loopback, which is what training sends with.

    Two pinned threads of this process play the two workers; they and gloo's own threads are gone
    when it returns. Medians of ping-pong rounds: the shortest find the message still in a cache. Before it
    sends, each computes for a while, as in a training step: a message that follows another finds all that it
    needs in the caches and nobody asleep, and takes half the time.
    """
    store = HashStore()
    rounds_s: dict[str, list[float]] = {}
    errors: list[BaseException] = []

    def play(rank: int, pinned: Sequence[int]) -> None:
        try:
            if pinned:
                os.sched_setaffinity(0, pinned)
            measured = _ping_pong(store, rank, clock, budget_s)
            if rank == 0:
                rounds_s.update(measured)
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            errors.append(error)

    players = [
        threading.Thread(target=play, args=(rank, pinned), name=f"forescale-loopback-{rank}")
        for rank, pinned in enumerate((cores, peer_cores))
    ]
    for player in players:
        player.start()
    for player in players:
        player.join()
    if errors:
        raise InvalidInput(f"the loopback link could not be measured: {errors[0]}") from errors[0]
    return _link(rounds_s["small"], rounds_s["large"], messages_per_round=2, occupies_device=True)


def _ping_pong(store: Store, rank: int, clock: Clock, budget_s: float) -> dict[str, list[float]]:
    """Seconds of every round trip, by message size. Rank 0 decides when it has been enough."""
    # Only the options, which have no public name, can say which interface gloo uses.
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = TIMEOUT
    group = gloo(store, rank, 2, options)
    flag = torch.zeros(1)
    rows, inner, columns = WORK_SIZES
    left, right, product = torch.zeros(rows, inner), torch.zeros(inner, columns), torch.zeros(rows, columns)

    def pass_on(tensor: torch.Tensor) -> float:
        """Rank 0: seconds of a message each way. Rank 1: those of the work before it answers."""
        if rank == 0:
            torch.mm(left, right, out=product)
            before_s = clock.monotonic_s()
            group.send([tensor], 1, 0).wait()
            group.recv([tensor], 1, 0).wait()
            passed_s = clock.monotonic_s() - before_s
            group.recv([flag], 1, 2).wait()
            return passed_s - float(flag)
        group.recv([tensor], 0, 0).wait()
        before_s = clock.monotonic_s()
        torch.mm(left, right, out=product)
        worked_s = clock.monotonic_s() - before_s
        group.send([tensor], 0, 0).wait()
        group.send([flag.fill_(worked_s)], 0, 2).wait()
        return worked_s

    rounds_s: dict[str, list[float]] = {}
    for size, (size_bytes, most) in ROUNDS.items():
        message = torch.zeros(size_bytes // 4)
        pass_on(message)  # the first one pays for set-up and page faults
        started = clock.monotonic_s()
        taken: list[float] = []
        while True:
            taken.append(pass_on(message))
            late = clock.monotonic_s() - started > budget_s / 2
            if rank == 0:
                flag.fill_(len(taken) < (LEAST_ROUNDS if late else most))
                group.send([flag], 1, 1).wait()
            else:
                group.recv([flag], 0, 1).wait()
            if not bool(flag):
                break
        rounds_s[size] = taken
    return rounds_s


def _link(
    small_s: Sequence[float], large_s: Sequence[float], *, messages_per_round: int, occupies_device: bool
) -> Link:
    latency_s = median(small_s) / messages_per_round
    one_large_s = median(large_s) / messages_per_round
    return Link(
        bandwidth_bytes_per_s=LARGE_BYTES / max(one_large_s - latency_s, one_large_s / 2),
        latency_s=latency_s,
        occupies_device=occupies_device,
    )


def measure_cuda_link(source: torch.device, target: torch.device, clock: Clock) -> Link:
    """The link between two GPUs, or between host memory and a GPU: PCIe or NVLink, whichever copies take."""

    def rounds_s(size_bytes: int, rounds: int) -> list[float]:
        sent = torch.zeros(size_bytes // 4, device=source, pin_memory=source.type == "cpu")
        received = torch.empty(size_bytes // 4, device=target)
        return [_timed_s(lambda: received.copy_(sent), target, clock) for _ in range(rounds + 1)][1:]

    return _link(
        rounds_s(SMALL_BYTES, 20), rounds_s(LARGE_BYTES, 5), messages_per_round=1, occupies_device=False
    )


def _timed_s(work: Callable[[], object], device: torch.device, clock: Clock) -> float:
    torch.cuda.synchronize(device)
    before = clock.monotonic_s()
    work()
    torch.cuda.synchronize(device)
    return clock.monotonic_s() - before
