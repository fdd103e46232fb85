"""What ``scaling.step`` is told about the data plane, and how its decisions are shown."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any, NamedTuple

from forescale.control.batching import queue_policy
from forescale.control.knowledge import Knowledge, Measured
from forescale.control.memory import Budget, Memory, Placed
from forescale.control.scale import Load, Scale, ScalingRules, ScalingState
from forescale.control.scaling import step
from forescale.engine.serve import messages
from forescale.engine.serve.formats import FIXED_THREADS
from forescale.engine.serve.orders import PlaneState, SetThreads, Steer, VersionState
from forescale.engine.serve.policy import QueuePolicy
from forescale.engine.serve.roster import State
from forescale.registry.records import DeploymentSpec, Happening

_BY = "forescale"
_UNKNOWN_LOAD_S = 1.0


class _Facts(NamedTuple):
    """What the load of a model is made of."""

    spec: DeploymentSpec
    versions: Sequence[VersionState]
    measured: Measured
    ready: int
    replicas: Mapping[str, int]
    withheld_cores: float
    warm_up_s: float
    has_spares: bool


class Scaler:
    """Decides how many replicas the deployed models of one server are to have.

    Args:
        knowledge: of before; gets what is learned.
    """

    def __init__(self, rules: ScalingRules | None = None, knowledge: Knowledge | None = None) -> None:
        self._rules = rules or ScalingRules()
        self._knowledge = knowledge or Knowledge()
        self._state = ScalingState()
        self._limits: Mapping[str, int | None] = {}
        self._policies: dict[str, tuple[DeploymentSpec, int | None, QueuePolicy]] = {}
        self._loads: dict[str, tuple[_Facts, Load]] = {}

    async def decide(
        self,
        wanted: Sequence[DeploymentSpec],
        seen: PlaneState,
        now_s: float,
        memory: Memory | None = None,
    ) -> tuple[Happening, ...]:
        """Look at all models; what changes, to be written down."""
        self._limits = {spec.model: spec.max_threads for spec in wanted}
        self._knowledge.look(seen.versions)
        self._loads = _loads(wanted, seen, self._knowledge, memory or Memory(), self._loads)
        loads = [load for _, load in self._loads.values()]
        devices = len(seen.devices)
        budget = _budget(wanted, seen, memory) if memory else None
        known = self._knowledge.forecast
        state = replace(self._state, forecast=known)
        # In a thread, since forecasting many models takes longer than requests should wait for the loop.
        self._state, decisions = await asyncio.to_thread(
            step, state, loads, now_s, devices, self._rules, budget=budget, cores=seen.cores
        )
        if self._knowledge.forecast is known:  # otherwise one of before was found meanwhile
            self._knowledge.forecast = self._state.forecast
        return tuple(
            Happening(
                kind="scaled",
                subject=decision.model,
                by=_BY,
                detail={
                    "from": decision.before,
                    "threads_from": decision.threads_before,
                    **_as_json(decision.scale),
                },
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

    def steer(self, wanted: Sequence[DeploymentSpec], seen: PlaneState) -> Iterator[Steer | SetThreads]:
        """What was measured, or deployed again, may call for other batches and threads."""
        deployed = {spec.model: spec for spec in wanted}
        for version in seen.versions:
            spec = deployed.get(version.model)
            if spec is None:
                continue
            # What was measured is of the deployed version; another one may be slower.
            policy = self.policy(spec) if version.version == str(spec.number) else queue_policy(spec)
            if policy != version.policy:
                yield Steer(model=version.model, version=version.version, policy=policy)
            threads = self._threads(version.model, is_resizable=version.is_resizable)
            if version.threads != threads:
                yield SetThreads(model=version.model, version=version.version, threads=threads)

    def told(self, load: messages.Load) -> messages.Load:
        """With as many threads as its replicas are to have."""
        is_resizable = load.format not in FIXED_THREADS
        return replace(load, threads=self._threads(load.model, is_resizable=is_resizable))

    def _threads(self, model: str, *, is_resizable: bool) -> int | None:
        scale = self._state.models.get(model)
        if is_resizable and scale is not None and scale.threads is not None:
            return scale.threads
        return self._limits.get(model)

    def counts(self) -> Mapping[str, int]:
        """Replicas that each model is to have."""
        return {model: scale.wanted for model, scale in self._state.models.items()}

    def status(self, spec: DeploymentSpec) -> dict[str, Any]:
        """What is wanted for a model, and why, as JSON."""
        scale = self._state.models.get(spec.model)
        return _as_json(scale or Scale(wanted=max(1, spec.min_replicas), active_s=0.0))


def _budget(wanted: Sequence[DeploymentSpec], seen: PlaneState, memory: Memory) -> Budget:
    least = {(spec.model, spec.number): spec.min_replicas for spec in wanted}
    kept: list[Placed] = []
    others: list[Placed] = []
    # As ``serving.step`` keeps them.
    for replica in sorted(seen.replicas, key=lambda replica: replica.state is not State.SERVING):
        version = replica.model, int(replica.version)
        is_kept = version in least and replica.state is not State.DRAINING
        (kept if is_kept else others).append((version, replica.device, replica.house))
    return Budget(seen.devices, memory, kept, others, least)


def _loads(
    wanted: Sequence[DeploymentSpec],
    seen: PlaneState,
    knowledge: Knowledge,
    memory: Memory,
    known: Mapping[str, tuple[_Facts, Load]],
) -> dict[str, tuple[_Facts, Load]]:
    """The load of each model, with what it is made of: of thousands most sleep, and theirs stay the same."""
    versions: defaultdict[str, list[VersionState]] = defaultdict(list)
    for version in seen.versions:
        versions[version.model].append(version)
    ready = Counter(replica.model for replica in seen.replicas if replica.state is State.SERVING)
    devices: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for replica in seen.replicas:
        if replica.state is not State.DRAINING:
            devices[replica.model, replica.version][replica.device] += 1
    rooms_bytes = ((cores, memory.room_bytes.get(name)) for name, cores in seen.cores.items())
    cores_per_byte = max((cores / room_bytes for cores, room_bytes in rooms_bytes if room_bytes), default=0.0)
    loads: dict[str, tuple[_Facts, Load]] = {}
    for spec in wanted:
        facts = _Facts(
            spec=spec,
            versions=versions[spec.model],
            measured=knowledge.measured((spec.model, spec.number)),
            ready=ready[spec.model],
            replicas=devices[spec.model, str(spec.number)],
            withheld_cores=cores_per_byte * memory.replica_bytes((spec.model, spec.number)),
            warm_up_s=seen.warm_up_s,
            has_spares=seen.spares > 0,
        )
        before = known.get(spec.model)
        loads[spec.model] = before if before and before[0] == facts else (facts, _load(facts))
    return loads


def _load(facts: _Facts) -> Load:
    spec, measured = facts.spec, facts.measured
    mine = next((version for version in facts.versions if version.version == str(spec.number)), None)
    load_s = _UNKNOWN_LOAD_S if measured.load_s is None else measured.load_s
    return Load(
        spec=spec,
        arrived_rows=sum(version.arrived_rows for version in facts.versions),
        waiting_rows=sum(version.waiting_rows for version in facts.versions),
        batch_times=measured.batch_times if mine else {},
        busy_core_s=mine.busy_core_s if mine else 0.0,
        threads=mine and mine.threads,
        is_resizable=mine is None or mine.is_resizable,
        max_rows=mine.max_rows if mine else 1,
        ready=facts.ready,
        start_s=load_s + (0.0 if facts.has_spares else facts.warm_up_s),
        start_core_s=load_s + facts.warm_up_s,
        replicas=facts.replicas,
        was_ready=measured.load_s is not None,
        withheld_cores=facts.withheld_cores,
    )


def _as_json(scale: Scale) -> dict[str, Any]:
    return {
        "wanted": scale.wanted,
        "short": scale.short,
        "threads": scale.threads,
        "reason": scale.reason,
        "rows_per_s": _finite(scale.rate_per_s),
        "peak_per_s": _finite(scale.peak_per_s),
        "capacity_per_s": scale.capacity_per_s,
        "lead_s": scale.lead_s,
    }


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
