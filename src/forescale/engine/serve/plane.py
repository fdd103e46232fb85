"""The data plane: gateway and replicas of one machine, told by a controller what to serve.

It needs no controller to go on. Requests are answered and lost replicas replaced while none is there; what
happens meanwhile is kept until one has written it down.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from dataclasses import replace
from typing import Any, assert_never

import structlog

from forescale.core.clock import Clock
from forescale.core.errors import ForescaleError
from forescale.engine.serve.crew import Crew
from forescale.engine.serve.formats import FIXED_THREADS
from forescale.engine.serve.gateway import Gateway, Link
from forescale.engine.serve.messages import Failed, FromReplica, Hello, Left, Load, Warm
from forescale.engine.serve.orders import (
    Command,
    End,
    Exchange,
    Happened,
    PlaneState,
    Serve,
    SetRoute,
    SetThreads,
    StartReplica,
    Steer,
    StopReplica,
    VersionState,
    Withdraw,
)
from forescale.engine.serve.policy import QueuePolicy
from forescale.engine.serve.roster import CrewEvent, Ended, Lost, Ready, State
from forescale.engine.serve.served import ServedModel

_LOOK_S = 0.25  # how often it looks after its replicas though nobody said that something changed
_HAPPENINGS = 10_000  # the oldest are given up beyond: nobody has written any down for very long

Version = tuple[str, str]


class Plane:
    """Obeys commands and tells how things are. Use it in the thread of its event loop.

    Attributes:
        ending: set when it has been asked to end.
    """

    def __init__(self, *, crew: Crew, gateway: Gateway, link: Link, clock: Clock) -> None:
        self._crew = crew
        self._gateway = gateway
        self._clock = clock
        self._name = secrets.token_hex(8)
        self._loads: dict[Version, Load] = {}
        self._load_s: dict[Version, float] = {}
        self._states: dict[Version, VersionState] = {}
        self._awake = set[Version]()
        self._withdrawals: dict[Version, asyncio.Task[None]] = {}
        self._happenings: deque[Happened] = deque(maxlen=_HAPPENINGS)
        self._happened = 0
        self._wake = asyncio.Event()
        self._news = asyncio.Event()
        self._seen: object = None
        self.ending = asyncio.Event()
        gateway.on_starving = self._news.set
        link.listen(self._hear)

    async def exchange(self, asked: Exchange) -> PlaneState:
        """Carry out commands, and tell how things are once something has changed or the time is over."""
        while self._happenings and self._happenings[0].number <= asked.acknowledged:
            self._happenings.popleft()
        for command in asked.commands:
            try:
                self._obey(command)
            except ForescaleError as error:
                structlog.get_logger().error("command_failed", command=repr(command), error=str(error))
        self._look()
        await within(asked.wait_s, self._news)
        self._news.clear()
        return self._state()

    def answer_now(self) -> None:
        """Let whoever waits in ``exchange`` wait no longer, or else the next one not at all."""
        self._news.set()

    async def run(self) -> None:
        """Look after the replicas, until cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._crew.fileno(), self._wake.set)
        try:
            while True:
                self._wake.clear()
                try:
                    self._look()
                except ForescaleError as error:
                    structlog.get_logger().error("replicas_not_looked_after", error=str(error))
                await within(_LOOK_S, self._wake)
        finally:
            loop.remove_reader(self._crew.fileno())

    # ---- commands --------------------------------------------------------------------------------------

    def _obey(self, command: Command) -> None:
        match command:
            case Serve(load=load, policy=policy):
                self._serve(load, policy)
            case StartReplica(model=model, version=number, device=device, house=house):
                self._place((model, number), device, house)
            case StopReplica(name=name):
                self._stop(name)
            case Steer(model=model, version=number, policy=policy):
                if (model, number) in self._loads:
                    self._gateway.find(model, number).steer(policy)
            case SetThreads(model=model, version=number, threads=threads):
                self._set_threads((model, number), threads)
            case SetRoute(model=model, route=route):
                self._gateway.set_route(model, route)
            case Withdraw(model=model, version=number):
                self._begin_withdrawal((model, number))
            case End():
                self.ending.set()
            case _:
                assert_never(command)

    def _serve(self, load: Load, policy: QueuePolicy) -> None:
        version = load.model, load.version
        if version not in self._loads and load.signature is not None:
            self._loads[version] = load
            self._gateway.serve(*version, load.signature, policy)

    def _place(self, version: Version, device: str, house: str | None) -> None:
        if version in self._loads and version not in self._withdrawals:
            self._crew.place(self._loads[version], device, self._clock.monotonic_s(), house)

    def _set_threads(self, version: Version, threads: int | None) -> None:
        if version in self._loads:
            self._loads[version] = replace(self._loads[version], threads=threads)
            self._gateway.changed.add(version)
            self._crew.set_threads(*version, threads)

    def _stop(self, name: str) -> None:
        if any(replica.name == name for replica in self._crew.replicas()):
            replica = self._crew.remove(name, self._clock.monotonic_s())
            if replica is not None:
                self._gateway.drain(replica)

    def _begin_withdrawal(self, version: Version) -> None:
        if version in self._loads and version not in self._withdrawals:
            self._withdrawals[version] = asyncio.create_task(self._withdraw(version))
            self._states.pop(version, None)

    async def _withdraw(self, version: Version) -> None:
        if self._gateway.find(*version).gauges().waiting and not any(
            (replica.model, replica.version) == version and replica.state is not State.DRAINING
            for replica in self._crew.replicas()
        ):
            # What was asked while it had no replica is answered yet.
            device = self._crew.devices[0]
            self._crew.place(self._loads[version], device, self._clock.monotonic_s())
        await self._gateway.retire(*version)
        for replica in self._crew.replicas():
            if (replica.model, replica.version) == version:
                self._stop(replica.name)
        del self._loads[version], self._withdrawals[version]
        self._load_s.pop(version, None)
        self._crew.forget(*version)
        self._news.set()

    # ---- replicas --------------------------------------------------------------------------------------

    def _hear(self, sender: str, said: FromReplica, _frames: tuple[memoryview, ...]) -> None:
        self._crew.heard(sender, said, self._clock.monotonic_s())
        if isinstance(said, Warm | Hello | Left) or (isinstance(said, Failed) and said.batch is None):
            self._wake.set()

    def _look(self) -> None:
        for event in self._crew.poll(self._clock.monotonic_s()):
            self._note(event)
        seen = self._crew.replicas(), self._crew.spares()
        if seen != self._seen:
            self._seen = seen
            self._news.set()

    def _note(self, event: CrewEvent) -> None:
        match event:
            case Ready(replica=replica, hello=hello):
                self._load_s[hello.model, hello.version] = hello.load_s
                self._happen(
                    "replica_ready",
                    replica,
                    version=hello.version,
                    load_s=hello.load_s,
                    model_bytes=hello.model_bytes,
                )
            case Lost(address=address, replica=replica, cause=cause):
                self._gateway.lose(address)
                self._happen("replica_lost", replica, cause=cause)
            case Ended(address=address, replica=replica):
                self._gateway.lose(address)
                self._happen("replica_ended", replica)
            case _:
                assert_never(event)

    def _happen(self, kind: str, replica: str, **detail: Any) -> None:
        model, version, _ = replica.rsplit(".", 2)  # it is named MODEL.VERSION.NUMBER
        self._gateway.changed.add((model, version))
        self._happened += 1
        happened = Happened(
            number=self._happened,
            at_s=self._clock.wall_s(),
            kind=kind,
            model=model,
            detail={"replica": replica, **detail},
        )
        self._happenings.append(happened)
        structlog.get_logger().info(kind, **happened.detail)

    # ---- what is told ----------------------------------------------------------------------------------

    def _state(self) -> PlaneState:
        self._look_at_versions()
        return PlaneState(
            plane=self._name,
            devices=self._crew.devices,
            replicas=self._crew.replicas(),
            spares=self._crew.spares(),
            warm_up_s=self._crew.warm_up_s,
            process_bytes=self._crew.process_bytes,
            room_bytes=self._crew.room_bytes(),
            cores=self._crew.cores(),
            versions=tuple(self._states.values()),
            routes=dict(self._gateway.routes()),
            withdrawn=tuple(self._withdrawals),
            happenings=tuple(self._happenings),
        )

    def _look_at_versions(self) -> None:
        """At those that have replicas, or to which something has happened: of thousands most sleep."""
        awake = set[Version]()
        for version in sorted(self._awake | self._gateway.changed):
            if version not in self._loads or version in self._withdrawals:
                continue
            served, load = self._gateway.find(*version), self._loads[version]
            self._states[version] = replace(
                version_state(served, self._load_s.get(version), self._crew.model_bytes.get(version)),
                threads=load.threads,
                is_resizable=load.format not in FIXED_THREADS,
                may_share=version not in self._crew.loners,
            )
            if served.replicas:
                awake.add(version)
        self._awake = awake
        self._gateway.changed.clear()


def version_state(served: ServedModel, load_s: float | None, model_bytes: int | None = None) -> VersionState:
    """How it is with a version; of its replicas ``load_s`` and ``model_bytes`` are known."""
    metrics, gauges = served.metrics, served.gauges()
    return VersionState(
        model=served.model,
        version=served.version,
        is_ready=served.is_ready,
        outcomes={**metrics.outcomes},
        latency=tuple(metrics.latency_s.counts),
        arrived_rows=metrics.arrived_rows,
        waiting_rows=gauges.waiting_rows,
        waiting=gauges.waiting,
        in_flight=gauges.in_flight,
        batch_times=metrics.batch_times(),
        busy_core_s=metrics.busy_core_s,
        max_rows=served.max_rows,
        policy=served.policy,
        load_s=load_s,
        model_bytes=model_bytes,
    )


async def within(timeout_s: float, event: asyncio.Event) -> None:
    """Wait for an event, at most so long."""
    # Not ``wait_for``, which in Python 3.11 loses a cancellation that comes together with the event.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
