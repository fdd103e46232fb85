"""What ``houses.step`` is told about the data plane."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence, Set

from forescale.control.houses import Home, Housing, Resident, Tenant, step
from forescale.control.knowledge import Knowledge
from forescale.control.memory import Memory, Room, Version
from forescale.engine.serve.orders import PlaneState
from forescale.engine.serve.roster import State
from forescale.registry.records import DeploymentSpec


class Homes:
    """Decides which of the deployed versions of one server share processes.

    Args:
        latency_s: promised by models that were deployed without one.
        knowledge: what was measured of versions.
    """

    def __init__(self, latency_s: float, knowledge: Knowledge) -> None:
        self._latency_s = latency_s
        self._knowledge = knowledge
        self._housing = Housing()
        self._tenants: Mapping[Version, Tenant] = {}

    @property
    def small(self) -> frozenset[Version]:
        """Versions that can go into a process that others are in."""
        return self._housing.small

    def decide(
        self,
        wanted: Sequence[DeploymentSpec],
        seen: PlaneState,
        counts: Mapping[str, int],
        memory: Memory,
        *,
        rollouts: Container[str],
        now_s: float,
        asleep: Set[str] = frozenset(),
    ) -> Mapping[Version, Home]:
        """Homes of the versions that are to share.

        Args:
            wanted: all that are deployed, but those that are asleep.
            counts: replicas that each model is to have now.
            rollouts: models of which a new version is being tried.
            asleep: models that stay as they are.
        """
        room = Room(seen.devices, memory)
        for replica in seen.replicas:
            room.put((replica.model, int(replica.version)), replica.device, replica.house)
        slept = {version: tenant for version, tenant in self._tenants.items() if version[0] in asleep}
        self._tenants = slept | dict(self._awake(wanted, seen, counts, rollouts))
        residents = [
            Resident(
                version=(replica.model, int(replica.version)),
                device=replica.device,
                house=replica.house,
                is_ready=replica.state is State.SERVING,
            )
            for replica in seen.replicas
            if replica.state is not State.DRAINING
        ]
        self._housing = step(self._housing, self._tenants, residents, room, now_s=now_s)
        return self._housing.homes

    def _awake(
        self,
        wanted: Sequence[DeploymentSpec],
        seen: PlaneState,
        counts: Mapping[str, int],
        rollouts: Container[str],
    ) -> Iterator[tuple[Version, Tenant]]:
        served = Counter(state.model for state in seen.versions)
        states = {(state.model, state.version): state for state in seen.versions}
        for spec in wanted:
            state = states.get((spec.model, str(spec.number)))
            replicas = counts.get(spec.model, spec.min_replicas)
            if state is None or not state.may_share or replicas > 1:
                continue
            measured = self._knowledge.measured((spec.model, spec.number))
            batches = [batch for times in measured.batch_times.values() for batch in times]
            if measured.load_s is None or not batches:
                continue  # it has answered nothing
            yield (
                (spec.model, spec.number),
                Tenant(
                    is_awake=replicas > 0,
                    may_move=served[spec.model] == 1 and spec.model not in rollouts,
                    latency_s=spec.latency_s or self._latency_s,
                    load_s=measured.load_s,
                    batch_s=max(seconds for _, seconds in batches),
                    row_s=max(seconds / rows for rows, seconds in batches),
                    arrived_rows=state.arrived_rows,
                ),
            )
