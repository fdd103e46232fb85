"""A recorded run, decided again: the same commands, or another policy's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from forescale.control.log import Header, Record
from forescale.control.planner import Planner
from forescale.control.policy import Policy
from forescale.control.state import ControlConfig, ControlState, Decision, UseForecast
from forescale.control.training import step
from forescale.core.errors import InvalidInput
from forescale.engine.messages import Command, Repartition, Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where the commands derived and those on record part.

    Attributes:
        step: the next step to run at that time.
        event: number of the event they follow, from 0.
        recorded, derived: what the record has, and what the controller decides now.
    """

    step: int
    event: int
    recorded: tuple[Command, ...]
    derived: tuple[Command, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    """What came out of deciding a run again.

    Attributes:
        events: how many events were decided on.
        commands: the commands derived.
        decisions: every question that was decided, with its reason.
        differences: empty when the record is explained exactly.
        expected_use: by device, what the step after the last was expected to use.
    """

    events: int
    commands: tuple[Command, ...]
    decisions: tuple[Decision, ...]
    differences: tuple[Difference, ...]
    expected_use: Mapping[str, UseForecast]

    @property
    def identical(self) -> bool:
        return not self.differences


def replay(records: Iterable[Record], planner: Planner, policy: Policy | None = None) -> ReplayReport:
    """Decide a recorded run again.

    With another policy the events stay those on record: the report says what it would have done at each
    point of this run, not how the run would have gone on. Compared is what was decided, not in which words.
    Commands of the last event that are missing are no difference: a run that is killed may not have come to
    write them.

    Args:
        planner: over the cost model of the recorded run.
        policy: thresholds to decide by instead of the recorded ones.

    Raises:
        InvalidInput: the records do not begin with a header.
    """
    state, config = ControlState(), None
    events, decisions = 0, list[Decision]()
    commands, differences = list[Command](), list[Difference]()
    recorded, derived = list[Command](), tuple[Command, ...]()

    def compare() -> None:
        if list(map(_decided, recorded)) != list(map(_decided, derived)):
            differences.append(
                Difference(step=state.next_step, event=events - 1, recorded=tuple(recorded), derived=derived)
            )

    for record in records:
        if isinstance(record, (Repartition, Stop)):
            recorded.append(record)
            continue
        compare()
        recorded, derived = [], ()
        if isinstance(record, Header):
            state, config = ControlState(), ControlConfig(policy=policy or record.policy, planner=planner)
            continue
        if config is None:
            raise InvalidInput("not a run log: it does not begin with a header")
        decision = state.decision
        state, derived = step(state, record, config)
        events += 1
        commands.extend(derived)
        if state.decision is not decision and state.decision is not None:
            decisions.append(state.decision)
    if recorded:
        compare()
    return ReplayReport(
        events=events,
        commands=tuple(commands),
        decisions=tuple(decisions),
        differences=tuple(differences),
        expected_use=state.use,
    )


def _decided(command: Command) -> Command:
    """The command without words, which may change from one release to the next."""
    if isinstance(command, Repartition):
        return replace(command, plan=replace(command.plan, rationale=()), reason="")
    return replace(command, reason="")
