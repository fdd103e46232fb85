"""From what is wanted and what there is to what is done."""

from __future__ import annotations

from dataclasses import replace

from forescale.control.serving import (
    Command,
    Observation,
    Phase,
    Replica,
    Serve,
    SetRoute,
    StartReplica,
    StopReplica,
    Version,
    Withdraw,
    step,
)
from forescale.engine.serve.routing import Route
from forescale.registry.records import DeploymentSpec
from forescale.registry.rollout import Progress, Rollout, RolloutSpec, State, Strategy

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


def to(version: Version) -> Command:
    return SetRoute(model=version[0], route=Route(version=str(version[1])))


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
    assert step(wanted, whole) == (to(TWO), Withdraw(version=ONE))
    assert step(wanted, seen(old, first, second, served=[TWO], withdrawn=[ONE])) == ()


def test_going_back_while_the_new_version_is_still_starting() -> None:
    there = seen(replica("old"), replica("new", TWO, Phase.STARTING), served=(ONE, TWO))
    assert step([deployed(1)], there) == (to(ONE), Withdraw(version=TWO))


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
    assert step(wanted, there, none) == (to(TWO), Withdraw(version=ONE))
    assert step(wanted, seen(replica("a", TWO), served=(TWO,)), none) == (StopReplica(name="a"),)


def test_replicas_of_a_model_go_to_devices_without_one() -> None:
    others = [replica(name, ("words", 1), device="cpu1") for name in "xy"]
    there = seen(replica("a"), *others, served=[ONE, ("words", 1)], devices=("cpu0", "cpu1"))
    wanted = [deployed(least=2), DeploymentSpec(model="words", number=1, min_replicas=2, max_replicas=2)]
    assert step(wanted, there) == (start(device="cpu1"),)


def test_a_version_that_still_leaves_does_not_take_over() -> None:
    there = seen(replica("a"), replica("b", TWO), served=[TWO], withdrawn=[ONE])
    assert step([deployed(1)], there) == ()


def rollout(routed: int = -1, stage: int = 0, shares=(0.25,)) -> dict[str, Rollout]:
    spec = RolloutSpec(model="digits", number=2, stable=1, strategy=Strategy.CANARY, shares=shares)
    progress = Progress(stage=stage, routed=routed)
    state = State.RUNNING
    one = Rollout(
        id=1, revision=0, spec=spec, state=state, progress=progress, started_s=0.0, started_by="ada"
    )
    return {"digits": one}


def test_a_rollout_brings_a_version_beside_the_deployed_one_with_replicas_for_its_share() -> None:
    wanted = [deployed(least=8)]
    old = [replica(f"o{place}") for place in range(8)]
    assert step(wanted, seen(*old), None, rollout()) == (Serve(version=TWO), start(TWO), start(TWO), to(ONE))
    new = [replica("a", TWO), replica("b", TWO, Phase.STARTING)]
    there = seen(*old, *new, served=(ONE, TWO))
    preview = Route(version="1", header={"canary": "2", "stable": "1"})
    assert step(wanted, there, None, rollout()) == (SetRoute(model="digits", route=preview),)
    there = replace(there, routes={"digits": preview})
    assert step(wanted, there, None, rollout()) == ()
    (command,) = step(wanted, there, None, rollout(routed=0))
    assert isinstance(command, SetRoute)
    assert command.route.shares == {"2": 0.25}


def test_the_old_version_is_kept_until_the_rollout_has_ended() -> None:
    there = seen(replica("a"), replica("b", TWO), served=(ONE, TWO))
    header = {"canary": "2", "stable": "1"}
    (command,) = step([deployed()], there, None, rollout(routed=1, stage=1))
    assert command == SetRoute(model="digits", route=Route(version="2", header=header))
    assert step([deployed(2)], there) == (to(TWO), Withdraw(version=ONE))
    assert step([deployed(1)], there) == (to(ONE), Withdraw(version=TWO))
    # It has ended, though whoever read it did so just before.
    assert step([deployed(2)], there, None, rollout(routed=1, stage=1)) == (to(TWO), Withdraw(version=ONE))


def test_a_model_that_sleeps_is_kept_awake_by_a_rollout() -> None:
    wanted, none = [deployed(least=0, most=1)], {"digits": 0}
    assert step(wanted, seen(served=(ONE, TWO)), none, rollout()) == (start(ONE), start(TWO), to(ONE))


def test_a_version_that_is_rolled_out_but_gone_is_not_routed_to() -> None:
    there = replace(seen(replica("old"), replica("x", TWO)), routes={"digits": Route(version="1")})
    assert step([deployed()], there, None, rollout(routed=0)) == (Serve(version=TWO),)


def test_another_version_leaves_when_a_rollout_has_begun_meanwhile() -> None:
    three = ("digits", 3)
    there = seen(replica("a"), replica("c", three), replica("b", TWO), served=(ONE, TWO, three))
    assert step([deployed()], there, None, rollout())[-1] == Withdraw(version=three)
