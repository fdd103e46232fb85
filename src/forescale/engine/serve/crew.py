"""The processes behind the gateway: replicas of models, and warm spares to become some.

Every process starts as a spare: it imports torch and waits. ``Crew.place`` hands a model to a warm one, which
takes a fraction of a second, and a new spare is started once it serves. A replica whose process is lost gets
another one, at once the first time and then after longer and longer pauses.

Nothing here waits: ``heard`` and ``poll`` are called by the loop that owns the channel, with its time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from forescale.core.cluster import Device
from forescale.core.errors import PeerGone
from forescale.engine.backend import ProcessBackend, ProcessExit, ProcessHandle, ProcessSpec
from forescale.engine.serve.messages import Beat, Drain, Failed, FromReplica, Hello, Load, ToReplica, Warm
from forescale.engine.serve.roster import CrewEvent, CrewRules, Ended, Lost, Ready, Replica, State

_PROCESS_BYTES = 250_000_000  # until one has said what it takes

ENTRY = "forescale.engine.serve.replica:main"

Send = Callable[[str, ToReplica], object]
"""Sends a message to a process by name; ``PeerGone`` when it is not connected."""


@dataclass(slots=True, kw_only=True)
class _Process:
    """A living process.

    Attributes:
        warm: whether it has a model or could take one.
        heard_s: when it last said something.
        failed: what it said was wrong with itself.
    """

    handle: ProcessHandle
    device: str
    heard_s: float
    warm: bool = False
    seat: _Seat | None = None
    failed: Failed | None = None
    killed_for: Failed | None = None


@dataclass(slots=True, kw_only=True)
class _Seat:
    """A wanted replica."""

    name: str
    load: Load
    device: str
    state: State = State.WAITING
    process: _Process | None = None
    since_s: float = 0.0
    cause: str | None = None
    attempts: int = 0
    retry_s: float = 0.0
    leaving: bool = False


@dataclass(slots=True)
class _Numbers:
    replica: count[int] = field(default_factory=lambda: count(1))
    process: count[int] = field(default_factory=lambda: count(1))


class Crew:
    """Starts, watches, replaces and stops replicas.

    Args:
        backend: runs the processes. The crew reads its ``exits``; nobody else may.
        send: to a process.
        devices: where processes may run; spares are kept on each.

    Attributes:
        warm_up_s: what the last process took to become a spare.
        process_bytes: memory that a process takes before it has a model.
        model_bytes: the most that a model has taken besides, by model and version.
    """

    def __init__(
        self, backend: ProcessBackend, send: Send, devices: Sequence[Device], rules: CrewRules | None = None
    ) -> None:
        self._backend = backend
        self._send = send
        self._devices = {device.name: device for device in devices}
        self._rules = rules or CrewRules()
        self._processes: dict[str, _Process] = {}
        self._seats: dict[str, _Seat] = {}
        self._numbers = _Numbers()
        self._events: deque[CrewEvent] = deque()
        self._stillborn = 0
        self._start_s = 0.0  # no process is started before
        self.warm_up_s = 5.0
        self.process_bytes = _PROCESS_BYTES
        self.model_bytes: dict[tuple[str, str], int] = {}

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(self._devices)

    def room_bytes(self) -> dict[str, int]:
        """Memory that replicas may take on each device, if it is known: the spares need some, too."""
        spares_bytes = self._rules.spares * self.process_bytes
        return {
            device.name: max(0, device.memory_bytes - spares_bytes)
            for device in self._devices.values()
            if device.memory_bytes
        }

    def replicas(self) -> tuple[Replica, ...]:
        """All that were placed and have not ended."""
        return tuple(
            Replica(
                name=seat.name,
                model=seat.load.model,
                version=seat.load.version,
                device=seat.device,
                state=seat.state,
                process=seat.process and seat.process.handle.name,
                cause=seat.cause,
                attempts=seat.attempts,
                retry_s=seat.retry_s,
            )
            for seat in self._seats.values()
        )

    def processes(self) -> frozenset[str]:
        """Names of all that live, spares or not."""
        return frozenset(self._processes)

    def spares(self) -> int:
        """Processes that could take a model at once."""
        return sum(process.warm and process.seat is None for process in self._processes.values())

    def place(self, load: Load, device: str, now_s: float) -> str:
        """Add a replica, and give it a process when one is warm.

        Returns:
            Its name; ``Ready`` says when it serves.
        """
        name = f"{load.model}.{load.version}.{next(self._numbers.replica)}"
        self._seats[name] = _Seat(name=name, load=load, device=self._devices[device].name, since_s=now_s)
        self._advance(now_s)
        return name

    def remove(self, name: str, now_s: float) -> str | None:
        """Take a replica away: it finishes the batches it was sent, and gets no new process.

        Returns:
            The process to send nothing more to, if it serves; ``Ended`` follows when that is gone.
        """
        seat = self._seats[name]
        process = seat.process
        if process is None:
            del self._seats[name]
            return None
        if not seat.leaving:
            seat.leaving = True
            seat.state, seat.since_s = State.DRAINING, now_s
            self._tell(process, Drain())
        return process.handle.name

    def heard(self, name: str, message: FromReplica | None, now_s: float) -> None:
        """Take note of what a process said; call it for every message."""
        process = self._processes.get(name)
        if process is None:
            return
        silent_s = now_s - process.heard_s
        process.heard_s = now_s
        match message:
            case Warm(process_bytes=process_bytes):
                self.process_bytes = process_bytes or self.process_bytes
                process.warm = True
                self.warm_up_s = silent_s
                self._stillborn = 0
                self._advance(now_s)
            case Hello() if process.seat and not process.seat.leaving:
                self._note_bytes(process.seat.load, message.model_bytes)
                process.seat.state, process.seat.since_s = State.SERVING, now_s
                self._events.append(Ready(replica=process.seat.name, process=name, hello=message))
            case Beat() if process.seat:
                self._note_bytes(process.seat.load, message.model_bytes)
            case Failed(batch=None):
                process.failed = message
            case _:
                pass

    def _note_bytes(self, load: Load, taken_bytes: int) -> None:
        version = load.model, load.version
        if taken_bytes > self.model_bytes.get(version, 0):
            self.model_bytes[version] = taken_bytes

    def fileno(self) -> int:
        """A descriptor that is readable when a process has ended: ``poll`` then."""
        return self._backend.fileno()

    def poll(self, now_s: float) -> tuple[CrewEvent, ...]:
        """See who has ended and who has been silent too long, start what is wanted; what happened.

        Call it when ``fileno`` is readable, after ``heard``, and a few times a second.
        """
        for ended in self._backend.exits():
            self._bury(ended, now_s)
        for process in self._processes.values():
            self._watch(process, now_s)
        self._advance(now_s)
        events = tuple(self._events)
        self._events.clear()
        return events

    def close(self) -> None:
        """End all processes, without waiting for batches."""
        self._backend.close()

    def _bury(self, ended: ProcessExit, now_s: float) -> None:
        process = self._processes.pop(ended.handle.name, None)
        if process is None:
            return
        if not process.warm:
            self._stillborn += 1
            self._start_s = now_s + self._pause_s(self._stillborn)
        if process.seat is None:
            return
        seat = process.seat
        seat.process = None
        if seat.leaving:
            del self._seats[seat.name]
            self._events.append(Ended(replica=seat.name, process=ended.handle.name))
            return
        if seat.state is State.SERVING and now_s - seat.since_s >= self._rules.steady_s:
            seat.attempts = 0
        seat.attempts += 1
        seat.retry_s = now_s + self._pause_s(seat.attempts)
        seat.state, seat.since_s = State.WAITING, now_s
        failed = (
            process.killed_for or process.failed or Failed(error=f"lost ({ended.cause})", failure="crash")
        )
        seat.cause = failed.error
        self._events.append(
            Lost(
                replica=seat.name,
                process=ended.handle.name,
                cause=failed.error,
                failure=failed.failure,
            )
        )

    def _pause_s(self, attempts: int) -> float:
        if attempts < 2:
            return 0.0
        return min(self._rules.backoff_limit_s, self._rules.backoff_s * 2.0 ** min(attempts - 2, 60))

    def _watch(self, process: _Process, now_s: float) -> None:
        """Kill a process that has had its time."""
        silent_s = now_s - process.heard_s
        if process.killed_for:
            return
        if process.seat is None and process.warm:
            limit_s, what = self._rules.silence_limit_s, "it was silent"
        elif process.seat is None or process.seat.state is State.LOADING:
            limit_s, what = self._rules.load_limit_s, "it was not ready"
        elif process.seat.leaving:
            silent_s = now_s - process.seat.since_s
            limit_s, what = self._rules.drain_limit_s, "it did not finish"
        else:
            limit_s, what = self._rules.silence_limit_s, "the model did not answer"
        if silent_s > limit_s:
            process.killed_for = Failed(error=f"{what} for {limit_s:g} s", failure="timeout")
            self._backend.kill(process.handle)

    def _advance(self, now_s: float) -> None:
        """Give warm processes to waiting replicas, and start what is missing."""
        waiting = [
            seat for seat in self._seats.values() if seat.state is State.WAITING and seat.retry_s <= now_s
        ]
        for seat in waiting:
            process = next(
                (
                    p
                    for p in self._processes.values()
                    if p.warm and p.seat is None and p.device == seat.device and not p.killed_for
                ),
                None,
            )
            if process is not None:
                process.seat, seat.process = seat, process
                process.heard_s = now_s
                seat.state, seat.since_s = State.LOADING, now_s
                self._tell(process, seat.load)
        self._start_missing(now_s)

    def _start_missing(self, now_s: float) -> None:
        if now_s < self._start_s:
            return
        for device in self._short_devices(now_s):
            if sum(not process.warm for process in self._processes.values()) >= self._rules.starts:
                return
            name = f"replica-{next(self._numbers.process)}"
            handle = self._backend.start(
                ProcessSpec(
                    entry=ENTRY,
                    device=self._devices[device],
                    name=name,
                    # Threads that wait in a loop for each other's work take the gateway's time.
                    environment={"OMP_WAIT_POLICY": "PASSIVE"},
                    config={
                        "memory_limit_bytes": self._rules.memory_limit_bytes,
                        "factories": self._rules.factories,
                    },
                )
            )
            self._processes[name] = _Process(handle=handle, device=device, heard_s=now_s)

    def _short_devices(self, now_s: float) -> list[str]:
        """Devices on which a process is missing, once per process; for replicas before for spares."""
        idle: dict[str, int] = dict.fromkeys(self._devices, 0)
        for process in self._processes.values():
            idle[process.device] += process.seat is None
        wanted: list[str] = [
            seat.device
            for seat in self._seats.values()
            if seat.state is State.WAITING and seat.retry_s <= now_s
        ]
        if not any(seat.state is State.LOADING for seat in self._seats.values()):
            # Spares have time: what starts beside a model that is being loaded slows it down.
            wanted += [device for device in self._devices for _ in range(self._rules.spares)]
        missing: list[str] = []
        for device in wanted:
            if idle[device] > 0:
                idle[device] -= 1
            else:
                missing.append(device)
        return missing

    def _tell(self, process: _Process, message: ToReplica) -> None:
        try:
            self._send(process.handle.name, message)
        except PeerGone:
            self._backend.kill(process.handle)  # its connection broke; ``exits`` tells the rest
