"""What ``scaling.step`` is told about the data plane, and how its decisions are shown."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

from forescale.control.batching import queue_policy
from forescale.control.memory import Budget, Memory, Version
from forescale.control.scaling import Load, Scale, ScalingRules, ScalingState, step
from forescale.engine.serve.orders import PlaneState, Steer, VersionState
from forescale.engine.serve.policy import QueuePolicy
from forescale.engine.serve.roster import State
from forescale.registry.records import DeploymentSpec, Happening

_BY = "forescale"
_UNKNOWN_LOAD_S = 1.0


class Scaler:
    """Decides how many replicas the deployed models of one server are to have."""

    def __init__(self, rules: ScalingRules | None = None) -> None:
        self._rules = rules or ScalingRules()
        self._state = ScalingState()
        self._policies: dict[str, tuple[DeploymentSpec, int | None, QueuePolicy]] = {}

    async def decide(
        self,
        wanted: Sequence[DeploymentSpec],
        seen: PlaneState,
        now_s: float,
        memory: Memory | None = None,
    ) -> tuple[Happening, ...]:
        """Look at all models; what changes, to be written down."""
        loads = _loads(wanted, seen)
        devices = len(seen.devices)
        budget = _budget(wanted, seen, memory) if memory else None
        # In a thread, since forecasting many models takes longer than requests should wait for the loop.
        self._state, decisions = await asyncio.to_thread(
            step, self._state, loads, now_s, devices, self._rules, budget
        )
        return tuple(
            Happening(
                kind="scaled",
                subject=decision.model,
                by=_BY,
                detail={"from": decision.before, **_as_json(decision.scale)},
            )
            for decision in decisions
        )

    def policy(self, spec: DeploymentSpec) -> QueuePolicy:
        """How the requests to a deployed version are to be queued now."""
        scale = self._state.models.get(spec.model)
        batch_rows = scale and scale.batch_rows
        known = self._policies.get(spec.model)
        if known is None or known[:2] != (spec, batch_rows):
            known = self._policies[spec.model] = (spec, batch_rows, queue_policy(spec, batch_rows))
        return known[2]

    def steer(self, wanted: Sequence[DeploymentSpec], seen: PlaneState) -> Iterator[Steer]:
        """What was measured, or deployed again, may call for other batches."""
        deployed = {spec.model: spec for spec in wanted}
        for version in seen.versions:
            spec = deployed.get(version.model)
            if spec is None:
                continue
            # What was measured is of the deployed version; another one may be slower.
            policy = self.policy(spec) if version.version == str(spec.number) else queue_policy(spec)
            if policy != version.policy:
                yield Steer(model=version.model, version=version.version, policy=policy)

    def counts(self) -> Mapping[str, int]:
        """Replicas that each model is to have."""
        return {model: scale.wanted for model, scale in self._state.models.items()}

    def status(self, spec: DeploymentSpec) -> dict[str, Any]:
        """What is wanted for a model, and why, as JSON."""
        scale = self._state.models.get(spec.model)
        return _as_json(scale or Scale(wanted=max(1, spec.min_replicas), active_s=0.0))


def _budget(wanted: Sequence[DeploymentSpec], seen: PlaneState, memory: Memory) -> Budget:
    least = {(spec.model, spec.number): spec.min_replicas for spec in wanted}
    kept: list[tuple[Version, str]] = []
    others: list[tuple[Version, str]] = []
    # As ``serving.step`` keeps them.
    for replica in sorted(seen.replicas, key=lambda replica: replica.state is not State.SERVING):
        version = replica.model, int(replica.version)
        is_kept = version in least and replica.state is not State.DRAINING
        (kept if is_kept else others).append((version, replica.device))
    return Budget(seen.devices, memory, kept, others, least)


def _loads(wanted: Sequence[DeploymentSpec], seen: PlaneState) -> list[Load]:
    versions: defaultdict[str, list[VersionState]] = defaultdict(list)
    for version in seen.versions:
        versions[version.model].append(version)
    ready = Counter(replica.model for replica in seen.replicas if replica.state is State.SERVING)
    warm_up_s = 0.0 if seen.spares else seen.warm_up_s
    return [_load(spec, versions[spec.model], ready[spec.model], warm_up_s) for spec in wanted]


def _load(spec: DeploymentSpec, versions: Sequence[VersionState], ready: int, warm_up_s: float) -> Load:
    mine = next((version for version in versions if version.version == str(spec.number)), None)
    load_s = _UNKNOWN_LOAD_S if mine is None or mine.load_s is None else mine.load_s
    return Load(
        spec=spec,
        arrived_rows=sum(version.arrived_rows for version in versions),
        waiting_rows=sum(version.waiting_rows for version in versions),
        batch_times=mine.batch_times if mine else (),
        max_rows=mine.max_rows if mine else 1,
        ready=ready,
        start_s=load_s + warm_up_s,
    )


def _as_json(scale: Scale) -> dict[str, Any]:
    return {
        "wanted": scale.wanted,
        "short": scale.short,
        "reason": scale.reason,
        "rows_per_s": _finite(scale.rate_per_s),
        "peak_per_s": _finite(scale.peak_per_s),
        "capacity_per_s": scale.capacity_per_s,
        "lead_s": scale.lead_s,
    }


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
