"""The training controller: one event in, the next state and the commands it calls for out.

Pure: no I/O, no clock, no randomness. The same function drives real workers, recorded logs and
simulated clusters. A ``Repartition`` takes the place of an earlier one that is not yet in force.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from forescale.control import ahead, deviation
from forescale.control.choice import alike
from forescale.control.state import ControlConfig, ControlState, Decision, Trigger
from forescale.engine.messages import (
    BatchesAhead,
    Binding,
    CheckpointWritten,
    Command,
    Event,
    Repartitioned,
    RunStarted,
    StepFinished,
    Stop,
    WorkerExited,
)

_RECENT = 32
"""Finished batches whose shapes are remembered."""


def step(
    state: ControlState, event: Event, config: ControlConfig
) -> tuple[ControlState, tuple[Command, ...]]:
    """Take in one event.

    Start from ``ControlState()``. ``state.decision`` changes whenever a question was decided, also
    when the answer was to leave things as they are.
    """
    match event:
        case RunStarted():
            state = replace(
                state, plan=event.plan, next_step=event.next_step, unsettled_steps=config.policy.settle_steps
            )
            return _look_ahead(state, config)
        case BatchesAhead():
            known = {event.first_step + i: binding for i, binding in enumerate(event.bindings)}
            known = {number: binding for number, binding in known.items() if number >= state.next_step}
            return _look_ahead(replace(state, ahead={**state.ahead, **known}), config)
        case StepFinished():
            return _step_finished(state, event, config)
        case Repartitioned():
            return _look_ahead(_repartitioned(state, event, config), config)
        case CheckpointWritten():
            return state, ()
        case WorkerExited():
            command = Stop(reason=f"the worker on {event.device} exited: {event.cause}")
            decision = Decision(step=state.next_step, trigger=Trigger.LOSS, acted=True, reason=command.reason)
            return replace(state, decision=decision), (command,)
        case _:
            assert_never(event)


def predicted_step_s(state: ControlState, binding: Binding, config: ControlConfig) -> float | None:
    """Seconds a step is predicted to take under the plan in force, at the estimated speeds."""
    if state.plan is None:
        return None
    return config.planner.prediction(state.plan, binding, state.speeds).step_s


def _look_ahead(state: ControlState, config: ControlConfig) -> tuple[ControlState, tuple[Command, ...]]:
    if state.plan is None or not config.policy.adapt:
        return state, ()
    return ahead.react(state, config)


def _step_finished(
    state: ControlState, event: StepFinished, config: ControlConfig
) -> tuple[ControlState, tuple[Command, ...]]:
    like_before = (
        state.plan is not None
        and bool(state.recent)
        and alike(state.plan, state.recent[-1], event.binding, config.planner)
    )
    state = replace(
        state,
        next_step=event.step + 1,
        ahead={number: binding for number, binding in state.ahead.items() if number > event.step},
        recent=(*state.recent, event.binding)[-_RECENT:],
        alike_steps=state.alike_steps + 1 if like_before else 1,
    )
    if state.plan is None:
        return state, ()
    if state.unsettled_steps:
        return replace(state, unsettled_steps=state.unsettled_steps - 1), ()
    state = deviation.watch(state, event, config)
    return deviation.react(state, config) if config.policy.adapt else (state, ())


def _repartitioned(state: ControlState, event: Repartitioned, config: ControlConfig) -> ControlState:
    overhead_s = state.move_overhead_s
    if state.recent:
        sending_s = config.planner.move_s(state.recent[-1], event.before, event.after)
        overhead_s = max(0.0, event.pause_s - sending_s)
    return replace(
        state,
        plan=event.after,
        pending=None,
        use={},
        move_overhead_s=overhead_s,
        unsettled_steps=config.policy.settle_steps,
    )
