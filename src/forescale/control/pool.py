"""The thin loop that makes what is deployed what is served: it looks, asks ``serving.step``, and acts."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_never

import structlog

from forescale.control.scaler import Scaler
from forescale.control.scaling import ScalingRules
from forescale.control.serving import (
    Command,
    Observation,
    Phase,
    Prefer,
    Replica,
    Serve,
    StartReplica,
    StopReplica,
    Version,
    Withdraw,
    step,
)
from forescale.core.clock import Clock
from forescale.core.errors import ForescaleError, NotServed, RegistryFailed
from forescale.core.signature import Signature
from forescale.engine.serve import crew as engine
from forescale.engine.serve.formats import Order, format_named
from forescale.engine.serve.gateway import Gateway, Link
from forescale.engine.serve.messages import Failed, FromReplica, Hello, Load, Warm
from forescale.registry.records import Deployment, DeploymentSpec, Happening
from forescale.registry.registry import Registry

_LOOK_S = 0.25  # how often it looks though nobody said that something changed
_PAUSE_S = 1.0  # after something that the next attempt may find mended
_BY = "forescale"
_HOPELESS_LOSSES = 2  # in a row, with no replica of that version getting ready between
_PHASES = {
    engine.State.WAITING: Phase.STARTING,
    engine.State.LOADING: Phase.STARTING,
    engine.State.SERVING: Phase.READY,
    engine.State.DRAINING: Phase.LEAVING,
}


class Pool:
    """Replicas and gateway of one server. Use it in the thread of its event loop.

    Args:
        trust: whether code in models' files may run.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        crew: engine.Crew,
        gateway: Gateway,
        link: Link,
        clock: Clock,
        trust: bool = False,
        scaling: ScalingRules | None = None,
    ) -> None:
        self._registry = registry
        self._crew = crew
        self._gateway = gateway
        self._clock = clock
        self._trust = trust
        self._wanted: tuple[DeploymentSpec, ...] = ()
        self._is_stale = True
        self._is_refreshing = False
        self._loads: dict[Version, Load] = {}
        self._faults: dict[Version, str] = {}
        self._losses: Counter[Version] = Counter()
        self._preparing: set[Version] = set()
        self._withdrawals: set[Version] = set()
        self._happenings: asyncio.Queue[Happening] = asyncio.Queue()
        self._wake = asyncio.Event()
        self._shown: object = None
        self._news = asyncio.Event()
        self.change = 0
        self.is_ending = False
        self._scaler = Scaler(gateway, crew, scaling)
        self._starving = asyncio.Event()
        gateway.on_starving = self._starving.set
        link.listen(self._hear)

    # ---- what others ask -------------------------------------------------------------------------------

    def inspect(
        self,
        path: Path,
        format: str,  # noqa: A002 - the word for it
        options: Mapping[str, Any],
        declared: Signature | None,
    ) -> Signature:
        """What a model takes and gives, as its file or its maker says; may take a while. From any thread.

        Raises:
            InvalidInput: it cannot be served.
        """
        order = Order(path=path, options=options, signature=declared, trust=self._trust)
        return format_named(format).inspect(order)

    def look_again(self) -> None:
        """The deployments have changed."""
        self._is_stale = True
        self._faults.clear()  # whoever deploys again may have mended what was wrong
        self._wake.set()

    def stop_waiting(self) -> None:
        """The server ends: whoever waits for a change is answered now."""
        self.is_ending = True
        self._news.set()

    async def wait_for_change(self, timeout_s: float) -> None:
        """Until ``change`` is another, at most so long."""
        await _within(timeout_s, self._news)

    def status(self, deployment: Deployment) -> dict[str, Any]:
        """How far a deployment is, as JSON: ``state`` is starting, serving or failing."""
        spec = deployment.spec
        replicas = [replica for replica in self._crew.replicas() if replica.model == spec.model]
        mine = [replica for replica in replicas if replica.version == str(spec.number)]
        serving = sum(replica.state is engine.State.SERVING for replica in mine)
        error = self._error((spec.model, spec.number), mine)
        scaling = self._scaler.status(spec)
        if serving >= min(max(spec.min_replicas, 1), scaling["wanted"]) and self._answers(spec):
            state = "serving"
        else:
            state = "failing" if error else "starting"
        return {
            "state": state,
            "error": error,
            "scaling": scaling,
            "change": self.change,
            "replicas": [_replica_as_json(replica) for replica in replicas],
            "requests": self._counts(spec.model),
        }

    # ---- the loop --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep what is served like what is deployed, until cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._crew.fileno(), self._wake.set)
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._tasks.create_task(self._write_down())
                self._tasks.create_task(self._scale())
                while True:
                    self._wake.clear()
                    try:
                        self._look()
                    except ForescaleError as error:
                        structlog.get_logger().error("serving_step_failed", error=str(error))
                        await asyncio.sleep(_PAUSE_S)
                    await _within(_LOOK_S, self._wake)
        finally:
            loop.remove_reader(self._crew.fileno())

    def _look(self) -> None:
        """Nothing here waits, least of all for the registry: a replica may be lost at any time."""
        self._note(self._crew.poll(self._clock.monotonic_s()))
        if self._is_stale and not self._is_refreshing:
            self._is_stale, self._is_refreshing = False, True
            self._tasks.create_task(self._refresh())
        for command in step(self._wanted, self._observe(), self._scaler.counts()):
            self._do(command)
        self._tell()

    async def _refresh(self) -> None:
        try:
            found = await asyncio.to_thread(self._registry.deployments)
        except RegistryFailed as error:
            structlog.get_logger().error("deployments_unknown", error=str(error))
            await asyncio.sleep(_PAUSE_S)
            self._is_stale = True
        else:
            self._wanted = tuple(deployment.spec for deployment in found)
        self._is_refreshing = False
        self._wake.set()

    async def _scale(self) -> None:
        while True:
            self._starving.clear()
            for happening in await self._scaler.decide(self._wanted, self._clock.monotonic_s()):
                self._happenings.put_nowait(happening)
                self._wake.set()
            await _within(_LOOK_S, self._starving)

    async def _write_down(self) -> None:
        while True:
            happening = await self._happenings.get()
            try:
                await asyncio.to_thread(self._registry.record, happening)
            except RegistryFailed as error:
                structlog.get_logger().error("event_not_kept", error=str(error))

    def _observe(self) -> Observation:
        return Observation(
            devices=self._crew.devices,
            replicas=tuple(
                Replica(
                    name=replica.name,
                    version=(replica.model, int(replica.version)),
                    device=replica.device,
                    phase=_PHASES[replica.state],
                )
                for replica in self._crew.replicas()
            ),
            served=frozenset(
                version
                for served in self._gateway.all()
                if (version := (served.model, int(served.version))) not in self._withdrawals
            ),
            withdrawn=frozenset(self._withdrawals),
            unusable=frozenset(self._faults),
        )

    def _do(self, command: Command) -> None:
        match command:
            case Serve(version=version):
                if version not in self._preparing:
                    self._preparing.add(version)
                    self._tasks.create_task(self._serve(version))
            case StartReplica(version=version, device=device):
                if version in self._loads:
                    self._crew.place(self._loads[version], device, self._clock.monotonic_s())
            case StopReplica(name=name):
                self._stop(name)
            case Prefer(version=(model, number)):
                self._gateway.set_default(model, str(number))
            case Withdraw(version=version):
                self._withdrawals.add(version)
                self._tasks.create_task(self._withdraw(version))
            case _:
                assert_never(command)

    async def _serve(self, version: Version) -> None:
        """Take requests to a version when its file has been found whole."""
        model, number = version
        try:
            found = await asyncio.to_thread(self._registry.version, model, number)
            path = await asyncio.to_thread(self._registry.artifact, found)
        except ForescaleError as error:
            self._faults[version] = str(error)
            self._happen("version_unusable", model, {"version": number, "cause": str(error)})
        else:
            self._loads[version] = Load(
                model=model,
                version=str(number),
                format=found.format,
                path=str(path),
                options=found.options,
                signature=found.signature,
                trust=self._trust,
            )
            self._gateway.serve(model, str(number), found.signature)
        self._preparing.remove(version)
        self._wake.set()

    def _stop(self, name: str) -> None:
        process = self._crew.remove(name, self._clock.monotonic_s())
        if process is not None:
            self._gateway.drain(process)

    async def _withdraw(self, version: Version) -> None:
        model, number = version
        await self._gateway.retire(model, str(number))
        for replica in self._crew.replicas():
            if (replica.model, replica.version) == (model, str(number)):
                self._stop(replica.name)
        self._loads.pop(version, None)
        self._losses.pop(version, None)
        self._withdrawals.remove(version)
        self._wake.set()

    # ---- what replicas say -----------------------------------------------------------------------------

    def _hear(self, process: str, said: FromReplica, _frames: tuple[memoryview, ...]) -> None:
        self._crew.heard(process, said, self._clock.monotonic_s())
        if isinstance(said, Warm | Hello) or (isinstance(said, Failed) and said.batch is None):
            self._wake.set()

    def _note(self, events: tuple[engine.CrewEvent, ...]) -> None:
        for event in events:
            match event:
                case engine.Ready(hello=hello):
                    self._scaler.loaded(hello.model, hello.load_s)
                    self._losses.pop((hello.model, int(hello.version)), None)
                    detail = {"replica": event.replica, "version": hello.version, "load_s": hello.load_s}
                    self._happen("replica_ready", hello.model, detail)
                case engine.Lost(process=process, replica=replica, cause=cause):
                    self._gateway.lose(process)
                    version = _version_of(replica)
                    self._losses[version] += 1
                    self._happen("replica_lost", version[0], {"replica": replica, "cause": cause})
                case engine.Ended(process=process, replica=replica):
                    self._gateway.lose(process)
                    self._happen("replica_ended", _version_of(replica)[0], {"replica": replica})
                case _:
                    assert_never(event)

    def _happen(self, kind: str, model: str, detail: Mapping[str, Any]) -> None:
        log = structlog.get_logger()
        (log.warning if "cause" in detail else log.info)(kind, model=model, **detail)
        self._happenings.put_nowait(Happening(kind=kind, subject=model, by=_BY, detail=detail))

    # ---- what is shown ---------------------------------------------------------------------------------

    def _tell(self) -> None:
        """Wake those who wait for a change, if there was one."""
        shown = (
            self._crew.replicas(),
            tuple((served.model, served.version) for served in self._gateway.all()),
            tuple(self._faults.items()),
            self._wanted,
            self._scaler.counts(),
        )
        if shown != self._shown:
            self._shown = shown
            self.change += 1
            self._news.set()
            self._news = asyncio.Event()

    def _error(self, version: Version, replicas: list[engine.Replica]) -> str | None:
        """Why a deployment does not get on, if it does not."""
        if version in self._faults:
            return self._faults[version]
        if self._losses[version] < _HOPELESS_LOSSES:
            return None
        return next((replica.cause for replica in replicas if replica.cause), None)

    def _answers(self, spec: DeploymentSpec) -> bool:
        """Whether requests that name no version go to the deployed one."""
        try:
            return self._gateway.find(spec.model).version == str(spec.number)
        except NotServed:
            return False

    def _counts(self, model: str) -> dict[str, int]:
        try:
            served = self._gateway.find(model)
        except NotServed:
            return {}
        gauges = served.gauges()
        return {**served.metrics.outcomes, "waiting": gauges.waiting, "in_flight": gauges.in_flight}


async def _within(timeout_s: float, event: asyncio.Event) -> None:
    # Not ``wait_for``, which in Python 3.11 loses a cancellation that comes together with the event.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()


def _version_of(replica: str) -> Version:
    """A replica is named MODEL.VERSION.NUMBER."""
    model, number, _ = replica.rsplit(".", 2)
    return model, int(number)


def _replica_as_json(replica: engine.Replica) -> dict[str, Any]:
    return {
        "name": replica.name,
        "version": int(replica.version),
        "device": replica.device,
        "state": replica.state.value,
        "process": replica.process,
        "attempts": replica.attempts,
        "cause": replica.cause,
    }
