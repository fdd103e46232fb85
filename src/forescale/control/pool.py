"""The thin loop that makes what is deployed what is served: it looks, asks ``serving.step``, and acts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, assert_never

import structlog

from forescale.control.accounts import Accounts
from forescale.control.data_plane import DataPlane
from forescale.control.diary import Diary
from forescale.control.homes import Homes
from forescale.control.knowledge import Knowledge
from forescale.control.memory import Memory, size
from forescale.control.observation import observe, replica_as_json
from forescale.control.rollouts import Rollouts
from forescale.control.scale import ScalingRules
from forescale.control.scaler import Scaler
from forescale.control.serving import (
    Command,
    Serve,
    SetRoute,
    Short,
    StartReplica,
    StopReplica,
    Version,
    Withdraw,
    step,
)
from forescale.control.sleepers import Sleepers, without
from forescale.core.clock import Clock
from forescale.core.errors import ForescaleError, PeerGone, RegistryFailed
from forescale.core.signature import Signature
from forescale.engine.serve import orders
from forescale.engine.serve.formats import Order, format_named
from forescale.engine.serve.messages import Load
from forescale.engine.serve.plane import within
from forescale.engine.serve.roster import State
from forescale.registry.records import MOST_ROWS, Deployment, DeploymentSpec, Happening
from forescale.registry.registry import Registry
from forescale.registry.rollout import Rollout

_LOOK_S = 0.25  # how often it looks though nobody said that something changed
_PAUSE_S = 1.0  # after something that the next attempt may find mended
_BY = "forescale"
_HOPELESS_LOSSES = 2  # in a row, with no replica of that version getting ready between


class Pool:
    """What one server serves. Use it in the thread of its event loop.

    Args:
        trust: whether code in models' files may run.
        checks: commands that rollouts may ask for, by name.
        knowledge: of before; gets what is learned.

    Attributes:
        rollouts: what takes them further.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        plane: DataPlane,
        clock: Clock,
        trust: bool = False,
        scaling: ScalingRules | None = None,
        checks: Mapping[str, str] | None = None,
        knowledge: Knowledge | None = None,
    ) -> None:
        self._registry = registry
        self._plane = plane
        self._clock = clock
        self._trust = trust
        self._seen = orders.PlaneState(plane="", devices=())
        self._wanted: tuple[DeploymentSpec, ...] | None = None
        self._running: Mapping[str, Rollout] = {}
        self._is_stale = True
        self._is_refreshing = False
        self._loads: dict[Version, Load] = {}
        self._faults: dict[Version, str] = {}
        self._losses: Counter[Version] = Counter()
        self._preparing: set[Version] = set()
        knowledge = knowledge or Knowledge()
        self._accounts = Accounts(registry, knowledge)
        self._memory = Memory()
        self._short: dict[Version, Short] = {}
        self._diary = Diary(registry)
        self._shown: object = None
        self._news = asyncio.Event()
        self.change = 0
        self.is_ending = False
        self._scaler = Scaler(scaling, knowledge)
        self._sleepers = Sleepers()
        self._homes = Homes((scaling or ScalingRules()).latency_s, knowledge)
        self.rollouts = Rollouts(registry.rollouts, clock, checks or {}, self._read_again)

    # ---- what others ask -------------------------------------------------------------------------------

    @property
    def checks(self) -> tuple[str, ...]:
        """Names of the checks that rollouts may ask for."""
        return self.rollouts.checks

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

    async def check_room(self, spec: DeploymentSpec) -> str | None:
        """Whether the pool can hold a deployment; what memory it lacks as long as nothing else leaves.

        Raises:
            NoRoom: it cannot, beside what the others have at least.
            RegistryFailed: what is deployed cannot be read.
        """
        await self._accounts.check(spec, self._seen, self._homes.small)
        self._memory = self._accounts.memory(self._seen, self._homes.small)
        observed = observe(self._seen, self._faults, self._memory)
        commands = step([spec], observed, {spec.model: max(1, spec.min_replicas)})
        return next((self._told(command) for command in commands if isinstance(command, Short)), None)

    def look_again(self) -> None:
        """The deployments have changed."""
        self._faults.clear()  # whoever deploys again may have mended what was wrong
        self._read_again()

    def _read_again(self) -> None:
        self._is_stale = True
        self._plane.answer_now()

    def stop_waiting(self) -> None:
        """The server ends: whoever waits for a change is answered now."""
        self.is_ending = True
        self._news.set()

    async def wait_for_change(self, timeout_s: float) -> None:
        """Until ``change`` is another, at most so long."""
        await within(timeout_s, self._news)

    def status(self, deployment: Deployment) -> dict[str, Any]:
        """How far a deployment is, as JSON: ``state`` is starting, serving or failing."""
        spec = deployment.spec
        replicas = [replica for replica in self._seen.replicas if replica.model == spec.model]
        mine = [replica for replica in replicas if replica.version == str(spec.number)]
        serving = sum(replica.state is State.SERVING for replica in mine)
        error = self._error_of((spec.model, spec.number))
        short = next((each for version, each in self._short.items() if version[0] == spec.model), None)
        scaling = self._scaler.status(spec)
        if serving >= min(max(spec.min_replicas, 1), scaling["wanted"]) and self._answers(spec):
            state = "serving"
        else:
            state = "failing" if error else "starting"
        return {
            "state": state,
            "error": error,
            "short": short and self._told(short),
            "replica_bytes": self._memory.replica_bytes((spec.model, spec.number)),
            "scaling": scaling,
            "change": self.change,
            "replicas": [replica_as_json(replica) for replica in replicas],
            "requests": self._counts(spec.model),
            "versions": [
                {"version": int(each.version), "requests": dict(each.outcomes)}
                for each in self._seen.versions
                if each.model == spec.model
            ],
        }

    async def finish(self) -> None:
        """Write down what has happened; after ``run`` has ended."""
        await self._diary.finish()

    # ---- the loop --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep what is served like what is deployed, until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            self._tasks.create_task(self._diary.write())
            commands: Sequence[orders.Command] = ()
            while True:
                try:
                    await self._look(commands)
                    commands = await self._decide()
                except PeerGone as error:
                    commands = ()
                    if not self._seen.plane:  # nor did the one before it answer
                        await asyncio.sleep(_PAUSE_S)
                    self._lose_plane(str(error))
                except ForescaleError as error:
                    structlog.get_logger().error("serving_step_failed", error=str(error))
                    commands = ()
                    await asyncio.sleep(_PAUSE_S)

    async def _look(self, commands: Sequence[orders.Command]) -> None:
        if self._is_stale and not self._is_refreshing:
            self._is_stale, self._is_refreshing = False, True
            self._tasks.create_task(self._refresh())
        acknowledged = self._diary.written(self._seen.plane)
        self._seen = await self._plane.exchange(commands, acknowledged=acknowledged, wait_s=_LOOK_S)
        for happened in self._diary.take(self._seen):
            self._note(happened)

    async def _decide(self) -> Sequence[orders.Command]:
        if self._wanted is None:
            return ()  # what is deployed is not known yet
        wanted, running, now_s = self._wanted, self._running, self._clock.monotonic_s()
        asleep = self._asleep(now_s)
        awake = [spec for spec in wanted if spec.model not in asleep]
        seen = without(asleep, self._seen)
        self._memory = self._accounts.memory(seen, self._homes.small)
        for happening in await self._scaler.decide(awake, seen, now_s, self._memory, asleep):
            self._diary.put(happening)
        steered = tuple(self._scaler.steer(awake, seen))
        counts = self._scaler.counts()
        for model, rollout in running.items():
            error = self._error_of((model, rollout.spec.number))
            self.rollouts.look(rollout, seen, counts.get(model, 1), error, self._tasks)
        observed = observe(seen, self._faults, self._memory)
        homes = self._homes.decide(
            awake, seen, counts, self._memory, rollouts=running.keys(), now_s=now_s, asleep=asleep
        )
        commands = step(awake, observed, counts, running, homes)
        self._sleepers.settle(self._scaler.resting, (*commands, *steered))
        self._short = {command.version: command for command in commands if isinstance(command, Short)}
        self._tell()
        return [*(order for command in commands for order in self._order(command)), *steered]

    def _asleep(self, now_s: float) -> frozenset[str]:
        """Models that need not be looked at now."""
        assert self._wanted is not None
        if self._scaler.is_renewed:
            self._sleepers.wake()
        busy = {*self._running, *(model for model, _ in self._faults)}
        is_counting = self._scaler.is_counting(now_s)
        return self._sleepers.look(self._wanted, self._seen, busy, is_counting=is_counting)

    async def _refresh(self) -> None:
        try:
            # In this order: a rollout that ends in between is seen to be from another version.
            running = await asyncio.to_thread(self._registry.rollouts.running)
            found = await asyncio.to_thread(self._registry.deployments)
            wanted = tuple(deployment.spec for deployment in found)
            deployed = {(spec.model, spec.number) for spec in wanted}
            deployed |= {(rollout.spec.model, rollout.spec.number) for rollout in running}
            await self._accounts.learn(deployed)
        except RegistryFailed as error:
            structlog.get_logger().error("deployments_unknown", error=str(error))
            await asyncio.sleep(_PAUSE_S)
            self._is_stale = True
        else:
            self._wanted = wanted
            self._running = {rollout.spec.model: rollout for rollout in running}
            for known in (self._loads, self._losses):
                for version in known.keys() - deployed:
                    del known[version]
        self._is_refreshing = False
        self._plane.answer_now()

    def _lose_plane(self, cause: str) -> None:
        structlog.get_logger().error("data_plane_lost", cause=cause)
        self._diary.put(Happening(kind="data_plane_lost", subject="", by=_BY, detail={"cause": cause}))
        self._seen = orders.PlaneState(plane="", devices=())
        self._tell()

    def _order(self, command: Command) -> Iterator[orders.Command]:
        """What the data plane is told to do."""
        match command:
            case Serve(version=version):
                if version in self._loads:
                    yield orders.Serve(load=self._scaler.told(self._loads[version]))
                elif version not in self._preparing:
                    self._preparing.add(version)
                    self._tasks.create_task(self._prepare(version))
            case StartReplica(version=(model, number), device=device, house=house):
                yield orders.StartReplica(model=model, version=str(number), device=device, house=house)
            case StopReplica(name=name):
                yield orders.StopReplica(name=name)
            case SetRoute(model=model, route=route):
                yield orders.SetRoute(model=model, route=route)
            case Withdraw(version=(model, number)):
                yield orders.Withdraw(model=model, version=str(number))
            case Short():
                pass  # it is shown
            case _:
                assert_never(command)

    async def _prepare(self, version: Version) -> None:
        """Find a version's file whole, so that it can be served."""
        model, number = version
        try:
            found = await asyncio.to_thread(self._registry.version, model, number)
            path = await asyncio.to_thread(self._registry.artifact, found)
        except ForescaleError as error:
            self._faults[version] = str(error)
            detail = {"version": number, "cause": str(error)}
            structlog.get_logger().warning("version_unusable", model=model, **detail)
            self._diary.put(Happening(kind="version_unusable", subject=model, by=_BY, detail=detail))
        else:
            self._loads[version] = Load(
                model=model,
                version=str(number),
                format=found.format,
                path=str(path),
                options=found.options,
                signature=found.signature,
                max_rows=MOST_ROWS,
                trust=self._trust,
            )
        self._preparing.remove(version)
        self._plane.answer_now()

    def _note(self, happened: orders.Happened) -> None:
        log = structlog.get_logger()
        tell = log.warning if "cause" in happened.detail else log.info
        tell(happened.kind, model=happened.model, **happened.detail)
        version = _version_of(happened.detail["replica"])
        if happened.kind == "replica_lost":
            self._losses[version] += 1
        elif happened.kind == "replica_ready":
            self._losses.pop(version, None)

    # ---- what is shown ---------------------------------------------------------------------------------

    def _tell(self) -> None:
        """Wake those who wait for a change, if there was one."""
        seen = self._seen
        shown = (
            seen.replicas,
            tuple((version.model, version.version) for version in seen.versions),
            dict(seen.routes),
            tuple(self._faults.items()),
            self._wanted,
            self._running,
            self._scaler.counts(),
            self._short,
        )
        if shown != self._shown:
            self._shown = shown
            self.change += 1
            self._news.set()
            self._news = asyncio.Event()

    def _error_of(self, version: Version) -> str | None:
        """Why a version does not get on, if it does not."""
        if version in self._faults:
            return self._faults[version]
        if self._losses[version] < _HOPELESS_LOSSES:
            return None
        name = version[0], str(version[1])
        mine = (replica for replica in self._seen.replicas if (replica.model, replica.version) == name)
        return next((replica.cause for replica in mine if replica.cause), None)

    def _told(self, short: Short) -> str:
        model, number = short.version
        return (
            f"no room for {short.replicas} more of {model}@{number}: {self._memory.told(short.version)}, and "
            f"{size(short.missing_bytes)} are missing on the device that has most left"
        )

    def _answers(self, spec: DeploymentSpec) -> bool:
        """Whether requests that name no version go to the deployed one, or by its rollout."""
        route = self._seen.routes.get(spec.model)
        return route is not None and (route.version == str(spec.number) or spec.model in self._running)

    def _counts(self, model: str) -> dict[str, int]:
        route = self._seen.routes.get(model)
        for version in self._seen.versions:
            if route is not None and (version.model, version.version) == (model, route.version):
                return {**version.outcomes, "waiting": version.waiting, "in_flight": version.in_flight}
        return {}


def _version_of(replica: str) -> Version:
    """A replica is named MODEL.VERSION.NUMBER."""
    model, number, _ = replica.rsplit(".", 2)
    return model, int(number)
