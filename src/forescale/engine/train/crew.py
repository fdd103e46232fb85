"""The worker processes of one run, and the conversation with them."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, Self

import torch.distributed as dist

from forescale.core.cluster import Cluster, DeviceKind
from forescale.core.errors import InvalidInput, PeerGone, RunFailed, WorkerLost
from forescale.engine.backend import ProcessBackend, ProcessHandle, ProcessSpec
from forescale.engine.channel import ChannelServer
from forescale.engine.local import LocalBackend
from forescale.engine.wire import Message

START_LIMIT_S = 120
_EXIT_NEWS_S = 2.0  # a worker that lost its peer complains before the kernel tells us the peer is dead
_STOP_GRACE_S = 5.0

WORKER_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    # Queues of a GPU: with fewer than streams, a transfer that waits could hold up another it waits for.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    # Activations come and go with every microbatch: glibc keeps their pages instead of giving them back to
    # the kernel and faulting them in again.
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}


def check_reachable(cluster: Cluster) -> None:
    """Checks that workers on these devices can send each other tensors.

    Raises:
        InvalidInput: they cannot.
    """
    gpus = [device.index for device in cluster.devices if device.kind is DeviceKind.CUDA]
    if gpus and len(gpus) < len(cluster.devices):
        raise InvalidInput(
            "CPU and GPU devices cannot train one model together, because NCCL reaches no CPU; "
            "use GPUs only, or CPUs only"
        )
    if len(set(gpus)) < len(gpus):
        raise InvalidInput("two devices are the same GPU, on which NCCL runs one worker; use each GPU once")


class Crew:
    """One worker per device; a context manager that ends every process it started.

    Raises:
        InvalidInput: the devices cannot train together.

    Attributes:
        names: of the devices, in the cluster's order.
        checkpoint: the last complete checkpoint, which errors name; set by the owner.
    """

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        check_reachable(cluster)
        self._cluster = cluster
        self._directory = directory
        self.names = [device.name for device in cluster.devices]
        self.checkpoint: Path | None = None

    def __enter__(self) -> Self:
        self._channel = ChannelServer()
        self._backend: ProcessBackend = LocalBackend(
            invitation=self._channel.invitation, log_dir=self._directory / "workers"
        )
        # A listening socket of our own, because TCPStore's would listen on every interface.
        listener = socket.create_server(("127.0.0.1", 0))
        self._store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage] - it is documented
            "127.0.0.1",
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=START_LIMIT_S),
            master_listen_fd=listener.detach(),
        )
        try:
            self._handles = [self._start(rank) for rank in range(len(self.names))]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._backend.close()
        self._channel.close(0.0)

    def _start(self, rank: int) -> ProcessHandle:
        config = {"host": "127.0.0.1", "port": self._store.port, "rank": rank, "world_size": len(self.names)}
        spec = ProcessSpec(
            entry="forescale.engine.train.worker:main",
            device=self._cluster.devices[rank],
            config=config,
            environment=WORKER_ENVIRONMENT,
        )
        return self._backend.start(spec)

    def stop(self) -> None:
        """Asks every worker to end, and waits for them."""
        self.broadcast({"type": "stop"})
        left = len(self.names)
        deadline_s = time.monotonic() + _STOP_GRACE_S
        while left and (remaining_s := deadline_s - time.monotonic()) > 0:
            self._channel.poll(remaining_s, self._backend)
            left -= len(self._backend.exits())
        for handle in self._handles:
            self._backend.stop(handle, _STOP_GRACE_S)

    def send(self, name: str, header: Mapping[str, Any], frames: Sequence[Any] = ()) -> None:
        """Queues a message to one worker.

        Raises:
            RunFailed: the worker is gone.
        """
        try:
            self._channel.send(name, header, frames)
        except PeerGone as error:
            self._raise_failed(name, str(error), reported=False)

    def broadcast(self, header: Mapping[str, Any], frames: Sequence[Any] = ()) -> None:
        for name in self.names:
            self.send(name, header, frames)

    def answers(
        self, kind: str, other: Callable[[Message], None], limit_s: float | None = None
    ) -> dict[str, Message]:
        """One message of a kind from every worker; ``other`` is given whatever else arrives.

        Raises:
            RunFailed: a worker is gone or failed, or did not answer in time.
        """
        answers: dict[str, Message] = {}
        deadline_s = None if limit_s is None else time.monotonic() + limit_s
        while len(answers) < len(self.names):
            message = self.receive(None if deadline_s is None else max(0.0, deadline_s - time.monotonic()))
            if message is None:
                if deadline_s is not None and time.monotonic() > deadline_s:
                    missing = ", ".join(sorted(set(self.names) - set(answers)))
                    raise RunFailed(
                        f"{missing} did not answer within {limit_s:.0f} s; see {self._directory / 'workers'}"
                    )
            elif message.header["type"] == kind:
                answers[message.sender] = message
            else:
                other(message)
        return answers

    def receive(self, timeout_s: float | None) -> Message | None:
        """The next message, or None after ``timeout_s`` or a message of no interest.

        Raises:
            RunFailed: a worker is gone or failed.
        """
        if not self._channel.poll(timeout_s, self._backend):
            for ended in self._backend.exits():
                raise WorkerLost(device=ended.handle.device, cause=ended.cause, checkpoint=self.kept())
            return None
        message = self._channel.receive(0.0)
        if message is None or message.header["type"] == "connected":
            return None
        if message.header["type"] == "failed":
            self._raise_failed(message.sender, message.header["error"])
        return message

    def kept(self) -> str | None:
        """The checkpoint to name in an error."""
        return str(self.checkpoint) if self.checkpoint else None

    def _raise_failed(self, device: str, error: str, *, reported: bool = True) -> NoReturn:
        """A worker that failed because its peer died is not the one to name.

        Args:
            reported: by the worker itself; if not, what it may have said before it went is the cause.
        """
        deadline_s = time.monotonic() + _EXIT_NEWS_S
        while (left_s := deadline_s - time.monotonic()) > 0:
            self._channel.poll(left_s, self._backend)
            for ended in self._backend.exits():
                if ended.signal is not None:
                    raise WorkerLost(device=ended.handle.device, cause=ended.cause, checkpoint=self.kept())
            while (message := self._channel.receive(0.0)) is not None:
                if not reported and message.header["type"] == "failed":
                    device, error, reported = message.sender, message.header["error"], True
        raise RunFailed(f"{device}: {error}", checkpoint=self.kept())
