"""More threads or more replicas, in virtual time: late rows, core-seconds, and nobody's cores taken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from forescale.control.scale import ScalingRules
from forescale.registry.records import DeploymentSpec
from simulated_threads import TICK_S, Model, serve

BUSY = [30.0] * 80 + [150.0] * 160 + [20.0] * 120


def model(
    name: str = "m",
    *,
    most: int = 4,
    row_s: float = 0.01,
    serial_share: float = 0.1,
    demand_per_s: list[float] = BUSY,
    max_threads: int | None = None,
) -> Model:
    spec = DeploymentSpec(model=name, number=1, max_replicas=most, latency_s=0.5, max_threads=max_threads)
    return Model(spec=spec, row_s=row_s, serial_share=serial_share, demand_per_s=demand_per_s)


def threads(of: Model) -> list[int]:
    return [each or 0 for _, each in of.wanted]


def replicas(of: Model) -> list[int]:
    return [each for each, _ in of.wanted]


def test_threads_help_at_once_where_a_replica_would_come_too_late() -> None:
    stretched, multiplied = model(), model()
    serve([stretched], 4, seed=1)
    serve([multiplied], 4, seed=1, vertical=False)
    assert stretched.late <= multiplied.late / 4
    assert stretched.core_s <= 1.25 * multiplied.core_s  # threads share work less than evenly
    assert max(threads(stretched)) > 1
    assert any("for 30 s 1 replica" in reason or "replicas of" in reason for reason in stretched.reasons)
    assert max(replicas(stretched)) < max(replicas(multiplied))


def test_threads_go_when_nothing_has_needed_them_for_a_while() -> None:
    quiet = model(demand_per_s=[*BUSY, *[1.0] * 400])
    serve([quiet], 4, seed=2)
    assert max(threads(quiet)) > 1
    assert quiet.wanted[-1] == (1, 1)
    changes = sum(one != other for one, other in zip(threads(quiet), threads(quiet)[1:], strict=False))
    assert changes <= 6


def test_threads_that_do_not_help_are_tried_once_and_given_back() -> None:
    serial = model(serial_share=1.0)
    serve([serial], 4, seed=1)
    tried = sum(one == 1 < other for one, other in zip(threads(serial), threads(serial)[1:], strict=False))
    assert tried == 1
    assert threads(serial).count(2) * TICK_S <= 4.0
    assert max(replicas(serial)) >= 2


def test_what_threads_are_worth_is_tried_again_when_it_is_long_ago() -> None:
    changing = model(most=1, serial_share=1.0, demand_per_s=[150.0] * 200)

    def look(tick: int) -> None:
        changing.serial_share = 1.0 if tick < 40 else 0.0

    serve([changing], 4, seed=1, rules=ScalingRules(evidence_s=20.0), after=look)
    worth = [tick for tick, each in enumerate(threads(changing)) if each > 1]
    again = next(tick for tick in worth if tick > 40)
    assert again * TICK_S >= 20.0
    assert threads(changing)[-1] > 1


def test_a_fixed_number_of_replicas_is_stretched_as_far_as_its_deployment_allows() -> None:
    busy = [30.0] * 80 + [250.0] * 80
    fixed = model(most=1, demand_per_s=busy)
    limited = model(most=1, demand_per_s=busy, max_threads=2)
    for each in (fixed, limited):
        serve([each], 4, seed=1)
    assert {*replicas(fixed), *replicas(limited)} == {1}
    assert (max(threads(fixed)), max(threads(limited))) == (4, 2)
    assert fixed.late < limited.late / 2
    limited.spec = replace(limited.spec, max_threads=1)
    limited.demand_per_s = [250.0] * 20
    serve([limited], 4, seed=1)
    assert limited.wanted[-1] == (1, 1)


def test_a_model_too_slow_for_its_target_gets_the_threads_that_it_takes() -> None:
    slow = model(row_s=0.6, serial_share=0.05, demand_per_s=[0.5] * 200)
    serve([slow], 4, seed=1)
    assert threads(slow)[-1] == 4  # two take 0.32 s, and a request may have to wait for the one before it
    assert slow.slowest_s[-1] <= 0.25


@pytest.mark.parametrize("cores", [1, 2, 4])
def test_threads_beyond_one_never_outnumber_the_cores(cores: int) -> None:
    models = [model(name) for name in "abc"]
    taken: list[int] = []

    def look(_tick: int) -> None:
        taken.append(
            sum(each.wanted[-1][0] * (each.wanted[-1][1] or 0) for each in models if each.threads != 1)
        )

    serve(models, cores, seed=3, after=look)
    assert max(taken) <= cores
    if cores == 1:
        assert {each for of in models for each in threads(of)} == {1}


def test_the_same_seed_decides_the_same() -> None:
    one, other = model(), model()
    serve([one], 4, seed=5)
    serve([other], 4, seed=5)
    assert one.wanted == other.wanted
