"""A rollout, as a value: a new version of a model takes over from the deployed one, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from forescale.core.errors import InvalidInput
from forescale.registry.records import check_text

LONGEST_S = 30 * 86400.0


class Strategy(StrEnum):
    """How a new version gets its first requests."""

    CANARY = "canary"  # a share of them, which grows
    SHADOW = "shadow"  # copies of a share of them; nobody sees its answers
    BLUE_GREEN = "blue-green"  # none, then all of them at once


class State(StrEnum):
    RUNNING = "running"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled back"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What became of requests to a version.

    Attributes:
        errors: of them, all that were not answered, for whatever reason.
        answers: those answered, by how long it took: counts as ``latency_s`` of ``ModelMetrics`` has them.
    """

    requests: int = 0
    errors: int = 0
    answers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSpec:
    """What somebody asked for.

    Attributes:
        number: the new version.
        stable: the version that was deployed, and stays so until the new one has proven itself.
        shares: of requests (canary) or copies (shadow) in each stage before the last one, in which the new
            version gets all requests.
        stage_s: shortest time of a stage.
        proof_s: the same of the last one: so long the old version is kept as it was.
        min_requests: of a stage before the last, to the new version.
        patience_s: a stage that has not been passed after so long is taken to have failed.
        max_error_fraction: errors that the new version may have more than the old one, of its requests.
        max_slowdown: how many times as long answers may take.
        check: name of a command, known to the server, that must succeed before a stage is left.
        is_manual: stages are left only when somebody says so.

    Raises:
        InvalidInput: a figure is out of range.
    """

    model: str
    number: int
    stable: int
    strategy: Strategy
    shares: tuple[float, ...]
    stage_s: float = 60.0
    proof_s: float = 300.0
    min_requests: int = 100
    patience_s: float = 3600.0
    max_error_fraction: float = 0.01
    max_slowdown: float = 1.5
    check: str | None = None
    is_manual: bool = False

    def __post_init__(self) -> None:
        if self.number == self.stable:
            raise InvalidInput(f"{self.model}@{self.number} is deployed already")
        self._check_shares()
        for seconds in (self.stage_s, self.proof_s, self.patience_s):
            _check(0.0 <= seconds <= LONGEST_S, f"{seconds:g} s is not from 0 s to 30 days")
        longest_s = max(self.stage_s, self.proof_s)
        _check(longest_s < self.patience_s, f"a stage takes {longest_s:g} s or more, not {self.patience_s:g}")
        _check(0 <= self.min_requests <= 10**9, f"{self.min_requests} requests are not possible")
        fraction = self.max_error_fraction
        _check(0.0 <= fraction < 1.0, f"{fraction:g} of all requests more with errors is not from 0 to 1")
        _check(1.0 <= self.max_slowdown < math.inf, f"{self.max_slowdown:g} times as slow is not 1 or more")
        if self.check is not None:
            check_text(self.check, "a check's name")

    def _check_shares(self) -> None:
        if self.strategy is Strategy.BLUE_GREEN:
            _check(self.shares == (0.0,), "blue-green has no shares: requests change over at once")
            return
        _check(0 < len(self.shares) <= 100, "give a share, or up to 100 that grow")
        _check(all(0.0 < share <= 1.0 for share in self.shares), "shares are above 0% and at most 100%")
        _check(list(self.shares) == sorted(set(self.shares)), "the shares of a rollout must grow")
        if self.strategy is Strategy.CANARY:
            _check(self.shares[-1] < 1.0, "the last stage, with 100%, comes by itself")

    @property
    def last(self) -> int:
        """Number of the last stage."""
        return len(self.shares)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a rollout is.

    Attributes:
        stage: which one, from 0 on, it is in or prepares.
        entered_s: when it began to prepare it, in seconds since the Unix epoch.
        opened_s: when the stage had its replicas, and requests; None: not yet.
        routed: the stage by which requests go; -1: the old version gets them all.
        before: what had become of requests to each version, by its number, when the stage was opened.
        reference: what became of requests to the old version in the stage before.
        is_checked: the check succeeded in this stage.
        is_urged: somebody wants the last stage to be left as soon as the new version has its replicas.
        reason: why it is as it is, for people.
    """

    stage: int = 0
    entered_s: float = 0.0
    opened_s: float | None = None
    routed: int = -1
    before: Mapping[int, Counts] = field(default_factory=dict[int, Counts])
    reference: Counts = Counts()
    is_checked: bool = False
    is_urged: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A rollout that runs or has ended.

    Attributes:
        id: grows with time.
        revision: another one with each change.
        started_s: seconds since the Unix epoch, as ``ended_s``.
    """

    id: int
    revision: int
    spec: RolloutSpec
    state: State
    progress: Progress
    started_s: float
    started_by: str
    ended_s: float | None = None


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise InvalidInput(otherwise)
