"""Batches that have been looked at but not run: memory they would exceed, plans that suit them better."""

from __future__ import annotations

from dataclasses import replace

from forescale.control.choice import alike, asked_gain, changes, fits, moved, shape, weigh
from forescale.control.state import ControlConfig, ControlState, Decision, Trigger
from forescale.control.utilisation import with_expected_use
from forescale.core.errors import InfeasiblePlan
from forescale.engine.messages import Binding, Command, Repartition, Stop
from forescale.plan.partition_plan import PartitionPlan
from forescale.plan.wording import spell_bytes

_MAX_REVIEWS = 2  # doublings of the time between looks at a mixture that find nothing

Reaction = tuple[ControlState, tuple[Command, ...]]


def react(state: ControlState, config: ControlConfig) -> Reaction:
    """Change the plan before a batch that needs another one, or stop before one that fits nowhere."""
    state, commands = _react_to_memory(state, config)
    if commands or state.pending is not None:
        return state, commands
    return _react_to_load(state, config)


def _react_to_memory(state: ControlState, config: ControlConfig) -> Reaction:
    short = {
        step: bytes_short
        for step, binding in sorted(state.ahead.items())
        if (bytes_short := config.planner.short_bytes(_plan_for(state, step), binding))
    }
    if not short:
        return state, ()
    first = min(short)
    if state.pending is not None and state.pending.before_step is not None:
        first = min(first, state.pending.before_step)  # the new command takes the place of the pending one
    worst = max(short, key=lambda step: max(short[step].values()))
    device, size_bytes = max(short[worst].items(), key=lambda item: item[1])
    need = (
        f"the batch of step {worst}, {shape(state.ahead[worst], config.planner)}, would exceed the memory of "
        f"{device} by {spell_bytes(size_bytes)}"
    )
    try:
        plan = _holding(state, sorted(short, key=lambda step: -max(short[step].values())), first, config)
    except InfeasiblePlan as error:
        return _decided(state, Stop(reason=f"{need}: {error}"), Trigger.MEMORY)
    if plan is None:
        return state, ()
    change = changes(_plan_for(state, first), plan)
    reason = f"{need}; from step {first} on: {change}"
    command = Repartition(plan=plan, reason=reason, before_step=first)
    return _decided(state, command, Trigger.MEMORY)


def _holding(
    state: ControlState, demanding: list[int], first: int, config: ControlConfig
) -> PartitionPlan | None:
    """A plan that holds all batches in view from step ``first`` on, else the most demanding one.

    None when a change is already under way and no single plan could take its place.

    Raises:
        InfeasiblePlan: no plan holds one of the demanding batches.
    """
    later = [binding for step, binding in state.ahead.items() if step >= first]
    plans = (config.planner.best(state.ahead[step], state.speeds) for step in demanding)
    for plan in plans:
        if fits(plan, later, config.planner):
            return plan
    return None if state.pending else config.planner.best(state.ahead[first], state.speeds)


def _react_to_load(state: ControlState, config: ControlConfig) -> Reaction:
    steps = _contiguous(state)
    if not steps:
        return state, ()
    assert state.plan is not None
    plan, policy, planner = state.plan, config.policy, config.planner
    bindings = [state.ahead[step] for step in steps]
    current = state.recent[-1] if state.recent else bindings[0]
    change = next((i for i, b in enumerate(bindings) if not alike(plan, current, b, planner)), None)
    if change is None:
        return _for_run(state, bindings, steps[0], asked_gain(state, policy), config)
    if all(alike(plan, bindings[change], binding, planner) for binding in bindings[change:]):
        return _for_run(state, bindings[change:], steps[change], policy.min_gain, config)
    if state.next_step < state.reviewed_step + policy.review_steps * 2**state.reviews:
        return state, ()
    return _for_mixture(state, bindings, config)


def _for_run(
    state: ControlState, bindings: list[Binding], first: int, min_gain: float, config: ControlConfig
) -> Reaction:
    """A plan for the batches of one class from step ``first`` on."""
    policy = config.policy
    expected = len(bindings)
    if expected >= policy.min_run_steps:
        # A run that goes on beyond what is in view is taken to last as long as the one before it.
        expected = max(expected, min(state.alike_steps + first - state.next_step, policy.horizon_steps))
    state, choice = weigh(state, [bindings[len(bindings) // 2]], config)
    if choice is None or not choice.worthwhile(expected, min_gain, policy.move_margin):
        return state, ()
    if not fits(choice.plan, bindings, config.planner):
        return state, ()
    if first == state.next_step:
        state = replace(state, moved_steps=moved(state, policy))
    batches = shape(bindings[0], config.planner)
    reason = f"batches of {batches} from step {first} on: {choice.sentence(expected)}"
    return _decided(state, Repartition(plan=choice.plan, reason=reason, before_step=first), Trigger.LOAD)


def _for_mixture(state: ControlState, bindings: list[Binding], config: ControlConfig) -> Reaction:
    """A plan for shapes that keep changing: the last batches and those in view stand for the next."""
    policy = config.policy
    sample = [*state.recent, *bindings]
    if len(sample) < policy.review_steps:
        return state, ()
    reviews = min(state.reviews + 1, _MAX_REVIEWS)
    state, choice = weigh(replace(state, reviewed_step=state.next_step, reviews=reviews), sample, config)
    steps = policy.horizon_steps
    if choice is None or not choice.worthwhile(steps, asked_gain(state, policy), policy.move_margin):
        return state, ()
    if not fits(choice.plan, bindings, config.planner):
        return state, ()
    state = replace(state, moved_steps=moved(state, policy), reviews=0)
    reason = f"mean of {len(sample)} batches of changing shape: {choice.sentence(steps)}"
    return _decided(state, Repartition(plan=choice.plan, reason=reason), Trigger.LOAD)


def _plan_for(state: ControlState, step: int) -> PartitionPlan:
    """The plan in force when a step will run."""
    assert state.plan is not None
    pending = state.pending
    if pending is not None and (pending.before_step is None or step >= pending.before_step):
        return pending.plan
    return state.plan


def _contiguous(state: ControlState) -> list[int]:
    steps: list[int] = []
    while state.next_step + len(steps) in state.ahead:
        steps.append(state.next_step + len(steps))
    return steps


def _decided(state: ControlState, command: Repartition | Stop, trigger: Trigger) -> Reaction:
    pending = state.pending
    if isinstance(command, Repartition):
        command = pending = replace(command, reason=with_expected_use(command.reason, state))
    decision = Decision(step=state.next_step, trigger=trigger, acted=True, reason=command.reason)
    return replace(state, decision=decision, pending=pending), (command,)
