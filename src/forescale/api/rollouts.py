"""Routes of rollouts: start one, look at it, promote it, go back."""

from __future__ import annotations

import asyncio
from typing import Protocol

from pydantic import Field

from forescale.api.http import Answer, Refused, Request, Route, Strict, route
from forescale.api.shapes import RolledBackShape, RolloutShape
from forescale.control.rollout import share_of, stage_name, urged
from forescale.core.errors import InvalidInput, NotFound
from forescale.registry.records import DeploymentSpec
from forescale.registry.registry import Registry
from forescale.registry.rollout import Rollout, RolloutSpec, State, Strategy

_ANYBODY = "anonymous"
_LONGEST_WAIT_S = 60.0
_ATTEMPTS = 10  # when others change the same rollout


class Pool(Protocol):
    """What serves the deployments, as far as rollouts ask it.

    Attributes:
        change: another number whenever a status has changed.
        is_ending: nobody should wait for a change any more.
        checks: names of the checks that rollouts may ask for.
    """

    @property
    def change(self) -> int: ...

    @property
    def is_ending(self) -> bool: ...

    @property
    def checks(self) -> tuple[str, ...]: ...

    async def check_room(self, spec: DeploymentSpec) -> str | None:
        """Whether the pool can hold a deployment; what memory it lacks as long as nothing else leaves.

        Raises:
            NoRoom: it cannot, beside what the others have at least.
        """
        ...

    def look_again(self) -> None:
        """The deployments have changed."""
        ...

    async def wait_for_change(self, timeout_s: float) -> None:
        """Until ``change`` is another, at most so long."""
        ...


class _By(Strict):
    by: str = _ANYBODY


class _NewRollout(Strict):
    """``shares``: of a canary or shadow, from 0 to 1, stage by stage; ``stage_s``: None: a usual time."""

    version: int | str
    strategy: Strategy
    shares: list[float] = Field(default_factory=list[float])
    stage_s: float | None = None
    proof_s: float = 300.0
    min_requests: int = 100
    patience_s: float = 3600.0
    max_error_fraction: float = 0.01
    max_slowdown: float = 1.5
    check: str | None = None
    is_manual: bool = False


class _Promotion(Strict):
    is_full: bool = False


class _Waiting(Strict):
    """``after``: a ``change``; the answer waits for another, at most ``timeout_s``."""

    after: int | None = None
    timeout_s: float = Field(default=30.0, ge=0.0, le=_LONGEST_WAIT_S)


def rollout_routes(registry: Registry, pool: Pool) -> tuple[Route, ...]:
    """What ``management`` is to know of rollouts."""
    routes = _Routes(registry, pool)
    deployment = "/api/v1/deployments/{model}"
    return (
        route(
            f"GET {deployment}/rollout",
            "A model's rollout that runs, or its last one, now or when it has changed.",
            routes.rollout,
            query=_Waiting,
            gives=RolloutShape,
        ),
        route(
            f"POST {deployment}/rollout",
            "Lets a version take over from the deployed one, stage by stage.",
            routes.start,
            takes=_NewRollout,
            query=_By,
            gives=RolloutShape,
            status=201,
            refuses=(409,),
        ),
        route(
            f"POST {deployment}/promote",
            "Lets a rollout go on to its next stage, or to its end.",
            routes.promote,
            takes=_Promotion,
            query=_By,
            gives=RolloutShape,
            refuses=(503,),
        ),
        route(
            f"POST {deployment}/rollback",
            "Goes back to the version before.",
            routes.roll_back,
            query=_By,
            gives=RolledBackShape,
        ),
    )


class _Routes:
    def __init__(self, registry: Registry, pool: Pool) -> None:
        self._registry = registry
        self._pool = pool

    async def rollout(self, request: Request) -> Answer:
        model, waiting = request.path["model"], request.asked(_Waiting)
        loop = asyncio.get_running_loop()
        until_s = loop.time() + waiting.timeout_s
        while waiting.after == self._pool.change and loop.time() < until_s and not self._pool.is_ending:
            await self._pool.wait_for_change(until_s - loop.time())
        change = self._pool.change
        found = await asyncio.to_thread(self._registry.rollouts.latest, model)
        if found is None:
            raise Refused(404, f"{model} was never rolled out")
        return Answer(body={**rollout_as_json(found), "change": change})

    async def start(self, request: Request) -> Answer:
        model, by = request.path["model"], request.asked(_By).by
        wanted = await request.body(_NewRollout)
        if wanted.check is not None and wanted.check not in self._pool.checks:
            known = ", ".join(self._pool.checks) or "none"
            raise InvalidInput(
                f"this server knows no check {wanted.check[:80]} (it knows {known}); "
                "start it with --check NAME=COMMAND"
            )

        spec = await asyncio.to_thread(_spec, self._registry, model, wanted)
        await self._pool.check_room(DeploymentSpec(model=model, number=spec.number))
        rollout = await asyncio.to_thread(self._registry.rollouts.start, spec, by=by)
        self._pool.look_again()
        return Answer(status=201, body={**rollout_as_json(rollout), "change": self._pool.change})

    async def promote(self, request: Request) -> Answer:
        model, by = request.path["model"], request.asked(_By).by
        wanted = await request.body(_Promotion)
        rollout = await asyncio.to_thread(_promote, self._registry, model, by, wanted.is_full)
        self._pool.look_again()
        return Answer(body={**rollout_as_json(rollout), "change": self._pool.change})

    async def roll_back(self, request: Request) -> Answer:
        model, by = request.path["model"], request.asked(_By).by
        number = await asyncio.to_thread(self._registry.rollouts.roll_back, model, by=by)
        self._pool.look_again()
        return Answer(body={"model": model, "version": number})


def _spec(registry: Registry, model: str, wanted: _NewRollout) -> RolloutSpec:
    number = registry.version(model, wanted.version).number
    stable = next((each.spec.number for each in registry.deployments() if each.spec.model == model), None)
    if stable is None:
        raise NotFound(f"{model} is not deployed: there is nothing that {model}@{number} could replace")
    is_at_once = wanted.strategy is Strategy.BLUE_GREEN
    usual_s = 0.0 if is_at_once else 60.0
    return RolloutSpec(
        model=model,
        number=number,
        stable=stable,
        strategy=wanted.strategy,
        shares=tuple(wanted.shares) or ((0.0,) if is_at_once else ()),
        stage_s=usual_s if wanted.stage_s is None else wanted.stage_s,
        proof_s=wanted.proof_s,
        min_requests=wanted.min_requests,
        patience_s=wanted.patience_s,
        max_error_fraction=wanted.max_error_fraction,
        max_slowdown=wanted.max_slowdown,
        check=wanted.check,
        is_manual=wanted.is_manual,
    )


def _promote(registry: Registry, model: str, by: str, fully: bool) -> Rollout:
    for _ in range(_ATTEMPTS):
        rollout = registry.rollouts.latest(model)
        if rollout is None or rollout.state is not State.RUNNING:
            raise NotFound(f"no new version of {model} is being rolled out")
        kept = registry.rollouts.write(urged(rollout, registry.now_s(), by, fully=fully), by=by)
        if kept is not None:
            return kept
    raise Refused(503, f"the rollout of {model} changes all the time; ask again", {"retry-after": "1"})


def rollout_as_json(rollout: Rollout) -> RolloutShape:
    spec, progress = rollout.spec, rollout.progress
    return {
        "model": spec.model,
        "version": spec.number,
        "stable_version": spec.stable,
        "strategy": spec.strategy.value,
        "state": rollout.state.value,
        "shares": spec.shares,
        "stage": progress.stage,
        "stage_name": stage_name(rollout),
        "is_open": progress.opened_s is not None,
        "share": share_of(spec, progress.routed),
        "reason": progress.reason,
        "check": spec.check,
        "is_checked": progress.is_checked,
        "is_manual": spec.is_manual,
        "stage_s": spec.stage_s,
        "proof_s": spec.proof_s,
        "min_requests": spec.min_requests,
        "patience_s": spec.patience_s,
        "max_error_fraction": spec.max_error_fraction,
        "max_slowdown": spec.max_slowdown,
        "started_at_s": rollout.started_s,
        "started_by": rollout.started_by,
        "ended_at_s": rollout.ended_s,
    }
