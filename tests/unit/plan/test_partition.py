from __future__ import annotations

import numpy as np
import pytest

from forescale.core.cluster import Link
from forescale.core.errors import InfeasiblePlan, InvalidInput
from forescale.plan.evaluation import Mode, Pricing, evaluate
from forescale.plan.line import Line, cut
from forescale.plan.partition import partition, predict
from forescale.plan.partition_plan import Schedule, Stage
from forescale.plan.schedule import Layout
from forescale.plan.workload import tabulate
from unit.plan.graphs import LOOPBACK, GraphBuilder, chain, problem


def pipeline(request, **limits):
    """The best plan without replicas in which no device has several stages."""
    return partition(request, max_replicas=1, max_chunks=1, **limits)


def sizes(plan) -> list[int]:
    return [len(stage.operators) for stage in plan.stages]


def test_equal_devices_share_equally() -> None:
    plan = pipeline(problem(chain(8)))
    assert sizes(plan) == [4, 4]
    assert plan.stages[0].operators == (0, 1, 2, 3)
    assert plan.microbatches == 4


def test_equal_busy_time_is_not_the_fastest_split() -> None:
    """The slow device's first and last task lengthen filling and draining, so it gets less than its share."""
    request = problem(chain(12), speeds=(1.0, 0.5))
    plan = pipeline(request)
    assert {stage.device: len(stage.operators) for stage in plan.stages} == {"cpu0": 9, "cpu1": 3}
    equally_busy = [
        Stage(device="cpu0", operators=tuple(range(8))),
        Stage(device="cpu1", operators=tuple(range(8, 12))),
    ]
    even = predict(request, equally_busy, plan.microbatches, plan.schedule)
    busy_s = [stage.busy_s for stage in even.stages]
    assert busy_s[0] == pytest.approx(busy_s[1])
    assert even.step_s > 1.02 * plan.prediction.step_s


def test_a_hopeless_device_stays_idle() -> None:
    plan = partition(problem(chain(6), speeds=(1.0, 0.01)))
    assert [stage.device for stage in plan.stages] == ["cpu0"]


def test_a_slow_link_keeps_the_model_in_one_place() -> None:
    crawling = Link(bandwidth_bytes_per_s=1.0, latency_s=10.0)
    assert len(pipeline(problem(chain(6), link=crawling)).stages) == 1


@pytest.mark.parametrize(
    ("latency_s", "schedule"),
    [(0.0, Schedule.ONE_F_ONE_B), (0.2, Schedule.EAGER_1F1B)],
)
def test_more_microbatches_in_flight_only_for_a_gain_worth_their_memory(
    latency_s: float, schedule: Schedule
) -> None:
    link = Link(bandwidth_bytes_per_s=1e9, latency_s=latency_s)
    assert pipeline(problem(chain(8), link=link)).schedule is schedule


def test_overhead_per_microbatch_limits_their_number() -> None:
    many = pipeline(problem(chain(8), counts=(1, 2, 4, 8)))
    few = pipeline(problem(chain(8), counts=(1, 2, 4, 8), overhead_s=0.2))
    assert (many.microbatches, few.microbatches) == (8, 2)


def test_the_cut_avoids_the_wide_tensor() -> None:
    builder = GraphBuilder()
    builder.add("narrow", "x", elements=1)
    builder.add("wide", "narrow", elements=100_000)
    builder.add("back", "wide", elements=1)
    plan = pipeline(problem(builder.build(["back"], {"x": 8}), link=LOOPBACK))
    assert sizes(plan) == [1, 2]


def test_stages_and_order_can_be_limited() -> None:
    request = problem(chain(9), speeds=(1.0, 1.0, 1.0))
    assert len(pipeline(request).stages) == 3
    assert len(pipeline(request, max_stages=2).stages) == 2
    order = ["cpu2", "cpu0"]
    assert [stage.device for stage in pipeline(request, devices_order=order).stages] == order
    assert pipeline(request, schedule=Schedule.GPIPE).schedule is Schedule.GPIPE


def test_colocated_operators_stay_together_although_it_costs_time() -> None:
    builder = GraphBuilder()
    builder.buffer("running", 4)
    names = ["x"]
    for index in range(6):
        names.append(builder.add(f"op{index}", names[-1], buffers=["running"] if index == 1 else []))
    builder.add("writes", names[-1], updates="running")
    builder.add("last", "writes")
    plan = partition(problem(builder.build(["last"], {"x": 8}), seconds=[3, 1, 1, 1, 1, 1, 1, 3]))
    group = {1, 2, 3, 4, 5, 6}
    assert any(group <= set(stage.operators) for stage in plan.stages)


def test_zero_bubble_where_gradients_of_parameters_can_wait() -> None:
    graph = chain(8, parameter_elements=4, separable=True)
    whole = pipeline(problem(graph))
    plan = pipeline(problem(graph, weight_share=0.5))
    assert whole.schedule is Schedule.ONE_F_ONE_B
    assert plan.schedule is Schedule.ZERO_BUBBLE
    # F + B + W of a stage is 12 s for the whole batch; of a microbatch, F + B - W is lost, not F + B + W.
    assert whole.prediction.step_s == pytest.approx(12 + 3, rel=1e-3)
    assert plan.prediction.step_s == pytest.approx(12 + 1, rel=1e-3)
    assert [s.backward_s for s in plan.prediction.stages] == pytest.approx([2.0, 2.0])
    assert any("Of the backwards, 50% + 50% are gradients of parameters" in s for s in plan.rationale)
    alone = partition(problem(graph, weight_share=0.5), max_stages=1)
    assert alone.schedule is Schedule.ONE_F_ONE_B


def test_devices_take_turns_where_that_shortens_the_step() -> None:
    request = problem(chain(8), memory_bytes=10**6)
    plan = partition(request, max_replicas=1, max_chunks=2)
    assert plan.schedule is Schedule.INTERLEAVED
    assert [stage.device for stage in plan.stages] == ["cpu0", "cpu1"] * 2
    assert sizes(plan) == [2, 2, 2, 2]
    # Of a microbatch, a device's F + B is 3 s; half of it is lost instead of all.
    assert plan.prediction.step_s == pytest.approx(12 + 1.5, rel=1e-3)
    assert any("cpu0 and cpu1 take turns with 2 stages each" in sentence for sentence in plan.rationale)
    assert plan.rationale[0].endswith("cpu1 is the bottleneck, busy 89% of it.")
    more = partition(request, max_replicas=1)
    assert sizes(more) == [1] * 8
    assert more.prediction.step_s == pytest.approx(12 + 0.75, rel=1e-3)
    crawling = Link(bandwidth_bytes_per_s=1e9, latency_s=0.3, occupies_device=True)
    assert sizes(partition(problem(chain(8), link=crawling), max_replicas=1)) == [4, 4]


def test_stages_of_one_device_must_fit_together() -> None:
    graph = chain(4, parameter_elements=1000)
    stages = [Stage(device=f"cpu{i % 2}", operators=(i,)) for i in range(4)]
    predicted = predict(problem(graph), stages, 4, Schedule.INTERLEAVED).stages
    of_devices = [sum(s.memory_bytes for s in predicted[place::2]) for place in (0, 1)]
    for memory_bytes, short in ((max(of_devices), False), (min(of_devices) - 1, True)):
        request = problem(graph, memory_bytes=memory_bytes, counts=(4,))
        pricing, workload = Pricing.of(request), tabulate(request)
        splits = cut([Line(workload, range(4), 4)], [np.array([[0, 1, 2, 3, 5]]).T])
        mode = Mode(choice=0, layout=Layout.pipeline(4, 4, 2), schedule=Schedule.INTERLEAVED)
        found = evaluate(pricing, splits, np.array([[0, 1, 0, 1]]).T, mode, np.zeros((4, 1), dtype=bool))
        assert (found.excess_bytes_SN > 0).all() == short


@pytest.mark.parametrize(
    ("devices", "schedule", "problem_named"),
    [
        (("cpu0", "cpu1", "cpu0", "cpu1"), Schedule.ONE_F_ONE_B, "cpu0 is named twice"),
        (("cpu0", "cpu1", "cpu1", "cpu0"), Schedule.INTERLEAVED, "must take turns"),
        (("cpu0", "cpu1", "cpu0"), Schedule.INTERLEAVED, "must take turns"),
    ],
)
def test_devices_that_do_not_take_turns_are_refused(devices, schedule, problem_named) -> None:
    stages = [Stage(device=name, operators=(i,)) for i, name in enumerate(devices)]
    with pytest.raises(InvalidInput, match=problem_named):
        predict(problem(chain(len(devices))), stages, 4, schedule)


def test_gradients_of_parameters_that_wait_need_memory() -> None:
    graph = chain(8, elements=1000, parameter_elements=4, separable=True)
    request = problem(graph, counts=(4,), weight_share=0.5)
    stages = pipeline(request).stages
    apart, whole = (predict(request, stages, 4, s) for s in (Schedule.ZERO_BUBBLE, Schedule.ONE_F_ONE_B))
    more = [a.memory_bytes - w.memory_bytes for a, w in zip(apart.stages, whole.stages, strict=True)]
    # In flight, four tensors of 1000 bytes are kept of a microbatch (and 8 bytes by the loss); while it
    # waits, what each operator read (the batch not counted) and the gradient of its result.
    in_flight_bytes, waiting_bytes = (4000, 4008), ((3 + 4) * 1000, (4 + 4) * 1000)
    assert more[0] == (in_flight_bytes[0] + waiting_bytes[0]) - 2 * in_flight_bytes[0]
    assert more[1] == 2 * waiting_bytes[1] - in_flight_bytes[1]


def test_what_waits_adds_to_what_is_in_flight() -> None:
    builder = GraphBuilder()
    builder.parameter("weight", 4)
    names = ["x"]
    for number in range(2):
        names.append(builder.add(f"wide{number}", names[-1], elements=10_000))
        names.append(builder.add(f"narrow{number}", names[-1], elements=10))
        names.append(
            builder.add(f"linear{number}", names[-1], elements=10, parameters=["weight"], separable=True)
        )
        builder.save(f"wide{number}", 3 * number + 1)
    graph = builder.build([names[-1]], {"x": 8})
    request = problem(graph, counts=(4,), weight_share=0.5)
    stages = [Stage(device="cpu0", operators=(0, 1, 2)), Stage(device="cpu1", operators=(3, 4, 5))]
    apart, whole = (predict(request, stages, 4, s) for s in (Schedule.ZERO_BUBBLE, Schedule.ONE_F_ONE_B))
    # On stage 1, one microbatch waits while one is in flight: two tensors of 10 elements of a quarter batch.
    more = [a.memory_bytes - w.memory_bytes for a, w in zip(apart.stages, whole.stages, strict=True)]
    assert more == [0, 2 * 10]


def test_recomputation_only_where_memory_asks_for_it() -> None:
    graph = chain(8, elements=1000)
    free = pipeline(problem(graph, counts=(4,)), schedule=Schedule.GPIPE)
    assert not any(stage.recompute for stage in free.stages)
    tight = pipeline(problem(graph, counts=(4,), memory_bytes=11_000), schedule=Schedule.GPIPE)
    assert any(stage.recompute for stage in tight.stages)
    assert max(stage.memory_bytes for stage in tight.prediction.stages) <= 11_000
    assert tight.prediction.step_s > free.prediction.step_s
    assert any("runs its forward again" in sentence for sentence in tight.rationale)


def test_what_does_not_fit_says_what_is_missing_and_what_would_fit() -> None:
    graph = chain(8, elements=1000, parameter_elements=10)
    with pytest.raises(InfeasiblePlan) as caught:
        partition(problem(graph, memory_bytes=5_000))
    short_bytes = caught.value.short_bytes
    assert "% of these rows" in caught.value.fits
    assert caught.value.device in {"cpu0", "cpu1"}
    partition(problem(graph, memory_bytes=5_000 + short_bytes))
    with pytest.raises(InfeasiblePlan):
        partition(problem(graph, memory_bytes=5_000 + short_bytes - 8))


def test_parameters_that_do_not_fit_ask_for_devices_not_for_rows() -> None:
    with pytest.raises(InfeasiblePlan, match="more devices"):
        partition(problem(chain(8, parameter_elements=1000), memory_bytes=5_000))


def test_more_devices_than_operators_is_refused() -> None:
    with pytest.raises(InvalidInput, match="3 devices are more than the 2 operators"):
        partition(problem(chain(2), speeds=(1.0, 1.0, 1.0)))


@pytest.mark.parametrize(
    ("order", "message"), [(["cpu7"], "unknown device 'cpu7'"), (["cpu0", "cpu0"], "named twice")]
)
def test_a_wrong_order_of_devices_is_refused(order, message) -> None:
    with pytest.raises(InvalidInput, match=message):
        partition(problem(chain(4)), devices_order=order)


def test_the_rationale_names_bottleneck_cut_and_alternatives() -> None:
    plan = pipeline(problem(chain(9), seconds=[4, 1, 1, 1, 1, 1, 1, 1, 1], link=LOOPBACK))
    text = " ".join(plan.rationale)
    assert "bottleneck" in text
    first_of_second = plan.stages[1].operators[0]
    assert f"begins in `layers.{first_of_second}`" in text
    assert "one device alone" in text
    assert "as many operators on every stage" in text


def test_large_graphs_are_cut_as_well_as_is_known_to_be_possible() -> None:
    """So many operators that not all cuts are tried."""
    request = problem(chain(1200), speeds=(1.0, 1.0, 1.0), counts=(4,))
    plan = pipeline(request)
    thirds = [Stage(device=f"cpu{i}", operators=tuple(range(400 * i, 400 * (i + 1)))) for i in range(3)]
    even = predict(request, thirds, plan.microbatches, plan.schedule)
    assert plan.prediction.step_s <= even.step_s * 1.001


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([("cpu0", (0, 1)), ("cpu1", (2,))], "each of the graph's 4 operators exactly once"),
        ([("cpu0", (0, 1, 2, 3)), ("cpu1", ())], "without operators"),
        ([("cpu0", (2, 3)), ("cpu1", (0, 1))], "from a later stage"),
        ([("cpu9", (0, 1, 2, 3))], "unknown device"),
    ],
)
def test_predict_refuses_what_is_no_split(stages, message) -> None:
    split = [Stage(device=device, operators=operators) for device, operators in stages]
    with pytest.raises(InvalidInput, match=message):
        predict(problem(chain(4)), split, 1, Schedule.GPIPE)


def test_predict_knows_only_the_given_microbatch_counts() -> None:
    whole = [Stage(device="cpu0", operators=(0, 1))]
    with pytest.raises(InvalidInput, match="only for 1, 2, 4"):
        predict(problem(chain(2)), whole, 3, Schedule.GPIPE)


def test_tied_parameters_cost_an_exchange_and_memory_on_both_holders() -> None:
    def split_s(*, trainable: bool) -> tuple[float, list[int]]:
        builder = GraphBuilder()
        tied = builder.parameter("tied", 1000, trainable=trainable)
        builder.add("first", "x", parameters=[tied])
        builder.add("last", "first", parameters=[tied])
        request = problem(builder.build(["last"], {"x": 8}), link=LOOPBACK)
        stages = [Stage(device="cpu0", operators=(0,)), Stage(device="cpu1", operators=(1,))]
        prediction = predict(request, stages, 2, Schedule.ONE_F_ONE_B)
        return prediction.step_s, [stage.memory_bytes for stage in prediction.stages]

    tied_s, tied_bytes = split_s(trainable=True)
    frozen_s, frozen_bytes = split_s(trainable=False)
    assert tied_s - frozen_s == pytest.approx(2 * (LOOPBACK.latency_s + LOOPBACK.transfer_s(4000)))
    # Gradients and two words of optimiser state per trained weight, on each holder.
    assert [a - b for a, b in zip(tied_bytes, frozen_bytes, strict=True)] == [12_000, 12_000]


def test_devices_share_the_microbatches_where_no_cut_is_even() -> None:
    request = problem(chain(3, parameter_elements=4), seconds=[1, 10, 1], counts=(4,), link=LOOPBACK)
    plan = partition(request)
    assert [(stage.device, stage.operators, stage.share) for stage in plan.stages] == [
        ("cpu0", (0, 1, 2), 2),
        ("cpu1", (0, 1, 2), 2),
    ]
    assert plan.prediction.step_s < 0.6 * pipeline(request).prediction.step_s
    assert plan.prediction.step_s == pytest.approx(36 / 2, rel=0.01)


def test_a_slower_device_gets_fewer_microbatches() -> None:
    request = problem(chain(3, parameter_elements=4), seconds=[1, 10, 1], speeds=(1.0, 0.4), counts=(10,))
    plan = partition(request)
    assert {stage.device: stage.share for stage in plan.stages} == {"cpu0": 7, "cpu1": 3}
    busy_s = [stage.busy_s for stage in plan.prediction.stages]
    assert busy_s == pytest.approx([7 * 3.6, 3 * 3.6 / 0.4])
    text = " ".join(plan.rationale)
    assert "2 replicas of the whole model, on cpu0, cpu1, share the microbatches 7 + 3" in text
    assert "2 stages: " in text
    assert "one device alone: " in text


def test_gradients_that_take_long_to_sum_speak_against_replicas() -> None:
    def stages(elements: int) -> list[int]:
        return sizes(partition(problem(chain(4, parameter_elements=elements), link=LOOPBACK), max_chunks=1))

    assert stages(10) == [4, 4]
    assert stages(1_000_000) == [2, 2]  # 16 MB at 1 MB/s


def test_a_model_that_fits_no_device_alone_is_cut() -> None:
    graph = chain(4, parameter_elements=1000)
    assert sizes(partition(problem(graph, memory_bytes=70_000))) == [4, 4]
    assert sizes(partition(problem(graph, memory_bytes=40_000), max_chunks=1)) == [2, 2]


def test_a_stage_that_changes_buffers_has_no_replicas() -> None:
    builder = GraphBuilder()
    builder.buffer("running", 4)
    builder.add("first", "x", buffers=["running"], updates="running")
    builder.add("last", "first")
    request = problem(builder.build(["last"], {"x": 8}), seconds=[1, 10])
    assert sizes(partition(request)) == [1, 1]
    both = [Stage(device=f"cpu{i}", operators=(0, 1)) for i in range(2)]
    with pytest.raises(
        InvalidInput, match=r"cpu0 and cpu1 cannot be replicas of one stage: .* buffer running"
    ):
        predict(request, both, 4, Schedule.ONE_F_ONE_B)
    last = [Stage(device="cpu0", operators=(0,)), Stage(device="cpu1", operators=(1,))]
    predict(request, last, 4, Schedule.ONE_F_ONE_B)


def test_only_the_stage_with_much_work_and_few_parameters_is_replicated() -> None:
    builder = GraphBuilder()
    builder.add("table", "x", parameters=[builder.parameter("rows", 10_000_000)])
    builder.add("work", "table", parameters=[builder.parameter("weight", 4)])
    builder.add("last", "work")
    request = problem(
        builder.build(["last"], {"x": 8}), speeds=(1.0,) * 3, seconds=[1, 2, 0.01], counts=(8,), link=LOOPBACK
    )
    plan = partition(request)
    assert [(stage.operators, stage.share) for stage in plan.stages] == [
        ((0,), 1),
        ((1, 2), 4),
        ((1, 2), 4),
    ]
    assert plan.prediction.step_s < 0.7 * partition(request, max_stages=2).prediction.step_s
    text = " ".join(plan.rationale)
    assert "2 replicas of stage 1, on cpu1, cpu2, share the microbatches 4 + 4" in text
    assert "2 stages: " in text


def test_a_batch_that_cannot_be_split_has_no_replicas() -> None:
    """So many operators that not all cuts are tried."""
    request = problem(chain(300, parameter_elements=4), speeds=(1.0,) * 3, counts=(1,), link=LOOPBACK)
    assert sizes(partition(request)) == [300]
