"""How a new version takes over, stage by stage, or is taken back. Pure.

``step`` decides on what is written down of a rollout and on what is seen of both versions, and says what is
to be written down next; nothing else is remembered, so that whoever reads it can go on from there. Only
what is written down counts: ``route`` and ``replicas`` say what follows from it for the gateway and the pool.

A stage is opened when the new version has the replicas for it, and only then requests go by it. It is left
for the next one after its time, with its requests, when nothing seems worse and the check has succeeded.
What is certainly worse takes the new version back at once; what has not become clear in time does so, too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import ceil

from forescale.control.evidence import proven_worse, seems_worse
from forescale.engine.serve.metrics import SECONDS
from forescale.engine.serve.routing import Route
from forescale.registry.rollout import Counts, Rollout, RolloutSpec, State, Strategy

CANARY, STABLE = "canary", "stable"
"""Values of the route's header that choose the new and the old version of a rollout."""

_TINY = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What the user's command said in a stage; ``says`` is its last line."""

    stage: int
    is_passed: bool
    says: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What is seen of a rollout.

    Attributes:
        now_s: seconds since the Unix epoch.
        ready: replicas that answer, by version.
        wanted: replicas of a version that gets all requests.
        counts: what has become of requests to each version since it was first served.
        error: why the new version cannot be served, if so.
        check: what the command said last, if it did.
    """

    now_s: float
    ready: Mapping[int, int]
    wanted: int
    counts: Mapping[int, Counts]
    error: str | None = None
    check: Check | None = None


def step(rollout: Rollout, seen: Sight) -> Rollout:
    """The rollout as it is to be from now on; the same if nothing changes."""
    if rollout.state is not State.RUNNING:
        return rollout
    if seen.error is not None:
        return _back(rollout, seen, f"it cannot be served: {seen.error}")
    progress = rollout.progress
    if progress.opened_s is None:
        return _prepared(rollout, seen)
    if _is_counted_anew(rollout, seen):
        said = "its requests are counted anew: the counts were lost"
        return replace(rollout, progress=replace(progress, opened_s=None, reason=said))
    old, new = _compared(rollout, seen)
    if worse := proven_worse(old, new, SECONDS, **_limits(rollout.spec)):
        return _back(rollout, seen, worse)
    checked = seen.check if seen.check and seen.check.stage == progress.stage else None
    if checked is not None and not checked.is_passed and not progress.is_urged:
        return _back(rollout, seen, f"check {rollout.spec.check} failed: {checked.says}")
    if checked is not None and not progress.is_checked:
        return replace(rollout, progress=replace(progress, is_checked=checked.is_passed))
    missing = _missing(rollout, seen, old, new)
    if missing is None and (progress.is_checked or rollout.spec.check is None or progress.is_urged):
        return _onward(rollout, seen, old)
    late = seen.now_s - progress.entered_s >= rollout.spec.patience_s
    if late and not rollout.spec.is_manual:
        return _back(rollout, seen, f"not passed in time: {missing or 'the check has not ended'}")
    return rollout


def is_to_be_checked(rollout: Rollout, seen: Sight) -> bool:
    """Whether the user's command is to run now: everything else says that the stage can be left."""
    progress = rollout.progress
    if rollout.state is not State.RUNNING or rollout.spec.check is None or progress.is_checked:
        return False
    if progress.opened_s is None or progress.is_urged or _is_counted_anew(rollout, seen):
        return False
    return _missing(rollout, seen, *_compared(rollout, seen), manual=False) is None


def urged(rollout: Rollout, now_s: float, by: str, *, fully: bool) -> Rollout:
    """As somebody wants who has seen enough: the next stage or (fully) the end, once there are replicas."""
    spec, progress = rollout.spec, rollout.progress
    said = f"promoted by {by}"
    if progress.stage == spec.last:
        return replace(rollout, progress=replace(progress, is_urged=True, reason=said))
    ahead = replace(
        progress,
        stage=spec.last if fully else progress.stage + 1,
        entered_s=now_s,
        opened_s=None,
        is_checked=False,
        is_urged=fully,
        reason=said,
    )
    return replace(rollout, progress=ahead)


def route(rollout: Rollout, ready: Collection[int]) -> Route:
    """Where the model's requests go while the rollout runs, with the versions that have ready replicas.

    The new version gets none while it has no replica that is ready. It gets all of them, in a canary or once
    it has taken over, when the old version has none.
    """
    spec = rollout.spec
    old, new = str(spec.stable), str(spec.number)
    if spec.number not in ready:
        return Route(version=old)
    header = {CANARY: new, STABLE: old} if spec.stable in ready else {CANARY: new}
    routed = rollout.progress.routed
    share = share_of(spec, routed)
    if spec.strategy is Strategy.SHADOW and 0 <= routed < spec.last:
        return Route(version=old, header=header, shadows={new: share})
    if share >= 1.0 or (share > 0.0 and spec.stable not in ready):
        return Route(version=new, header=header)
    return Route(version=old, header=header, shares={new: share} if share else {})


def share_of(spec: RolloutSpec, stage: int) -> float:
    """Of requests, or copies, that the new version gets in a stage; -1: before the first."""
    if stage < 0:
        return 0.0
    return spec.shares[stage] if stage < spec.last else 1.0


def replicas(rollout: Rollout, wanted: int) -> int:
    """Replicas that the new version should have, if ``wanted`` could answer all requests.

    The old version keeps as many as without a rollout, and at least one.
    """
    share = share_of(rollout.spec, rollout.progress.stage)
    share = max(share, share_of(rollout.spec, rollout.progress.routed))
    # Before it takes over at once it must be able to.
    return max(1, ceil(wanted * (share or 1.0) - _TINY))


def stage_name(rollout: Rollout) -> str:
    """A stage in words."""
    spec, stage = rollout.spec, rollout.progress.stage
    if stage == spec.last:
        return "100%, the old version kept"
    if spec.strategy is Strategy.BLUE_GREEN:
        return "beside the old version"
    what = "copies of " if spec.strategy is Strategy.SHADOW else ""
    return f"{what}{spec.shares[stage] * 100:.4g}%"


def _prepared(rollout: Rollout, seen: Sight) -> Rollout:
    """Opened, if the new version has what the stage needs."""
    spec, progress = rollout.spec, rollout.progress
    needed = replicas(rollout, seen.wanted)
    ready = seen.ready.get(spec.number, 0)
    if ready < needed:
        if seen.now_s - progress.entered_s < spec.patience_s:
            return rollout
        return _back(rollout, seen, f"only {ready} of {needed} replicas are ready in time")
    # A new version that nobody has asked yet is compared with all that the old one ever did.
    old = Counts() if spec.strategy is Strategy.BLUE_GREEN and not progress.stage else _of(seen, spec.stable)
    opened = replace(
        progress,
        opened_s=seen.now_s,
        routed=progress.stage,
        before={spec.stable: old, spec.number: _of(seen, spec.number)},
        reason=progress.reason,
    )
    return replace(rollout, progress=opened)


def _onward(rollout: Rollout, seen: Sight, old: Counts) -> Rollout:
    spec, progress = rollout.spec, rollout.progress
    if progress.stage == spec.last:
        return replace(rollout, state=State.PROMOTED, ended_s=seen.now_s)
    ahead = replace(
        progress,
        stage=progress.stage + 1,
        entered_s=seen.now_s,
        opened_s=None,
        reference=old,
        is_checked=False,
        reason="",
    )
    return replace(rollout, progress=ahead)


def _back(rollout: Rollout, seen: Sight, reason: str) -> Rollout:
    ended = replace(rollout.progress, reason=reason)
    return replace(rollout, state=State.ROLLED_BACK, progress=ended, ended_s=seen.now_s)


def _missing(rollout: Rollout, seen: Sight, old: Counts, new: Counts, *, manual: bool = True) -> str | None:
    """Why the stage cannot be left yet, besides the check."""
    spec, progress = rollout.spec, rollout.progress
    assert progress.opened_s is not None
    is_last = progress.stage == spec.last
    if seen.ready.get(spec.number, 0) < (needed := replicas(rollout, seen.wanted) if is_last else 1):
        return f"the new version has not its {needed} replicas"
    if progress.is_urged:
        return None
    if spec.is_manual and manual:
        return "it waits to be promoted"
    if seen.now_s - progress.opened_s < (spec.proof_s if is_last else spec.stage_s):
        return "it is too early"
    if not is_last and share_of(spec, progress.stage) and new.requests < spec.min_requests:
        return f"the new version got {new.requests} of {spec.min_requests} requests"
    return seems_worse(old, new, SECONDS, **_limits(spec))


def _compared(rollout: Rollout, seen: Sight) -> tuple[Counts, Counts]:
    """What became of requests to the old and to the new version in this stage.

    Where the old one got none, what became of them in the stage before counts.
    """
    spec, progress = rollout.spec, rollout.progress
    old, new = (
        _less(_of(seen, number), progress.before.get(number, Counts()))
        for number in (spec.stable, spec.number)
    )
    return (old if old.requests > progress.reference.requests else progress.reference), new


def _is_counted_anew(rollout: Rollout, seen: Sight) -> bool:
    """Whether there is less than there was: the gateway has been started again."""
    for number, before in rollout.progress.before.items():
        now = _of(seen, number)
        if now.requests < before.requests or now.errors < before.errors:
            return True
        if before.answers and len(now.answers) != len(before.answers):
            return True
        if any(count < known for count, known in zip(now.answers, before.answers, strict=False)):
            return True
    return False


def _of(seen: Sight, number: int) -> Counts:
    return seen.counts.get(number, Counts())


def _less(now: Counts, before: Counts) -> Counts:
    known = before.answers or (0,) * len(now.answers)
    return Counts(
        requests=now.requests - before.requests,
        errors=now.errors - before.errors,
        answers=tuple(count - earlier for count, earlier in zip(now.answers, known, strict=True)),
    )


def _limits(spec: RolloutSpec) -> dict[str, float]:
    return {"max_error_fraction": spec.max_error_fraction, "max_slowdown": spec.max_slowdown}
