"""The thin loop under rollouts: it asks ``rollout.step``, writes down what it says, and runs checks.

What is written down comes back with the deployments when they are read again, and only then it is acted on.
So a server that is killed at any point leaves a rollout as it was before a step or after it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping

import structlog

from forescale.control.checks import run_check
from forescale.control.rollout import Check, Sight, is_to_be_checked, share_of, stage_name, step
from forescale.core.clock import Clock
from forescale.core.errors import RegistryFailed
from forescale.engine.serve.orders import PlaneState, VersionState
from forescale.engine.serve.roster import State
from forescale.registry.rollout import Counts, Rollout
from forescale.registry.rollouts import Rollouts as Kept

CHECK_LIMIT_S = 600.0
_PAUSE_S = 1.0  # after something that the next attempt may find mended


class Rollouts:
    """Takes rollouts further. Use it in the thread of its event loop.

    Args:
        checks: commands by the names that rollouts call them by.
        on_change: called when something was written down and should be read.

    Attributes:
        url: of this server, for checks.
    """

    def __init__(
        self, kept: Kept, clock: Clock, checks: Mapping[str, str], on_change: Callable[[], object]
    ) -> None:
        self._kept = kept
        self._clock = clock
        self._checks = dict(checks)
        self._on_change = on_change
        self._writing: dict[str, int] = {}  # by model, the revision that is written or was last
        self._checking: set[tuple[int, int]] = set()  # rollouts and their stages
        self._checked: dict[int, Check] = {}
        self.url = ""

    @property
    def checks(self) -> tuple[str, ...]:
        """Names of the checks that rollouts may ask for."""
        return tuple(self._checks)

    def look(
        self,
        rollout: Rollout,
        seen: PlaneState,
        wanted: int,
        error: str | None,
        tasks: asyncio.TaskGroup,
    ) -> None:
        """Take one rollout a step further, if it is time. Nothing here waits.

        Args:
            wanted: replicas of a version that gets all requests.
            error: why the new version cannot be served, if so.
        """
        model = rollout.spec.model
        if self._writing.get(model, -1) > _place(rollout):
            return  # it is out of date
        sight = Sight(
            now_s=self._clock.wall_s(),
            ready=_ready(seen, model),
            wanted=max(1, wanted),
            counts={
                int(version.version): _counts(version) for version in seen.versions if version.model == model
            },
            error=error,
            check=self._checked.get(rollout.id),
        )
        decided = step(rollout, sight)
        if decided != rollout:
            self._writing[model] = _place(rollout) + 1
            tasks.create_task(self._write(decided))
        elif is_to_be_checked(rollout, sight):
            stage = rollout.id, rollout.progress.stage
            if stage not in self._checking:
                self._checking.add(stage)
                tasks.create_task(self._check(rollout, sight))

    async def _write(self, rollout: Rollout) -> None:
        spec, progress = rollout.spec, rollout.progress
        try:
            kept = await asyncio.to_thread(self._kept.write, rollout)
        except RegistryFailed as error:
            structlog.get_logger().error("rollout_not_kept", model=spec.model, error=str(error))
            await asyncio.sleep(_PAUSE_S)
            del self._writing[spec.model]
            return
        if kept is not None:
            structlog.get_logger().info(
                "rollout",
                model=spec.model,
                version=spec.number,
                state=rollout.state.value,
                stage=stage_name(rollout),
                reason=progress.reason,
            )
        self._on_change()

    async def _check(self, rollout: Rollout, seen: Sight) -> None:
        spec, stage = rollout.spec, rollout.progress.stage
        assert spec.check is not None
        if spec.check not in self._checks:
            passed, says = False, "the server does not know it any more"
        else:
            environment = {
                "FORESCALE_URL": self.url,
                "FORESCALE_MODEL": spec.model,
                "FORESCALE_VERSION": str(spec.number),
                "FORESCALE_STABLE_VERSION": str(spec.stable),
                "FORESCALE_SHARE": f"{share_of(spec, rollout.progress.routed):g}",
                "FORESCALE_REQUESTS": str(seen.counts.get(spec.number, Counts()).requests),
            }
            passed, says = await run_check(self._checks[spec.check], environment, CHECK_LIMIT_S)
        self._checked[rollout.id] = Check(stage=stage, is_passed=passed, says=says)
        self._checking.discard((rollout.id, stage))
        self._on_change()


def _ready(seen: PlaneState, model: str) -> Counter[int]:
    served = {version.version for version in seen.versions if version.model == model}
    return Counter(
        int(replica.version)
        for replica in seen.replicas
        if replica.model == model and replica.state is State.SERVING and replica.version in served
    )


def _counts(version: VersionState) -> Counts:
    requests = sum(version.outcomes.values())
    errors = requests - version.outcomes.get("ok", 0)
    return Counts(requests=requests, errors=errors, answers=tuple(version.latency))


def _place(rollout: Rollout) -> int:
    """Grows with every change of a model's rollouts, also from one rollout to the next."""
    return (rollout.id << 32) + rollout.revision
