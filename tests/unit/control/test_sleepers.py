"""Which models a step may pass over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from forescale.control.serving import Command, Serve, SetRoute, Short, StopReplica
from forescale.control.sleepers import Sleepers, without
from forescale.engine.serve.orders import PlaneState, SetThreads, Steer
from forescale.engine.serve.policy import QueuePolicy
from forescale.engine.serve.roster import Replica, State
from forescale.engine.serve.routing import Route
from forescale.registry.records import DeploymentSpec
from version_states import version_state

MODELS = ("a", "b")
WANTED = tuple(DeploymentSpec(model=model, number=1, min_replicas=0) for model in MODELS)
STATES = tuple(map(version_state, MODELS))
SEEN = PlaneState(
    plane="p",
    devices=("cpu0",),
    versions=STATES,
    routes={model: Route(version="1") for model in MODELS},
)
REPLICA = Replica(
    name="a.1.1",
    model="a",
    version="1",
    device="cpu0",
    house="a.1.1",
    state=State.DRAINING,
    process=None,
    threads=1,
    cause=None,
    attempts=0,
    retry_s=0.0,
)


def settled(
    resting: Mapping[str, bool], *commands: Command | Steer | SetThreads, busy: tuple[str, ...] = ()
) -> Sleepers:
    """After a step that found these to be resting."""
    sleepers = Sleepers()
    sleepers.look(WANTED, SEEN, busy, is_counting=True)
    sleepers.settle(resting, commands)
    return sleepers


def test_models_that_rest_are_passed_over_and_those_not_counted_only_until_they_are() -> None:
    sleepers = settled({"a": True, "b": False})
    assert sleepers.look(WANTED, SEEN, (), is_counting=False) == {"a", "b"}
    assert sleepers.look(WANTED, SEEN, (), is_counting=True) == {"a"}
    assert sleepers.look(WANTED, SEEN, (), is_counting=False) == {"a"}, "b did not rest when it was counted"
    sleepers.wake()
    assert not sleepers.look(WANTED, SEEN, (), is_counting=False)


@pytest.mark.parametrize(
    "changed",
    [
        {"versions": (replace(STATES[0]), STATES[1])},
        {"versions": STATES[1:]},
        {"versions": (*STATES, replace(STATES[0], version="2"))},
        {"replicas": (REPLICA,)},
        {"withdrawn": (("a", "2"),)},
    ],
)
def test_what_happens_to_one_model_wakes_that_one(changed: dict[str, Any]) -> None:
    sleepers = settled({"a": True, "b": True})
    awake = "b" if len(changed.get("versions", STATES)) < len(STATES) else None
    found = sleepers.look(WANTED, replace(SEEN, **changed), (), is_counting=False)
    assert "a" not in found
    assert found == (set() if awake else {"b"}), "places of all after one that has left have changed"


@pytest.mark.parametrize(
    "changed",
    [
        {"plane": "q"},
        {"devices": ("cpu0", "cpu1")},
        {"cores": {"cpu0": 2}},
        {"warm_up_s": 3.0},
        {"spares": 1},
        {"routes": {"a": Route(version="1")}},
    ],
)
def test_what_all_depend_on_wakes_all(changed: dict[str, Any]) -> None:
    sleepers = settled({"a": True, "b": True})
    assert not sleepers.look(WANTED, replace(SEEN, **changed), (), is_counting=False)


def test_deployments_that_are_read_again_wake_only_those_that_changed() -> None:
    sleepers = settled({"a": True, "b": True})
    same = tuple(replace(spec) for spec in WANTED)
    assert sleepers.look(same, SEEN, (), is_counting=False) == {"a", "b"}
    assert sleepers.look((same[0], replace(same[1], number=2)), SEEN, (), is_counting=False) == {"a"}
    assert not sleepers.look(same[1:], SEEN, (), is_counting=False)


@pytest.mark.parametrize(
    "command",
    [
        Serve(version=("a", 1)),
        Short(version=("a", 1), replicas=1, missing_bytes=1),
        SetRoute(model="a", route=Route(version="1")),
        Steer(model="a", version="1", policy=QueuePolicy()),
        SetThreads(model="a", version="1", threads=2),
    ],
)
def test_a_model_is_looked_at_until_there_is_no_command_about_it(command: Command | Steer) -> None:
    sleepers = settled({"a": True, "b": True}, command, StopReplica(name="c.1.1"))
    assert sleepers.look(WANTED, SEEN, (), is_counting=False) == {"b"}


def test_a_model_that_was_busy_is_looked_at_once_more() -> None:
    sleepers = settled({"a": True, "b": True}, busy=("a",))
    assert sleepers.look(WANTED, SEEN, (), is_counting=False) == {"b"}
    assert not sleepers.look(WANTED, SEEN, ("b",), is_counting=False)


def test_what_is_left_is_all_about_the_others() -> None:
    left = without({"a"}, replace(SEEN, replicas=(replace(REPLICA, name="b.1.1", model="b"),)))
    assert (left.versions, list(left.routes), len(left.replicas)) == (STATES[1:], ["b"], 1)
