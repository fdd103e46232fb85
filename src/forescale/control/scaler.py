"""What ``scaling.step`` is told about the data plane, and how its decisions are shown."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from math import isfinite
from typing import Any

from forescale.control.batching import queue_policy
from forescale.control.knowledge import Knowledge
from forescale.control.memory import Budget, Memory, Placed
from forescale.control.scale import Load, Scale, ScalingRules, ScalingState
from forescale.control.scaling import is_counting, step
from forescale.engine.serve import messages
from forescale.engine.serve.formats import FIXED_THREADS
from forescale.engine.serve.orders import PlaneState, SetThreads, Steer, VersionState
from forescale.engine.serve.policy import QueuePolicy
from forescale.engine.serve.roster import State
from forescale.registry.records import DeploymentSpec, Happening

_BY = "forescale"
_UNKNOWN_LOAD_S = 1.0


class Scaler:
    """Decides how many replicas the deployed models of one server are to have.

    Args:
        knowledge: of before; gets what is learned.

    Attributes:
        resting: models that were to have no replicas, and are not, by the last decision. While nothing about
            them changes, that holds until demand is counted again; where the value is true, beyond that.
    """

    def __init__(self, rules: ScalingRules | None = None, knowledge: Knowledge | None = None) -> None:
        self._rules = rules or ScalingRules()
        self._knowledge = knowledge or Knowledge()
        self._state = ScalingState()
        self._limits: Mapping[str, int | None] = {}
        self._policies: dict[str, tuple[DeploymentSpec, int | None, QueuePolicy]] = {}
        self.resting: Mapping[str, bool] = {}

    @property
    def is_renewed(self) -> bool:
        """Whether forecasts of before were found since the last decision."""
        return self._knowledge.forecast is not self._state.forecast

    def is_counting(self, now_s: float) -> bool:
        """Whether the demand of all models would be counted by a decision now."""
        return is_counting(self._state, now_s)

    async def decide(
        self,
        wanted: Sequence[DeploymentSpec],
        seen: PlaneState,
        now_s: float,
        memory: Memory | None = None,
        asleep: Set[str] = frozenset(),
    ) -> tuple[Happening, ...]:
        """Look at models; what changes, to be written down.

        Args:
            wanted: all that are deployed, but those that are asleep.
            asleep: models that stay as they are.
        """
        self._limits = {spec.model: spec.max_threads for spec in wanted}
        self._knowledge.look(seen.versions)
        loads = _loads(wanted, seen, self._knowledge, memory or Memory())
        devices = len(seen.devices)
        budget = _budget(wanted, seen, memory) if memory else None
        known = self._knowledge.forecast
        state = replace(self._state, forecast=known)
        # In a thread, since forecasting many models takes longer than requests should wait for the loop.
        after, decisions = await asyncio.to_thread(
            step, state, loads, now_s, devices, self._rules, budget=budget, cores=seen.cores
        )
        self.resting = _resting(state, after, is_counted=is_counting(state, now_s))
        self._state = replace(
            after, models={model: state.models[model] for model in asleep} | {**after.models}
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


def _resting(before: ScalingState, after: ScalingState, *, is_counted: bool) -> dict[str, bool]:
    """As ``Scaler.resting``."""
    return {
        model: is_counted and scale == known and model not in after.forecast
        for model, scale in after.models.items()
        if scale.wanted == scale.short == 0 and (known := before.models.get(model)) and known.wanted == 0
    }


def _loads(
    wanted: Sequence[DeploymentSpec], seen: PlaneState, knowledge: Knowledge, memory: Memory
) -> list[Load]:
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
    loads: list[Load] = []
    for spec in wanted:
        model, number = spec.model, str(spec.number)
        measured = knowledge.measured((model, spec.number))
        mine = next((version for version in versions[model] if version.version == number), None)
        load_s = _UNKNOWN_LOAD_S if measured.load_s is None else measured.load_s
        loads.append(
            Load(
                spec=spec,
                arrived_rows=sum(version.arrived_rows for version in versions[model]),
                waiting_rows=sum(version.waiting_rows for version in versions[model]),
                batch_times=measured.batch_times if mine else {},
                busy_core_s=mine.busy_core_s if mine else 0.0,
                threads=mine and mine.threads,
                is_resizable=mine is None or mine.is_resizable,
                max_rows=mine.max_rows if mine else 1,
                ready=ready[model],
                start_s=load_s + (0.0 if seen.spares else seen.warm_up_s),
                start_core_s=load_s + seen.warm_up_s,
                replicas=devices[model, number],
                was_ready=measured.load_s is not None,
                withheld_cores=cores_per_byte * memory.replica_bytes((model, spec.number)),
            )
        )
    return loads


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
