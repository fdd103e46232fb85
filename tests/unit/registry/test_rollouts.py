"""Rollouts are kept whole, changed by one at a time, and promoted together with their deployment."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forescale.core.errors import InvalidInput, NotFound
from forescale.core.signature import Signature, TensorSpec
from forescale.registry.records import DeploymentSpec
from forescale.registry.registry import Registry
from forescale.registry.rollout import Counts, Progress, RolloutSpec, State, Strategy

Open = Callable[[], Registry]


def signature(datatype: str = "FP32") -> Signature:
    return Signature(
        inputs=(TensorSpec(name="x", datatype=datatype, shape=(None, 8)),),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=(None,)),),
    )


@pytest.fixture
def digits(registry: Registry, tmp_path: Path) -> Registry:
    """digits@1 is deployed; 2 is alike, 3 takes something else."""
    path = tmp_path / "model.pt2"
    path.write_bytes(b"weights")
    for datatype in ("FP32", "FP32", "INT64"):
        registry.add_version("digits", path, format="pt2", signature=signature(datatype), created_by="ada")
    registry.deploy(DeploymentSpec(model="digits", number=1), by="ada")
    return registry


def canary(number: int = 2, stable: int = 1, **more) -> RolloutSpec:
    fields: dict[str, Any] = {"strategy": Strategy.CANARY, "shares": (0.1, 0.5), **more}
    return RolloutSpec(model="digits", number=number, stable=stable, **fields)


def deployed(registry: Registry) -> tuple[int, int | None]:
    (deployment,) = registry.deployments()
    return deployment.spec.number, deployment.previous


def kinds(registry: Registry) -> list[str]:
    return [event.happening.kind for event in registry.events()]


def test_a_rollout_is_read_as_it_was_written(digits: Registry, open_registry: Open) -> None:
    started = digits.rollouts.start(canary(check="quality", max_slowdown=2.0), by="ada")
    progress = Progress(
        stage=1,
        entered_s=5.5,
        opened_s=6.25,
        routed=1,
        before={1: Counts(requests=7, errors=1, answers=(2, 4)), 2: Counts()},
        reference=Counts(requests=3),
        is_checked=True,
        is_urged=True,
        reason="because",
    )

    written = digits.rollouts.write(replace(started, progress=progress))

    assert open_registry().rollouts.running() == (written,)
    assert written == replace(started, progress=progress, revision=1)


def test_who_comes_second_overwrites_nothing(digits: Registry) -> None:
    started = digits.rollouts.start(canary(), by="ada")
    digits.rollouts.roll_back("digits", by="bob")

    assert digits.rollouts.write(replace(started, state=State.PROMOTED, ended_s=9.0)) is None
    assert deployed(digits) == (1, None)
    ended = digits.rollouts.latest("digits")
    assert ended is not None
    assert (ended.state, ended.progress.reason) == (State.ROLLED_BACK, "rolled back by bob")
    assert digits.rollouts.running() == ()


def test_a_promoted_version_is_the_deployed_one_and_the_way_back_is_known(digits: Registry) -> None:
    started = digits.rollouts.start(canary(), by="ada")

    digits.rollouts.write(replace(started, state=State.PROMOTED, ended_s=9.0))

    assert deployed(digits) == (2, 1)
    assert digits.rollouts.roll_back("digits", by="bob") == 1
    assert deployed(digits) == (1, 2)
    assert digits.rollouts.roll_back("digits", by="bob") == 2
    assert kinds(digits)[-4:] == ["rollout_started", "rollout_promoted", "rolled_back", "rolled_back"]


def test_deploying_again_keeps_the_way_back(digits: Registry) -> None:
    digits.deploy(DeploymentSpec(model="digits", number=2), by="ada")
    digits.deploy(DeploymentSpec(model="digits", number=2, max_replicas=3), by="ada")

    assert deployed(digits) == (2, 1)
    assert digits.rollouts.roll_back("digits", by="bob") == 1
    (deployment,) = digits.deployments()
    assert deployment.spec.max_replicas == 3


def test_there_is_nothing_to_go_back_to(digits: Registry) -> None:
    with pytest.raises(NotFound, match="digits@1 has replaced no other version"):
        digits.rollouts.roll_back("digits", by="bob")
    with pytest.raises(NotFound, match="words is not deployed"):
        digits.rollouts.roll_back("words", by="bob")


def test_one_rollout_of_a_model_at_a_time(digits: Registry, open_registry: Open) -> None:
    def start(registry: Registry) -> bool:
        try:
            registry.rollouts.start(canary(), by="ada")
        except InvalidInput:
            return False
        return True

    with ThreadPoolExecutor(3) as threads:
        assert sorted(threads.map(start, [digits, open_registry(), open_registry()])) == [False, False, True]


def test_while_a_rollout_runs_no_other_version_is_deployed(digits: Registry) -> None:
    digits.rollouts.start(canary(), by="ada")

    digits.deploy(DeploymentSpec(model="digits", number=1, max_replicas=4), by="ada")
    with pytest.raises(InvalidInput, match="digits@2 is being rolled out: promote it or roll it back first"):
        digits.deploy(DeploymentSpec(model="digits", number=2), by="ada")
    assert deployed(digits) == (1, None)


def test_undeploying_ends_a_rollout(digits: Registry) -> None:
    digits.rollouts.start(canary(), by="ada")

    digits.undeploy("digits", by="bob")

    ended = digits.rollouts.latest("digits")
    assert ended is not None
    assert (ended.state, ended.progress.reason) == (State.ROLLED_BACK, "undeployed by bob")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (canary(3), "digits@3 has other inputs or outputs than digits@1"),
        (canary(4), "digits has no version 4"),
        (canary(1, stable=2), "digits@1 is deployed, not digits@2"),
        (replace(canary(), model="words"), "words is not deployed"),
    ],
)
def test_rollouts_that_cannot_start(digits: Registry, spec: RolloutSpec, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        digits.rollouts.start(spec, by="ada")
    assert digits.rollouts.running() == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"number": 1},
        {"shares": ()},
        {"shares": (0.5, 0.1)},
        {"shares": (0.5, 0.5)},
        {"shares": (1.0,)},
        {"shares": (0.0, 0.5)},
        {"shares": (float("nan"),)},
        {"strategy": Strategy.BLUE_GREEN},
        {"stage_s": -1.0},
        {"stage_s": 4000.0},
        {"proof_s": float("nan")},
        {"patience_s": float("inf")},
        {"min_requests": -1},
        {"max_error_fraction": 1.0},
        {"max_slowdown": 0.9},
        {"max_slowdown": float("inf")},
        {"check": ""},
    ],
)
def test_rollouts_that_make_no_sense(fields: dict) -> None:
    with pytest.raises(InvalidInput):
        replace(canary(), **fields)
