"""Which replicas fit where, and what is said of those that do not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from forescale.control.memory import Budget, Memory, Room, guessed_bytes, refusal
from forescale.control.scale import Load, ScalingRules, ScalingState
from forescale.control.scaling import step
from forescale.control.serving import (
    Observation,
    Phase,
    Replica,
    Serve,
    Short,
    StartReplica,
)
from forescale.control.serving import step as serving_step
from forescale.registry.records import DeploymentSpec

BIG, SMALL = ("big", 1), ("small", 1)
MB = 1_000_000
# A replica of big takes 600 MB, one of small 200 MB.
MEMORY = Memory(
    room_bytes={"cpu0": 1000 * MB, "cpu1": 700 * MB},
    process_bytes=100 * MB,
    model_bytes={BIG: 500 * MB, SMALL: 100 * MB},
    measured=frozenset({BIG}),
)
DEVICES = ("cpu0", "cpu1")


def deployed(model: str, least: int, most: int | None = None) -> DeploymentSpec:
    return DeploymentSpec(model=model, number=1, min_replicas=least, max_replicas=most or max(least, 1))


def seen(*replicas: Replica) -> Observation:
    return Observation(devices=DEVICES, replicas=replicas, served=frozenset({BIG, SMALL}), memory=MEMORY)


def at(device: str, version=BIG, phase: Phase = Phase.READY) -> Replica:
    return Replica(name=f"{version[0]}-{device}", version=version, device=device, phase=phase)


def test_replicas_go_only_where_they_fit() -> None:
    commands = serving_step([deployed("big", 2), deployed("small", 3)], seen())
    assert [command.device for command in commands if isinstance(command, StartReplica)] == [
        "cpu0",
        "cpu1",
        "cpu0",
        "cpu0",
    ]
    assert commands[-1] == Short(version=SMALL, replicas=1, missing_bytes=100 * MB)


def test_what_fits_nowhere_is_told_and_nothing_is_started() -> None:
    commands = serving_step([deployed("big", 3), deployed("small", 0, 1)], seen(at("cpu0"), at("cpu1")))
    assert commands == (Short(version=BIG, replicas=1, missing_bytes=200 * MB),)


def test_a_replica_that_leaves_holds_its_memory_until_it_is_gone() -> None:
    leaving = at("cpu0", phase=Phase.LEAVING)
    wanted = [deployed("big", 2), deployed("small", 0, 1)]
    assert serving_step(wanted, seen(leaving, at("cpu1"))) == (
        Short(version=BIG, replicas=1, missing_bytes=200 * MB),
    )
    assert serving_step(wanted, seen(at("cpu1"))) == (StartReplica(version=BIG, device="cpu0"),)


def test_devices_of_which_nothing_is_known_hold_any_number() -> None:
    there = replace(seen(), memory=Memory(), served=frozenset())
    commands = serving_step([deployed("big", 9)], there)
    assert commands[0] == Serve(version=BIG)
    assert len(commands) == 10
    assert Room((), MEMORY).place(BIG, Counter()) is None


def budget_of(kept, least, others=()) -> Budget:
    """Replicas are in processes of their own."""
    kept, others = ([(*each, None) for each in there] for there in (kept, others))
    return Budget(DEVICES, MEMORY, kept, others, least)


def test_replicas_that_others_have_at_least_are_granted_first() -> None:
    for kept in ([], [(SMALL, "cpu0")] * 5 + [(SMALL, "cpu1")] * 3):
        budget = budget_of(kept, {BIG: 1, SMALL: 0})
        assert sum(budget.grant(SMALL) for _ in range(9)) == 5  # two beside big, and three
        assert budget.missing_bytes(SMALL) == 100 * MB


def test_scaling_grants_what_fits_and_says_what_is_missing() -> None:
    loads = Load(
        spec=deployed("small", 1, 9),
        arrived_rows=0,
        waiting_rows=10_000,
        batch_times={1: ((1.0, 0.1),)},
        max_rows=1,
        ready=1,
        start_s=1.0,
    )
    state = ScalingState()
    for now_s in (0.0, 1.0):
        budget = budget_of([(SMALL, "cpu0")], {SMALL: 1}, others=[(BIG, "cpu0")])
        state, _ = step(state, [loads], now_s, 8, ScalingRules(level=None), budget=budget)
    scale = state.models["small"]
    assert (scale.wanted, scale.short) == (5, 4)  # two beside big, three on the other device
    assert scale.reason.endswith("; 4 fewer than needed: 100 MB of memory are missing for one more")


def test_an_extra_replica_leaves_for_what_another_deployment_has_at_least() -> None:
    budget = budget_of([(SMALL, "cpu0"), (SMALL, "cpu1"), (SMALL, "cpu1")], {BIG: 2, SMALL: 1})
    # Both extra ones are where big must be; there is room for one beside the other big.
    assert [budget.grant(SMALL), budget.grant(SMALL)] == [True, False]


def test_what_can_never_fit_is_refused_with_a_line() -> None:
    assert refusal(BIG, 2, {SMALL: 2}, DEVICES, MEMORY) is None
    assert refusal(BIG, 2, {SMALL: 3}, DEVICES, MEMORY) == (
        "big@1 does not fit: a replica takes 600 MB (measured), and beside what other deployments have at "
        "least, 100 MB are missing for 1 of 2"
    )
    assert refusal(SMALL, 9, {}, DEVICES, MEMORY) == (
        "small@1 does not fit: a replica takes 200 MB (guessed from its file), and beside what other "
        "deployments have at least, 100 MB are missing for 1 of 9"
    )


def test_a_deployment_is_not_refused_for_what_others_lack_without_it() -> None:
    assert refusal(SMALL, 1, {BIG: 3}, DEVICES, MEMORY) is None


def test_the_order_in_which_deployments_came_does_not_decide() -> None:
    # Small ones spread over both devices would leave no room for the second big one.
    assert refusal(BIG, 2, {SMALL: 2}, ("cpu0", "cpu1"), MEMORY) is None


def test_a_guess_grows_with_the_file() -> None:
    assert guessed_bytes(0) == 64 * MB
    assert guessed_bytes(400 * MB) == 564 * MB
