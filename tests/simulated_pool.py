"""A pool and its data plane in virtual time: models are asked, sleep and are woken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np

from forescale.control.pool import Pool
from forescale.control.scale import ScalingRules
from forescale.core.errors import PeerGone
from forescale.engine.serve.metrics import SECONDS
from forescale.engine.serve.orders import (
    Command,
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
from forescale.engine.serve.roster import Replica, State
from forescale.engine.serve.routing import Route
from forescale.registry.registry import Registry
from version_states import version_state

LOOK_S = 0.25
LOAD_S = 0.6
WARM_UP_S = 2.0
ROWS_PER_S = 40.0
"""What a replica answers."""


class VirtualTime:
    """A clock that is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s


class SimulatedPlane:
    """Obeys as a data plane does; ``demand_per_s`` is what is asked of each model.

    A version to which nothing has happened is told as the same object as before.
    """

    def __init__(self, clock: VirtualTime, *, seed: int, room_bytes: int) -> None:
        self.demand_per_s: dict[str, float] = {}
        self.is_lost = False
        self.clock = clock
        self._rng = np.random.default_rng(seed)
        self._room_bytes = room_bytes
        self._planes = count(1)
        self._begin()

    def _begin(self) -> None:
        self._name = f"plane-{next(self._planes)}"
        self._numbers = count(1)
        self._versions: dict[tuple[str, str], VersionState] = {}
        self._routes: dict[str, Route] = {}
        self._replicas: dict[str, Replica] = {}
        self._since_s: dict[str, float] = {}
        self._withdrawn: list[tuple[str, str]] = []

    async def exchange(
        self, commands: Sequence[Command] = (), *, acknowledged: int = 0, wait_s: float = 0.0
    ) -> PlaneState:
        if self.is_lost:
            self.is_lost = False
            self._begin()
            raise PeerGone("it was killed")
        self._withdrawn.clear()
        for command in commands:
            self._obey(command)
        # Sometimes it answers early, for there are news.
        elapsed_s = wait_s * float(self._rng.choice([0.2, 1.0], p=[0.2, 0.8]))
        self.clock.now_s += elapsed_s
        self._go_on(elapsed_s)
        return self._state()

    def answer_now(self) -> None: ...

    def _obey(self, command: Command) -> None:
        match command:
            case Serve(load=load, policy=policy):
                self._versions[load.model, load.version] = version_state(
                    load.model,
                    load.version,
                    latency=(0,) * (len(SECONDS) + 1),
                    max_rows=16,
                    policy=policy,
                    threads=load.threads,
                )
                self._routes.setdefault(load.model, Route(version=load.version))
            case StartReplica(model=model, version=version, device=device, house=house):
                name = f"{model}.{version}.{next(self._numbers)}"
                self._replicas[name] = Replica(
                    name=name,
                    model=model,
                    version=version,
                    device=device,
                    house=house or name,
                    state=State.LOADING,
                    process=name,
                    threads=1,
                    cause=None,
                    attempts=0,
                    retry_s=0.0,
                )
                self._since_s[name] = self.clock.now_s
            case StopReplica(name=name):
                self._replicas[name] = replace(self._replicas[name], state=State.DRAINING)
            case Steer(model=model, version=version, policy=policy):
                self._change(model, version, policy=policy)
            case SetThreads(model=model, version=version, threads=threads):
                self._change(model, version, threads=threads)
            case SetRoute(model=model, route=route):
                self._routes[model] = route
            case Withdraw(model=model, version=version):
                self._withdraw(model, version)
            case _:
                raise AssertionError(command)

    def _change(self, model: str, version: str, **changed: Any) -> None:
        if (model, version) in self._versions:
            self._versions[model, version] = replace(self._versions[model, version], **changed)

    def _withdraw(self, model: str, version: str) -> None:
        del self._versions[model, version]
        self._withdrawn.append((model, version))
        for name, replica in self._replicas.items():
            if (replica.model, replica.version) == (model, version):
                self._replicas[name] = replace(replica, state=State.DRAINING)
        heirs = [other for name, other in self._versions if name == model]
        if not heirs:
            del self._routes[model]
        elif version in self._routes[model].versions():
            self._routes[model] = self._routes[model].without(version, heirs[-1])

    def _go_on(self, elapsed_s: float) -> None:
        draining = [name for name, replica in self._replicas.items() if replica.state is State.DRAINING]
        for name in draining:
            del self._replicas[name]
        for name, replica in self._replicas.items():
            if replica.state is State.LOADING and self.clock.now_s - self._since_s[name] >= LOAD_S:
                self._replicas[name] = replace(replica, state=State.SERVING)
                self._change(replica.model, replica.version, load_s=LOAD_S, model_bytes=50_000_000)
        for (model, version), state in list(self._versions.items()):
            replicas = sum(
                replica.state is State.SERVING and (replica.model, replica.version) == (model, version)
                for replica in self._replicas.values()
            )
            is_asked = model in self._routes and version in self._routes[model].versions()
            demand_per_s = self.demand_per_s.get(model, 0.0) * is_asked
            came = int(self._rng.poisson(demand_per_s * elapsed_s)) if demand_per_s else 0
            if not came and not replicas and not state.is_ready:
                continue
            done = min(state.waiting_rows + came, int(replicas * ROWS_PER_S * LOOK_S))
            waiting = state.waiting_rows + came - done
            self._change(
                model,
                version,
                is_ready=replicas > 0,
                arrived_rows=state.arrived_rows + came,
                waiting_rows=waiting,
                waiting=waiting,
                outcomes={"ok": state.outcomes["ok"] + done},
                latency=(state.latency[0] + done, *state.latency[1:]),
                batch_times={1: ((1.0, 0.02), (8.0, 0.1))} if done else state.batch_times,
                busy_core_s=state.busy_core_s + done / ROWS_PER_S,
            )

    def _state(self) -> PlaneState:
        starting = sum(replica.state is State.LOADING for replica in self._replicas.values())
        return PlaneState(
            plane=self._name,
            devices=("cpu0", "cpu1"),
            replicas=tuple(self._replicas.values()),
            spares=max(0, 1 - starting),
            warm_up_s=WARM_UP_S,
            process_bytes=100_000_000,
            room_bytes={"cpu0": self._room_bytes, "cpu1": self._room_bytes},
            cores={"cpu0": 2, "cpu1": 2},
            versions=tuple(self._versions.values()),
            routes=dict(self._routes),
            withdrawn=tuple(self._withdrawn),
        )


@dataclass(slots=True)
class Course:
    """What a pool did, step by step.

    Attributes:
        steps: what it commanded in each, what it knew of all models then, and what it showed.
        resting: models that the next one may pass over, after each; of those ``sleeping``.
        reasons: of all changes.
    """

    steps: list[tuple[object, ...]] = field(default_factory=list[tuple[object, ...]])
    resting: list[int] = field(default_factory=list[int])
    sleeping: list[int] = field(default_factory=list[int])
    reasons: list[str] = field(default_factory=list[str])


async def run_pool(
    registry: Registry,
    plane: SimulatedPlane,
    clock: VirtualTime,
    rules: ScalingRules,
    steps: int,
    script: Callable[[int, Pool], None],
    *,
    forgets: bool,
) -> Course:
    """Let a pool decide so often; ``script`` is called before each step.

    Args:
        forgets: whether it looks at all models in each step.
    """
    pool, course = Pool(registry=registry, plane=plane, clock=clock, scaling=rules), Course()
    commands: Sequence[Command] = ()
    async with asyncio.TaskGroup() as pool._tasks:
        for number in range(steps):
            script(number, pool)
            try:
                await pool._look(commands)
            except PeerGone as error:
                pool._lose_plane(str(error))
                commands = ()
                continue
            await _settled(pool)
            if forgets:
                pool._sleepers.wake()
            commands = await pool._decide()
            await _settled(pool)
            shown = [pool.status(deployment) for deployment in registry.deployments()]
            scales, housing = pool._scaler._state.models, pool._homes._housing
            course.steps.append((commands, scales, pool._scaler._state.forecast._asked, housing, shown))
            course.resting.append(len(pool._sleepers._resting))
            course.sleeping.append(sum(scale.wanted == 0 for scale in scales.values()))
            course.reasons += [scale.reason for scale in scales.values()]
    return course


async def _settled(pool: Pool) -> None:
    """What it does in threads is done: when that is would be chance."""
    while pool._tasks._tasks:  # pyright: ignore[reportAttributeAccessIssue] - nobody else knows them
        await asyncio.sleep(0.001)
