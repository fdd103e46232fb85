from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from forescale.plan.partition_plan import Schedule
from forescale.plan.schedule import (
    Layout,
    Phase,
    PipelineTimes,
    deal,
    interleaved_order,
    schedule_order,
    simulate_step,
)

F, B, W = Phase.FORWARD, Phase.BACKWARD, Phase.WEIGHT


def times(
    forward_s: list[float],
    backward_s: list[float],
    *,
    weight_s: float = 0.0,
    wire_s: float = -np.inf,
    occupied_s: float = 0.0,
    slowness: tuple[float, ...] | None = None,
    optimizer_s: tuple[float, ...] | None = None,
    reduction_s: float = -np.inf,
) -> PipelineTimes:
    """One candidate in which neighbours exchange messages, which take slow ones as much longer."""
    stages = len(forward_s)
    slowness_S = np.array(slowness or [1.0] * stages)
    neighbours = np.abs(np.subtract.outer(np.arange(stages), np.arange(stages)))[..., None] == 1
    wire_s = 0.0 if occupied_s else wire_s
    return PipelineTimes(
        forward_s_SN=np.array(forward_s)[:, None],
        backward_s_SN=np.array(backward_s)[:, None],
        weight_s_SN=np.full((stages, 1), weight_s),
        wire_s_SSN=np.where(neighbours, wire_s, -np.inf),
        sending_s_SSN=np.where(neighbours, occupied_s * slowness_S[:, None, None], 0.0),
        receiving_s_SSN=np.where(neighbours, occupied_s * slowness_S[None, :, None], 0.0),
        shares_SSN=np.zeros((stages, stages, 1), dtype=bool),
        exchange_s_SN=np.zeros((stages, 1)),
        reduction_s_N=np.array([reduction_s]),
        optimizer_s_SN=np.array(optimizer_s or [0.0] * stages)[:, None],
    )


def step_s(schedule: Schedule, microbatches: int, times: PipelineTimes):
    return simulate_step(schedule, Layout.pipeline(len(times.forward_s_SN), microbatches), times)


def test_1f1b_starts_with_as_many_forwards_as_stages_follow() -> None:
    assert schedule_order(Schedule.ONE_F_ONE_B, 0, 3, 4) == (
        *((F, 0), (F, 1), (F, 2), (B, 0), (F, 3), (B, 1), (B, 2), (B, 3)),
    )
    assert schedule_order(Schedule.ONE_F_ONE_B, 2, 3, 2) == ((F, 0), (B, 0), (F, 1), (B, 1))


def test_eager_1f1b_starts_with_one_more_forward_per_stage_that_follows() -> None:
    assert schedule_order(Schedule.EAGER_1F1B, 0, 2, 4) == (
        *((F, 0), (F, 1), (F, 2), (B, 0), (F, 3), (B, 1), (B, 2), (B, 3)),
    )
    assert schedule_order(Schedule.EAGER_1F1B, 1, 2, 2) == ((F, 0), (B, 0), (F, 1), (B, 1))


def test_eager_1f1b_hides_transfers_that_1f1b_waits_for() -> None:
    even = times([1.0, 1.0], [2.0, 2.0], wire_s=0.5)
    # Fill and drain have to wait for a transfer each; 1F1B waits for both with every other one.
    assert step_s(Schedule.EAGER_1F1B, 8, even) == pytest.approx(8 * 3 + 3 + 2 * 0.5)
    assert step_s(Schedule.ONE_F_ONE_B, 8, even) == pytest.approx(8 * 3 + 3 + 4 * 2 * 0.5)


def test_gpipe_does_all_forwards_first() -> None:
    assert schedule_order(Schedule.GPIPE, 1, 2, 2) == ((F, 0), (F, 1), (B, 0), (B, 1))


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 8])
def test_every_task_once_and_a_forward_before_its_backward(schedule, stages, microbatches) -> None:
    for stage in range(stages):
        order = schedule_order(schedule, stage, stages, microbatches)
        phases = Phase if schedule is Schedule.ZERO_BUBBLE else (F, B)
        assert sorted(order) == sorted((phase, m) for phase in phases for m in range(microbatches))
        places = [[order.index((phase, m)) for phase in phases] for m in range(microbatches)]
        assert all(place == sorted(place) for place in places)


def test_zero_bubble_lets_gradients_of_parameters_wait() -> None:
    assert schedule_order(Schedule.ZERO_BUBBLE, 0, 2, 3) == (
        *((F, 0), (F, 1), (B, 0), (W, 0), (F, 2), (B, 1), (W, 1), (B, 2), (W, 2)),
    )
    assert schedule_order(Schedule.ZERO_BUBBLE, 1, 2, 3) == (
        *((F, 0), (B, 0), (F, 1), (B, 1), (W, 0), (F, 2), (B, 2), (W, 1), (W, 2)),
    )


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 2), (2, 5), (3, 7), (4, 8), (8, 9)])
@pytest.mark.parametrize(("forward_s", "backward_s", "weight_s"), [(1.0, 1.0, 1.0), (2.0, 2.0, 1.0)])
def test_zero_bubble_loses_what_was_published(
    stages: int, microbatches: int, forward_s: float, backward_s: float, weight_s: float
) -> None:
    """Qi et al., ICLR 2024, table 2: ZB-H1 loses (p - 1)(F + B - W), 1F1B (p - 1)(F + B + W)."""
    even = times([forward_s] * stages, [backward_s] * stages, weight_s=weight_s, wire_s=0.0)
    work_s = microbatches * (forward_s + backward_s + weight_s)
    lost_s = (stages - 1) * (forward_s + backward_s - weight_s)
    assert step_s(Schedule.ZERO_BUBBLE, microbatches, even) == pytest.approx(work_s + lost_s)


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 3), (2, 4), (4, 3), (4, 9)])
def test_zero_bubble_keeps_no_more_in_flight_than_1f1b(stages: int, microbatches: int) -> None:
    layout = Layout.pipeline(stages, microbatches)
    for stage in range(stages):
        order = layout.order(Schedule.ZERO_BUBBLE, stage)
        assert layout.in_flight(Schedule.ZERO_BUBBLE, stage) == layout.in_flight(Schedule.ONE_F_ONE_B, stage)
        assert layout.waiting(Schedule.ZERO_BUBBLE, stage) == min(stage + 1, microbatches)
        assert layout.waiting(Schedule.ONE_F_ONE_B, stage) == 0
        # From its forward to its gradients of parameters, no stage holds more than the first does in 1F1B.
        begun = np.cumsum([(phase is F) - (phase is W) for phase, _ in order])
        assert begun.max() == layout.in_flight(Schedule.ONE_F_ONE_B, 0)


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 4), (2, 4), (4, 8)])
def test_equal_stages_fill_work_and_drain(schedule, stages, microbatches) -> None:
    even = times([1.0] * stages, [2.0] * stages, wire_s=0.0)
    assert step_s(schedule, microbatches, even) == pytest.approx(3.0 * (microbatches + stages - 1))


def test_a_link_beside_the_devices_delays_but_does_not_occupy() -> None:
    beside = step_s(Schedule.GPIPE, 4, times([1.0, 1.0], [1.0, 1.0], wire_s=0.5))
    assert beside == pytest.approx(2 * (4 + 1) + 2 * 0.5)


@pytest.mark.parametrize("slowness", [(1.0, 3.0), (3.0, 1.0)])
def test_a_transfer_takes_as_long_as_its_slower_end(slowness: tuple[float, float]) -> None:
    # One microbatch: ahead, and its gradient back. Who is faster waits, idle, for the other.
    uneven = times([1.0, 1.0], [1.0, 1.0], occupied_s=0.5, slowness=slowness)
    assert step_s(Schedule.GPIPE, 1, uneven) == pytest.approx(4.0 + 2 * 1.5)


def test_each_end_is_occupied_for_as_long_as_it_takes_itself() -> None:
    uneven = times([1.0, 0.1], [1.0, 0.1], occupied_s=0.5, slowness=(1.0, 3.0))
    # The second, slow at messages, receives and works in 1.6 s, the first sends every 1.5 s: it never waits.
    forwards_s = 1.0 + 4 * (1.5 + 0.1)
    last_sent_s = forwards_s + 0.1 + 3 * (1.5 + 0.1) + 1.5
    assert step_s(Schedule.GPIPE, 4, uneven) == pytest.approx(last_sent_s + 1.0)


def test_a_transfer_on_the_devices_costs_both_ends_every_microbatch() -> None:
    # The sender spends half a second after each forward, the receiver as much before each of its own.
    occupying = step_s(Schedule.GPIPE, 4, times([1.0, 1.0], [1.0, 1.0], occupied_s=0.5))
    first_forward_s, last_backward_s = 1.0, 0.5 + 1.0
    assert occupying == pytest.approx(
        first_forward_s + 4 * (0.5 + 1.0) + 4 * (1.0 + 0.5) - 0.5 + last_backward_s
    )


def test_stages_without_messages_do_not_wait_for_each_other() -> None:
    assert step_s(Schedule.ONE_F_ONE_B, 2, times([1.0, 5.0], [0.0, 0.0])) == pytest.approx(10.0)


def test_an_update_waits_for_all_stages_only_if_the_norm_is_needed() -> None:
    early = times([1.0, 1.0], [1.0, 1.0], wire_s=0.0, optimizer_s=(0.0, 0.75))
    assert step_s(Schedule.GPIPE, 1, early) == pytest.approx(4.0)
    clipped = times([1.0, 1.0], [1.0, 1.0], wire_s=0.0, optimizer_s=(0.0, 0.75), reduction_s=0.25)
    assert step_s(Schedule.GPIPE, 1, clipped) == pytest.approx(5.0)


def test_tied_gradients_are_summed_after_the_last_holder() -> None:
    apart = times([1.0, 1.0], [1.0, 1.0], wire_s=0.0)
    tied = replace(apart, shares_SSN=~np.eye(2, dtype=bool)[..., None], exchange_s_SN=np.full((2, 1), 0.5))
    assert step_s(Schedule.GPIPE, 1, tied) == pytest.approx(4.5)


def test_devices_that_take_turns_work_in_the_published_order() -> None:
    """Narayanan et al., SC 2021, figure 4, for two devices with two stages each: 0, 2 and 1, 3."""
    assert interleaved_order(0, 2, 2, 4) == (
        *((0, F, 0), (0, F, 1), (2, F, 0), (2, F, 1)),
        *((0, F, 2), (2, B, 0), (0, F, 3), (2, B, 1), (2, F, 2), (0, B, 0), (2, F, 3), (0, B, 1)),
        *((2, B, 2), (2, B, 3), (0, B, 2), (0, B, 3)),
    )
    assert interleaved_order(1, 2, 2, 4) == (
        *((1, F, 0), (1, F, 1)),
        *((3, F, 0), (3, B, 0), (3, F, 1), (3, B, 1), (1, F, 2), (1, B, 0), (1, F, 3), (1, B, 1)),
        *((3, F, 2), (3, B, 2), (3, F, 3), (3, B, 3), (1, B, 2), (1, B, 3)),
    )


@pytest.mark.parametrize("devices", [2, 3, 4])
@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 4, 5, 7, 8, 11])
def test_turns_end_with_every_task_done_once(devices: int, chunks: int, microbatches: int) -> None:
    layout = Layout.pipeline(devices * chunks, microbatches, chunks)
    done = [layout.agenda(Schedule.INTERLEAVED, device) for device in range(devices)]
    for device, agenda in enumerate(done):
        every = [(s, p, m) for s in layout.stages_of(device) for p in (F, B) for m in range(microbatches)]
        assert sorted(agenda) == sorted(every)
    stages = devices * chunks
    even = times([1.0] * stages, [2.0] * stages, wire_s=0.0)
    # No task may wait for ever, and each device has work for all the time it does not wait.
    took_s = simulate_step(Schedule.INTERLEAVED, layout, even)
    work_s = 3.0 * chunks * microbatches
    assert took_s >= work_s
    if microbatches % devices == 0:
        # Table in section 2.2: the bubble of 1F1B, (p - 1)(F + B) of a whole device, divided by the chunks.
        assert took_s == pytest.approx(work_s + 3.0 * (devices - 1))


def test_stages_of_one_device_share_its_time_and_its_update() -> None:
    alone = times([1.0, 1.0], [2.0, 2.0], wire_s=0.0, optimizer_s=(0.5, 0.5))
    layout = Layout(microbatches=2, positions_S=(0, 1), runs_S=((0, 1), (0, 1)), chunks=2)
    assert simulate_step(Schedule.INTERLEAVED, layout, alone) == pytest.approx(2 * 6 + 2 * 0.5)


def test_candidates_do_not_influence_each_other() -> None:
    one, other = times([1.0, 2.0], [2.0, 1.0], wire_s=0.25), times([3.0, 1.0], [1.0, 1.0], occupied_s=0.5)
    arrays = [field.name for field in fields(PipelineTimes)]
    joined: dict = {n: np.concatenate([getattr(one, n), getattr(other, n)], axis=-1) for n in arrays}
    both = PipelineTimes(**joined)
    for schedule in Schedule:
        alone = [step_s(schedule, 3, t)[0] for t in (one, other)]
        assert step_s(schedule, 3, both).tolist() == pytest.approx(alone)


@pytest.mark.parametrize("shares", [(1,), (1, 1), (7, 3), (5, 1, 2), (4, 4, 1)])
def test_replicas_get_their_shares_of_any_number_of_microbatches(shares: tuple[int, ...]) -> None:
    whole = sum(shares)
    assert [len(own) for own in deal(shares, 2 * whole)] == [2 * share for share in shares]
    for count in range(1, whole):
        dealt = deal(shares, count)
        assert sorted(m for own in dealt for m in own) == list(range(count))
        assert all(
            abs(len(own) - count * share / whole) < 1 for own, share in zip(dealt, shares, strict=True)
        )


def test_each_replica_runs_its_part_of_the_pipelines_order() -> None:
    layout = Layout(microbatches=4, positions_S=(0, 0, 1), runs_S=((0, 2), (1, 3), (0, 1, 2, 3)))
    assert layout.order(Schedule.ONE_F_ONE_B, 0) == ((F, 0), (F, 2), (B, 0), (B, 2))
    assert layout.order(Schedule.ONE_F_ONE_B, 1) == ((F, 1), (F, 3), (B, 1), (B, 3))
    assert [layout.in_flight(Schedule.ONE_F_ONE_B, stage) for stage in range(3)] == [2, 2, 1]
    assert [layout.runners(0, microbatch) for microbatch in range(4)] == [(0,), (1,), (0,), (1,)]


def test_replicas_without_messages_work_side_by_side_and_then_sum_their_gradients() -> None:
    layout = Layout(microbatches=4, positions_S=(0, 0), runs_S=deal((3, 1), 4))
    alone = times([1.0, 3.0], [2.0, 6.0])
    assert simulate_step(Schedule.ONE_F_ONE_B, layout, alone) == pytest.approx(9.0)
    shared = replace(alone, shares_SSN=~np.eye(2, dtype=bool)[..., None], exchange_s_SN=np.full((2, 1), 0.5))
    assert simulate_step(Schedule.ONE_F_ONE_B, layout, shared) == pytest.approx(9.5)
    assert [layout.in_flight(Schedule.ONE_F_ONE_B, stage) for stage in (0, 1)] == [1, 1]
