"""Another plan for some batches, weighed against the plan in force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, log

from forescale.control.planner import Planner, same_split
from forescale.control.policy import Policy
from forescale.control.state import ControlConfig, ControlState
from forescale.core.errors import InfeasiblePlan
from forescale.engine.messages import Binding
from forescale.graph.size import evaluate
from forescale.plan.partition_plan import PartitionPlan, Schedule, replica_groups, replicas
from forescale.plan.wording import SCHEDULE_NAMES, spell_bytes, spell_count, spell_microbatches, spell_time

_CLASS_RATIO = 1.15
"""Batches whose step times differ by less than this are one class, with one candidate plan."""

_SAMPLE = 8
"""Batches whose mean stands for all: predictions for shapes never seen before take time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A candidate plan against the one in force.

    Attributes:
        before, plan: the plan in force and the candidate.
        now_s, then_s: mean predicted step time under them.
        move_s, moved_bytes: predicted cost of changing over.
    """

    before: PartitionPlan
    plan: PartitionPlan
    now_s: float
    then_s: float
    move_s: float
    moved_bytes: int

    @property
    def gain_s(self) -> float:
        """Seconds saved per step."""
        return self.now_s - self.then_s

    def worthwhile(self, steps: float, min_gain: float, move_margin: float) -> bool:
        """Whether it saves the fraction ``min_gain``, and over ``steps`` more than the move costs."""
        enough = self.gain_s >= min_gain * self.now_s
        return enough and self.gain_s * steps > (1.0 + move_margin) * self.move_s

    def sentence(self, steps: int) -> str:
        """What changes, what that saves over so many steps, and what it costs."""
        moves = spell_bytes(self.moved_bytes) if self.moved_bytes else "nothing"
        return (
            f"{changes(self.before, self.plan)}: steps of {spell_time(self.then_s)} instead of "
            f"{spell_time(self.now_s)}, which saves {spell_time(self.gain_s * steps)} over "
            f"{spell_count(steps, 'step')}; it moves {moves} and costs {spell_time(self.move_s)}"
        )


def weigh(
    state: ControlState, bindings: Sequence[Binding], config: ControlConfig
) -> tuple[ControlState, Choice | None]:
    """The best other plan for the mean of some batches, at the estimated speeds.

    Memory is not looked at, see :func:`fits`.

    Returns:
        The state with the candidate remembered; None when no other plan is faster, or the candidate's
        batch fits nowhere.
    """
    assert state.plan is not None
    before, planner, speeds = state.plan, config.planner, state.speeds
    bindings = _spread(bindings, before, planner)
    times = [planner.prediction(before, binding, speeds).step_s for binding in bindings]
    now_s = sum(times) / len(times)
    typical = min(range(len(times)), key=lambda i: abs(times[i] - now_s))
    state, plan = _candidate(state, bindings[typical], times[typical], planner)
    if plan is None or same_split(plan, before):
        return state, None
    then_s = sum(planner.prediction(plan, binding, speeds).step_s for binding in bindings) / len(times)
    if then_s >= now_s:
        return state, None
    overhead_s = config.policy.move_fixed_s if state.move_overhead_s is None else state.move_overhead_s
    return state, Choice(
        before=before,
        plan=plan,
        now_s=now_s,
        then_s=then_s,
        move_s=overhead_s + planner.move_s(bindings[typical], before, plan),
        moved_bytes=planner.moved_bytes(bindings[typical], before, plan),
    )


def asked_gain(state: ControlState, policy: Policy) -> float:
    """The fraction of the step time a plan must save, where only the last steps call for another.

    Two moves answer one change of the devices (the second corrects the first); more of them within
    ``calm_steps`` are asked for twice as much, so that a device that comes and goes does not keep the plan
    moving.
    """
    lately = sum(step > state.next_step - policy.calm_steps for step in state.moved_steps)
    return policy.sudden_gain * (2 if lately > 1 else 1)


def moved(state: ControlState, policy: Policy) -> tuple[int, ...]:
    """``moved_steps`` with a move decided now."""
    return (
        *(step for step in state.moved_steps if step > state.next_step - policy.calm_steps),
        state.next_step,
    )


def alike(plan: PartitionPlan, a: Binding, b: Binding, planner: Planner) -> bool:
    """Whether two batches take about the same time, so that one plan suits both."""
    if a == b:
        return True
    a_s, b_s = (planner.prediction(plan, binding, {}).step_s for binding in (a, b))
    return max(a_s, b_s) <= _CLASS_RATIO * min(a_s, b_s)


def fits(plan: PartitionPlan, bindings: Sequence[Binding], planner: Planner) -> bool:
    """Whether every device has the memory for all these batches."""
    return not any(planner.short_bytes(plan, binding) for binding in bindings)


def changes(before: PartitionPlan, after: PartitionPlan) -> str:
    """What differs between two plans, as people name it: ``operators 85 + 90 → 80 + 95``."""
    places = [[stage.device for stage in plan.stages] for plan in (before, after)]
    found = [
        _change("operators", *(_operators(plan, named=places[0] != places[1]) for plan in (before, after))),
        _change("microbatches", spell_microbatches(before), spell_microbatches(after)),
        _change("recomputing", *(_recomputing(plan) for plan in (before, after))),
    ]
    split = Schedule.ZERO_BUBBLE in (before.schedule, after.schedule)
    if split or min(before.microbatches, after.microbatches) > 1:  # else there is but one order
        found.append(_change("schedule", SCHEDULE_NAMES[before.schedule], SCHEDULE_NAMES[after.schedule]))
    same = [stage.operators for stage in before.stages] == [stage.operators for stage in after.stages]
    said = ", ".join(change for change in found if change)
    return said or ("no change" if same else "other operators, as many")


def shape(binding: Binding, planner: Planner) -> str:
    """The shapes of a batch's parts that may change from one to the next: ``8 × 256 (characters)``."""
    graph = planner.problem(binding, {}).graph
    named: dict[str, list[str]] = {}
    for name in graph.inputs:
        sizes = graph.tensors[name].shape
        if any(isinstance(size, str) for size in sizes):
            spelt = " × ".join(str(evaluate(size, binding)) for size in sizes)
            named.setdefault(spelt, []).append(name)
    return ", ".join(f"{spelt} ({', '.join(names)})" for spelt, names in named.items()) or "fixed shape"


def _change(what: str, before: str, after: str) -> str:
    return f"{what} {before} → {after}" if before != after else ""


def _operators(plan: PartitionPlan, *, named: bool) -> str:
    spelt: list[str] = []
    for group in replica_groups(plan.stages):
        count, teams = str(len(group[0].operators)), replicas(group)
        places = " and ".join(" + ".join(stage.device for stage in team) for team in teams)
        if len(teams) > 1:
            spelt.append(f"{len(teams)} replicas of {count} on {places}")
        else:
            spelt.append(f"{places} {count}" if named else count)
    return " + ".join(spelt)


def _recomputing(plan: PartitionPlan) -> str:
    return ", ".join(stage.device for stage in plan.stages if stage.recompute) or "nothing"


def _spread(bindings: Sequence[Binding], plan: PartitionPlan, planner: Planner) -> Sequence[Binding]:
    """At most ``_SAMPLE`` of the batches, evenly spread from the shortest to the longest."""
    if len(bindings) <= _SAMPLE:
        return bindings
    ranked = sorted(bindings, key=lambda binding: planner.prediction(plan, binding, {}).step_s)
    return [ranked[(2 * i + 1) * len(ranked) // (2 * _SAMPLE)] for i in range(_SAMPLE)]


def _candidate(
    state: ControlState, binding: Binding, time_s: float, planner: Planner
) -> tuple[ControlState, PartitionPlan | None]:
    # One plan per class of batches: with lengths that change every step, a plan for each would cost
    # more time than it could save.
    key = floor(log(max(time_s, 1e-9)) / log(_CLASS_RATIO))
    if key in state.candidates:
        return state, state.candidates[key]
    plan: PartitionPlan | None
    try:
        plan = planner.best(binding, state.speeds)
    except InfeasiblePlan:
        plan = None
    candidates: Mapping[int, PartitionPlan | None] = {**state.candidates, key: plan}
    return replace(state, candidates=candidates), plan
