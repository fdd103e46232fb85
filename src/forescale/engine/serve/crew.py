"""The processes behind the gateway: replicas of models, and warm spares to hold some.

Every process starts as a spare: it imports torch and waits. ``Crew.place`` hands a model to a warm one, which
takes a fraction of a second, and a new spare is started once it serves. A replica whose process is lost gets
another one, at once the first time and then after longer and longer pauses.

Replicas of one house are in one process, and are together in the next one when that is lost. Only the one
that was at work goes elsewhere, and its version shares no process any more: nobody is lost to it twice.

Nothing here waits: ``heard`` and ``poll`` are called by the loop that owns the channel, with its time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from signal import SIGKILL

from forescale.core.cluster import Device, DeviceKind
from forescale.core.errors import PeerGone
from forescale.engine.backend import ProcessBackend, ProcessExit, ProcessSpec
from forescale.engine.serve.messages import (
    Beat,
    Drain,
    Failed,
    FromReplica,
    Hello,
    Left,
    Load,
    Threads,
    ToReplica,
    Warm,
    address,
)
from forescale.engine.serve.roster import CrewEvent, CrewRules, Ended, Lost, Ready, Replica, State
from forescale.engine.serve.seats import ENTRY, PRELOAD, Process, Seat

_PROCESS_BYTES = 250_000_000  # until one has said what it takes

Send = Callable[[str, ToReplica], object]
"""Sends a message to the address of a replica or of a process; ``PeerGone`` when it is not connected."""

Working = Callable[[str], str | None]
"""The replica for which a process was at work when it ended."""


@dataclass(slots=True)
class _Numbers:
    replica: count[int] = field(default_factory=lambda: count(1))
    process: count[int] = field(default_factory=lambda: count(1))
    house: count[int] = field(default_factory=lambda: count(1))


class Crew:
    """Starts, watches, replaces and stops replicas.

    Args:
        backend: runs the processes. The crew reads its ``exits``; nobody else may.
        send: to a replica or a process.
        working: asked once for each process that has ended.
        devices: where processes may run; spares are kept on each.

    Attributes:
        warm_up_s: what the last process took to become a spare.
        process_bytes: memory that a process takes before it has a model.
        common_bytes: memory that all of them have together.
        model_bytes: the most that a model has taken besides, by model and version.
        loners: models and versions that ended a process, or could not be loaded: they share none any more.
    """

    def __init__(
        self,
        backend: ProcessBackend,
        send: Send,
        devices: Sequence[Device],
        rules: CrewRules | None = None,
        working: Working = lambda _: None,
    ) -> None:
        self._backend = backend
        self._send = send
        self._working = working
        self._devices = {device.name: device for device in devices}
        self._rules = rules or CrewRules()
        self._processes: dict[str, Process] = {}
        self._seats: dict[str, Seat] = {}
        self._numbers = _Numbers()
        self._events: deque[CrewEvent] = deque()
        self._stillborn = 0
        self._start_s = 0.0  # no process is started before
        self.warm_up_s = 5.0
        self.process_bytes = _PROCESS_BYTES
        self.common_bytes = 0
        self.model_bytes: dict[tuple[str, str], int] = {}
        self.loners = set[tuple[str, str]]()

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(self._devices)

    def room_bytes(self) -> dict[str, int]:
        """Memory that replicas may take on each device, if it is known: others need some, too."""
        others_bytes = self._rules.spares * self.process_bytes + self.common_bytes // len(self._devices)
        return {
            device.name: max(0, device.memory_bytes - others_bytes)
            for device in self._devices.values()
            if device.memory_bytes
        }

    def cores(self) -> dict[str, int]:
        """How many the replicas of each CPU device share, if it is known."""
        return {
            device.name: len(device.cores)
            for device in self._devices.values()
            if device.kind is DeviceKind.CPU and device.cores
        }

    def replicas(self) -> tuple[Replica, ...]:
        """All that were placed and have not ended."""
        return tuple(seat.as_replica() for seat in self._seats.values())

    def processes(self) -> frozenset[str]:
        """Names of all that live, spares or not."""
        return frozenset(self._processes)

    def spares(self) -> int:
        """Processes that could take a model at once."""
        return sum(process.is_open and process.house is None for process in self._processes.values())

    def place(self, load: Load, device: str, now_s: float, house: str | None = None) -> str:
        """Add a replica, and give it a process when one is warm.

        Args:
            house: replicas of one house on one device share a process; None, or if its version may not share:
                it gets a house of its own.

        Returns:
            Its name; ``Ready`` says when it serves.
        """
        name = f"{load.model}.{load.version}.{next(self._numbers.replica)}"
        if house is None or (load.model, load.version) in self.loners:
            house = self._new_house()
        load = replace(load, threads=self._within(device, load.threads))
        self._seats[name] = Seat(name, load, self._devices[device].name, house, now_s)
        self._advance(now_s)
        return name

    def set_threads(self, model: str, version: str, threads: int | None) -> None:
        """Let all replicas of a version run batches with so many; no device gives more than it has cores."""
        for seat in self._seats.values():
            if seat.version == (model, version):
                seat.load = replace(seat.load, threads=self._within(seat.device, threads))
                if seat.process is not None and seat.load.threads is not None:
                    to = address(seat.process.handle.name, seat.name)
                    self._tell(seat.process, to, Threads(threads=seat.load.threads))

    def _within(self, device: str, threads: int | None) -> int | None:
        cores = len(self._devices[device].cores) or None
        return min(threads, cores) if threads and cores else threads or cores

    def _new_house(self) -> str:
        return f"house-{next(self._numbers.house)}"

    def remove(self, name: str, now_s: float) -> str | None:
        """Take a replica away: it finishes the batches it was sent, and gets no new process.

        Returns:
            The address to send nothing more to, if it serves; ``Ended`` follows when it is gone.
        """
        seat = self._seats[name]
        process = seat.process
        if process is None:
            del self._seats[name]
            return None
        to = address(process.handle.name, name)
        if not seat.leaving:
            seat.leaving = True
            seat.state, seat.since_s = State.DRAINING, now_s
            self._tell(process, to, Drain())
        return to

    def forget(self, model: str, version: str) -> None:
        """What is known of a version is of no use any more."""
        self.model_bytes.pop((model, version), None)
        self.loners.discard((model, version))

    def heard(self, sender: str, message: FromReplica | None, now_s: float) -> None:
        """Take note of what a process said, or one of its replicas; call it for every message."""
        name, _, replica = sender.partition("/")
        process = self._processes.get(name)
        if process is None:
            return
        silent_s = now_s - process.heard_s
        process.heard_s = now_s
        match message:
            case Warm(process_bytes=process_bytes, common_bytes=common_bytes):
                self.process_bytes = process_bytes or self.process_bytes
                self.common_bytes = common_bytes
                process.warm = True
                self.warm_up_s = silent_s
                self._stillborn = 0
                self._advance(now_s)
            case Beat():
                for each, taken_bytes in message.model_bytes.items():
                    if each in process.seats:
                        self._note_bytes(process.seats[each], taken_bytes)
            case Failed(batch=None) if not replica:
                process.failed = message
            case Hello() | Left() | Failed(batch=None) if replica in process.seats:
                self._heard_of(process.seats[replica], process, message, now_s)
            case _:
                pass

    def _heard_of(self, seat: Seat, process: Process, message: Hello | Left | Failed, now_s: float) -> None:
        match message:
            case Hello() if not seat.leaving:
                self._note_bytes(seat, message.model_bytes)
                seat.state, seat.since_s = State.SERVING, now_s
                self._events.append(Ready(replica=seat.name, address=message.replica, hello=message))
            case Hello():
                pass
            case Left():
                self._unseat(process, seat, Failed(error="it left unasked", failure="crash"), now_s)
            case Failed():
                if seat.state is not State.LOADING:
                    process.fallen = seat.name
                self._isolate(seat)
                self._unseat(process, seat, message, now_s)

    def _note_bytes(self, seat: Seat, taken_bytes: int) -> None:
        if taken_bytes > self.model_bytes.get(seat.version, 0):
            self.model_bytes[seat.version] = taken_bytes

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
        process.is_ending = True
        if not process.warm:
            self._stillborn += 1
            self._start_s = now_s + self._rules.pause_s(self._stillborn)
        at_work = self._working(ended.handle.name)
        working = process.fallen or at_work
        failed = process.killed_for or process.failed
        failed = failed or Failed(error=f"lost ({ended.cause})", failure="crash")
        was_killed = ended.signal == SIGKILL and not process.killed_for  # which no model does to itself
        mates_failed = replace(failed, error=f"{failed.error} with {working}") if working else failed
        for seat in tuple(process.seats.values()):
            is_cause = seat.name == working
            self._unseat(process, seat, failed if is_cause else mates_failed, now_s)
            if is_cause and (seat.attempts > 1 or not was_killed):
                self._isolate(seat)

    def _unseat(self, process: Process, seat: Seat, failed: Failed, now_s: float) -> None:
        """A process holds a replica no more."""
        del process.seats[seat.name]
        seat.process = None
        told = address(process.handle.name, seat.name)
        if seat.leaving:
            del self._seats[seat.name]
            self._events.append(Ended(replica=seat.name, address=told))
        else:
            if seat.state is State.SERVING and now_s - seat.since_s >= self._rules.steady_s:
                seat.attempts = 0
            seat.attempts += 1
            seat.retry_s = max(now_s, seat.began_s + self._rules.pause_s(seat.attempts))
            seat.state, seat.since_s = State.WAITING, now_s
            seat.cause = failed.error
            lost = Lost(replica=seat.name, address=told, cause=failed.error, failure=failed.failure)
            self._events.append(lost)
        if not process.seats and not process.is_ending:
            process.is_ending = True
            self._tell(process, process.handle.name, Drain())

    def _isolate(self, seat: Seat) -> None:
        """Its version shares no process from now on."""
        self.loners.add(seat.version)
        seat.house = self._new_house()

    def _watch(self, process: Process, now_s: float) -> None:
        """Kill a process that has had its time."""
        silent_s = now_s - process.heard_s
        states = {seat.state for seat in process.seats.values()}
        if process.killed_for:
            return
        if State.SERVING in states:
            limit_s, what = self._rules.silence_limit_s, "the model did not answer"
        elif State.LOADING in states or not process.warm:
            limit_s, what = self._rules.load_limit_s, "it was not ready"
        elif process.house is None:
            limit_s, what = self._rules.silence_limit_s, "it was silent"
        else:
            silent_s = now_s - max((seat.since_s for seat in process.seats.values()), default=process.heard_s)
            limit_s, what = self._rules.drain_limit_s, "it did not finish"
        if silent_s > limit_s:
            process.killed_for = Failed(error=f"{what} for {limit_s:g} s", failure="timeout")
            self._backend.kill(process.handle)

    def _advance(self, now_s: float) -> None:
        """Give warm processes to waiting replicas, and start what is missing."""
        for seat in self._due(now_s):
            process = self._open(seat.house, seat.device) or self._open(None, seat.device)
            if process is not None:
                process.house = seat.house
                process.seats[seat.name], seat.process = seat, process
                process.heard_s = now_s
                seat.state, seat.since_s, seat.began_s = State.LOADING, now_s, now_s
                self._tell(process, address(process.handle.name, seat.name), seat.load)
        self._start_missing(now_s)

    def _due(self, now_s: float) -> list[Seat]:
        """Replicas that wait for a process, and for nothing else."""
        return [
            seat for seat in self._seats.values() if seat.state is State.WAITING and seat.retry_s <= now_s
        ]

    def _open(self, house: str | None, device: str) -> Process | None:
        """A process of a house, or a spare, that can hold one more replica."""
        return next(
            (
                process
                for process in self._processes.values()
                if process.is_open and (process.house, process.device) == (house, device)
            ),
            None,
        )

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
                    preload=PRELOAD,
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
            self._processes[name] = Process(handle, device, now_s)

    def _short_devices(self, now_s: float) -> list[str]:
        """Devices on which a process is missing, once per process; for replicas before for spares."""
        idle: dict[str, int] = dict.fromkeys(self._devices, 0)
        for process in self._processes.values():
            idle[process.device] += process.house is None
        # A replica that waits for a process has none of its house to go to: one for each house.
        wanted = [
            device for _, device in dict.fromkeys((seat.house, seat.device) for seat in self._due(now_s))
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

    def _tell(self, process: Process, to: str, message: ToReplica) -> None:
        try:
            self._send(to, message)
        except PeerGone:
            self._backend.kill(process.handle)  # its connection broke; ``exits`` tells the rest
