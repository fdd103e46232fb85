"""What is decided while models that sleep are passed over, against looking at all of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from fake_replicas import DOUBLING
from forescale.control.pool import Pool
from forescale.control.scale import ScalingRules
from forescale.registry.artifacts import ArtifactStore
from forescale.registry.records import DeploymentSpec
from forescale.registry.registry import Registry
from forescale.registry.rollout import RolloutSpec, Strategy
from simulated_pool import Course, SimulatedPlane, VirtualTime, run_pool

MODELS = tuple(f"m{number}" for number in range(12))
STEPS = 400
RESTORED = 300
"""The step in which forecasts of before are found."""


def registry_of(folder: Path, name: str, clock: VirtualTime) -> Registry:
    registry = Registry(f"sqlite:///{folder}/{name}.db", ArtifactStore(str(folder / "store")), clock)
    (folder / "file").write_bytes(b"weights")
    for model in MODELS * 2:
        registry.add_version(model, folder / "file", format="pt2", signature=DOUBLING, created_by="ada")
    return registry


class Play:
    """What people and demand do; at the end nothing is asked any more, but of one model now and then."""

    def __init__(self, registry: Registry, plane: SimulatedPlane, seed: int) -> None:
        self._registry = registry
        self._plane = plane
        self._rng = np.random.default_rng(seed)

    def __call__(self, step: int, pool: Pool) -> None:
        if step == 0:
            for model in MODELS:
                self._deploy(model, 1)
            pool.look_again()
        if step < STEPS // 2:
            self._change_demand()
            if self._rng.random() < 0.06:
                self._change_deployments()
                pool.look_again()
            self._plane.is_lost = step == STEPS // 3
        else:
            self._plane.demand_per_s = {"m0": 20.0 * (step % 80 < 16)}
        if step == RESTORED:
            knowledge, now_s = pool._scaler._knowledge, self._plane.clock.now_s
            knowledge.forecast = knowledge.forecast.taken_in(dict.fromkeys(MODELS[:4], 3.0), now_s)

    def _change_demand(self) -> None:
        if self._rng.random() < 0.05:
            model = MODELS[self._rng.integers(len(MODELS))]
            self._plane.demand_per_s[model] = float(self._rng.choice([0.0, 0.0, 5.0, 90.0]))

    def _change_deployments(self) -> None:
        model = MODELS[self._rng.integers(1, len(MODELS))]
        deployed = {each.spec.model: each.spec.number for each in self._registry.deployments()}
        if model in {rollout.spec.model for rollout in self._registry.rollouts.running()}:
            return
        match int(self._rng.integers(3)):
            case 0 if model in deployed:
                self._registry.undeploy(model, by="ada")
            case 1 if deployed.get(model) == 1:
                self._registry.rollouts.start(
                    RolloutSpec(
                        model=model,
                        number=2,
                        stable=1,
                        strategy=Strategy.CANARY,
                        shares=(0.5,),
                        stage_s=1.0,
                        proof_s=1.0,
                        min_requests=0,
                    ),
                    by="ada",
                )
            case _:
                self._deploy(model, int(self._rng.integers(1, 3)))

    def _deploy(self, model: str, number: int) -> None:
        spec = DeploymentSpec(
            model=model,
            number=number,
            min_replicas=int(self._rng.integers(8) == 0),
            max_replicas=int(self._rng.integers(1, 4)),
            latency_s=[None, 0.3, 2.0][self._rng.integers(3)],
            priority=int(self._rng.integers(1, 4)),
        )
        self._registry.deploy(spec, by="ada")


def course(folder: Path, seed: int, rules: ScalingRules, room_bytes: int, *, forgets: bool) -> Course:
    clock = VirtualTime()
    registry = registry_of(folder, f"registry-{forgets}", clock)
    plane = SimulatedPlane(clock, seed=seed, room_bytes=room_bytes)
    play = Play(registry, plane, seed)
    found = asyncio.run(run_pool(registry, plane, clock, rules, STEPS, play, forgets=forgets))
    registry.close()
    return found


@pytest.mark.parametrize(
    ("seed", "level", "room_bytes"),
    [(1, 0.75, 4_000_000_000), (2, 0.75, 450_000_000), (3, None, 450_000_000)],
)
def test_passing_over_models_that_sleep_changes_no_decision(
    tmp_path: Path, seed: int, level: float | None, room_bytes: int
) -> None:
    rules = ScalingRules(level=level, idle_s=3.0)
    quick = course(tmp_path, seed, rules, room_bytes, forgets=False)
    whole = course(tmp_path, seed, rules, room_bytes, forgets=True)
    for number, (mine, other) in enumerate(zip(quick.steps, whole.steps, strict=True)):
        assert mine == other, f"step {number}"
    assert np.mean(quick.resting) >= 0.8 * np.mean(quick.sleeping) >= 3
    assert level is None or any("a request is likely to come" in reason for reason in quick.reasons)
