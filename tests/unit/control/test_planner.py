from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest

from chain_model import ROWS, ChainCosts, batch
from forescale.control.planner import Planner, same_split
from forescale.core.errors import InfeasiblePlan
from forescale.plan.partition_plan import PartitionPlan, Prediction, Schedule, Stage
from forescale.plan.problem import PartitionProblem


class CountedCosts:
    def __init__(self) -> None:
        self.costs = ChainCosts()
        self.asked = 0

    def problem(self, binding: Mapping[str, int], speeds: Mapping[str, float]) -> PartitionProblem:
        self.asked += 1
        return self.costs.problem(binding, speeds)


def test_the_same_question_is_worked_out_once() -> None:
    costs = CountedCosts()
    planner = Planner(costs)
    plan = planner.best(batch(128), {})
    first = planner.prediction(plan, batch(128), {})
    assert planner.prediction(planner.best(batch(128), {}), batch(128), {}) is first
    assert costs.asked == 1


def test_a_plan_is_predicted_to_take_what_it_says() -> None:
    planner = Planner(ChainCosts())
    plan = planner.best(batch(128), {"cpu1": 0.5})
    assert planner.prediction(plan, batch(128), {"cpu1": 0.5}).step_s == pytest.approx(plan.prediction.step_s)


def test_compute_is_that_of_all_microbatches() -> None:
    planner = Planner(ChainCosts())
    plan = planner.best(batch(128), {})
    prediction = planner.prediction(plan, batch(128), {})
    total = sum(stage.forward_s + stage.backward_s for stage in prediction.stages)
    assert sum(planner.compute_s(plan, batch(128), {})) == pytest.approx(plan.microbatches * total)


def test_demand_adds_up_the_stages_of_a_device() -> None:
    planner = Planner(ChainCosts())
    plan = planner.best(batch(128), {})
    assert len(plan.stages) > 2  # devices take turns
    demand = planner.demand(plan, batch(128))
    prediction = planner.prediction(plan, batch(128), {})
    compute_s = sum(asked.compute_s for asked in demand.values())
    assert compute_s == pytest.approx(sum(planner.compute_s(plan, batch(128), {})))
    optimizer_s = sum(stage.optimizer_s for stage in prediction.stages)
    assert sum(asked.busy_s for asked in demand.values()) == pytest.approx(compute_s + optimizer_s)
    memory_bytes = sum(stage.memory_bytes for stage in prediction.stages)
    assert sum(asked.memory_bytes for asked in demand.values()) == memory_bytes
    assert demand["cpu0"].busy_fraction == pytest.approx(demand["cpu0"].busy_s / prediction.step_s)


def test_small_batch_is_cut_into_fewer_microbatches() -> None:
    planner = Planner(ChainCosts())
    plan = planner.best(batch(128), {})
    assert plan.microbatches > 1
    small_s = planner.prediction(plan, {"rows": 1, "length": 128}, {}).step_s
    assert small_s < planner.prediction(plan, {"rows": ROWS, "length": 128}, {}).step_s


def test_missing_memory_is_named_by_device() -> None:
    planner = Planner(ChainCosts(memory_bytes=20_000_000))
    plan = Planner(ChainCosts()).best(batch(128), {})
    assert set(planner.short_bytes(plan, batch(100_000))) == {stage.device for stage in plan.stages}
    assert planner.short_bytes(plan, batch(1)) == {}


def test_a_device_lacks_memory_for_all_its_stages_together() -> None:
    count = len(ChainCosts().graph.operators)
    bounds = [count * part // 4 for part in range(5)]
    plan = PartitionPlan(
        stages=tuple(
            Stage(device=f"cpu{number % 2}", operators=tuple(range(a, b)))
            for number, (a, b) in enumerate(pairwise(bounds))
        ),
        microbatches=4,
        schedule=Schedule.INTERLEAVED,
        prediction=Prediction(step_s=0.0, stages=()),
    )
    needed = [s.memory_bytes for s in Planner(ChainCosts()).prediction(plan, batch(128), {}).stages]
    capacity_bytes = max(needed)  # enough for any of the stages
    short = Planner(ChainCosts(memory_bytes=capacity_bytes)).short_bytes(plan, batch(128))
    assert short == {
        "cpu0": needed[0] + needed[2] - capacity_bytes,
        "cpu1": needed[1] + needed[3] - capacity_bytes,
    }


def test_infeasible_is_infeasible_again() -> None:
    planner = Planner(ChainCosts(memory_bytes=1000))
    for _ in range(2):
        with pytest.raises(InfeasiblePlan):
            planner.best(batch(128), {})


def test_splits_are_compared_without_their_reasons() -> None:
    planner = Planner(ChainCosts())
    a, b = planner.best(batch(128), {}), planner.best(batch(512), {})
    assert same_split(a, a)
    assert not same_split(a, b)
