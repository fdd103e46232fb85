"""From what is wanted and what there is to what is done."""

from __future__ import annotations

from dataclasses import replace

from forescale.control.serving import (
    Command,
    Observation,
    Phase,
    Prefer,
    Replica,
    Serve,
    StartReplica,
    StopReplica,
    Version,
    Withdraw,
    step,
)
from forescale.registry.records import DeploymentSpec

ONE, TWO = ("digits", 1), ("digits", 2)


def deployed(number: int = 1, least: int = 1, most: int | None = None) -> DeploymentSpec:
    return DeploymentSpec(model="digits", number=number, min_replicas=least, max_replicas=most or least)


def replica(name: str, version: Version = ONE, phase: Phase = Phase.READY, device: str = "cpu0") -> Replica:
    return Replica(name=name, version=version, phase=phase, device=device)


def seen(*replicas: Replica, served=(ONE,), withdrawn=(), devices=("cpu0",)) -> Observation:
    return Observation(
        devices=devices, replicas=replicas, served=frozenset(served), withdrawn=frozenset(withdrawn)
    )


def start(version: Version = ONE, device: str = "cpu0") -> Command:
    return StartReplica(version=version, device=device)


def test_a_new_deployment_takes_requests_and_gets_its_replicas() -> None:
    assert step([deployed(least=2)], seen(served=())) == (Serve(version=ONE), start(), start())


def test_nothing_is_done_where_nothing_is_amiss() -> None:
    assert step([deployed()], seen(replica("a", phase=Phase.STARTING))) == ()
    assert step([deployed()], seen(replica("a"))) == ()


def test_replicas_go_where_there_are_fewest() -> None:
    there = seen(replica("a", ("words", 1)), served=[("words", 1)], devices=("cpu0", "cpu1"))
    words = DeploymentSpec(model="words", number=1)
    assert step([deployed(least=4), words], there)[1:] == (
        start(device="cpu1"),
        start(device="cpu0"),
        start(device="cpu1"),
        start(device="cpu0"),
    )


def test_more_replicas_are_started_when_more_are_wanted() -> None:
    assert step([deployed(least=2)], seen(replica("a"))) == (start(),)


def test_a_replica_that_leaves_does_not_count() -> None:
    assert step([deployed()], seen(replica("a", phase=Phase.LEAVING))) == (start(),)


def test_too_many_replicas_are_stopped_and_those_that_answer_stay() -> None:
    there = seen(replica("a"), replica("b", phase=Phase.STARTING), replica("c"))
    assert step([deployed(most=2)], there) == (StopReplica(name="b"),)
    assert step([deployed(most=1)], there) == (StopReplica(name="c"), StopReplica(name="b"))


def test_a_new_version_takes_over_only_when_it_is_complete() -> None:
    wanted = [deployed(2, least=2)]
    old, first, second = replica("old"), replica("a", TWO), replica("b", TWO)
    assert step(wanted, seen(old)) == (Serve(version=TWO), start(TWO), start(TWO))
    half = seen(old, first, replica("b", TWO, Phase.STARTING), served=(ONE, TWO))
    assert step(wanted, half) == ()
    whole = seen(old, first, second, served=(ONE, TWO))
    assert step(wanted, whole) == (Prefer(version=TWO), Withdraw(version=ONE))
    assert step(wanted, seen(old, first, second, served=[TWO], withdrawn=[ONE])) == ()


def test_going_back_while_the_new_version_is_still_starting() -> None:
    there = seen(replica("old"), replica("new", TWO, Phase.STARTING), served=(ONE, TWO))
    assert step([deployed(1)], there) == (Prefer(version=ONE), Withdraw(version=TWO))


def test_undeployed_models_are_withdrawn_and_no_others() -> None:
    words = ("words", 1)
    there = seen(replica("a"), replica("w", words), served=(ONE, words))
    assert step([deployed()], there) == (Withdraw(version=words),)


def test_a_version_wanted_again_waits_until_it_has_left() -> None:
    assert step([deployed()], seen(replica("a"), served=(), withdrawn=[ONE])) == ()


def test_a_version_that_cannot_be_used_leaves_the_old_one_in_place() -> None:
    there = replace(seen(replica("old")), unusable=frozenset({TWO}))
    assert step([deployed(2)], there) == ()


def test_a_replica_of_nothing_is_stopped() -> None:
    assert step([], seen(replica("a"), served=())) == (StopReplica(name="a"),)
    assert step([], seen(replica("a", phase=Phase.LEAVING), served=())) == ()


def test_scaling_says_how_many_replicas_within_what_is_deployed() -> None:
    wanted = [deployed(least=1, most=4)]
    assert step(wanted, seen(replica("a")), {"digits": 3}) == (start(), start())
    there = seen(replica("a"), replica("b"), replica("c"))
    assert step(wanted, there, {"digits": 2}) == (StopReplica(name="c"),)
    assert step([deployed(least=0, most=1)], seen(replica("a")), {"digits": 0}) == (StopReplica(name="a"),)


def test_a_new_version_of_a_model_that_sleeps_is_seen_to_serve_first() -> None:
    wanted, none = [deployed(2, least=0, most=1)], {"digits": 0}
    assert step(wanted, seen(served=(ONE, TWO)), none) == (start(TWO),)
    there = seen(replica("a", TWO), served=(ONE, TWO))
    assert step(wanted, there, none) == (Prefer(version=TWO), Withdraw(version=ONE))
    assert step(wanted, seen(replica("a", TWO), served=(TWO,)), none) == (StopReplica(name="a"),)


def test_replicas_of_a_model_go_to_devices_without_one() -> None:
    others = [replica(name, ("words", 1), device="cpu1") for name in "xy"]
    there = seen(replica("a"), *others, served=[ONE, ("words", 1)], devices=("cpu0", "cpu1"))
    wanted = [deployed(least=2), DeploymentSpec(model="words", number=1, min_replicas=2, max_replicas=2)]
    assert step(wanted, there) == (start(device="cpu1"),)
