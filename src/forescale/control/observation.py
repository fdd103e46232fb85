"""What ``serving.step`` is told about the data plane, and what is shown of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from forescale.control.memory import Memory, Version
from forescale.control.serving import Observation, Phase, Replica
from forescale.engine.serve.orders import PlaneState
from forescale.engine.serve.roster import Replica as PlaneReplica
from forescale.engine.serve.roster import State

_PHASES = {
    State.WAITING: Phase.STARTING,
    State.LOADING: Phase.STARTING,
    State.SERVING: Phase.READY,
    State.DRAINING: Phase.LEAVING,
}


def observe(seen: PlaneState, unusable: Iterable[Version], memory: Memory) -> Observation:
    """The data plane's state in the controller's terms."""
    return Observation(
        devices=seen.devices,
        replicas=tuple(
            Replica(
                name=replica.name,
                version=(replica.model, int(replica.version)),
                device=replica.device,
                phase=_PHASES[replica.state],
                house=replica.house,
            )
            for replica in seen.replicas
        ),
        served=frozenset((version.model, int(version.version)) for version in seen.versions),
        withdrawn=frozenset((model, int(number)) for model, number in seen.withdrawn),
        unusable=frozenset(unusable),
        routes=seen.routes,
        memory=memory,
    )


def replica_as_json(replica: PlaneReplica) -> dict[str, Any]:
    """A replica as it is shown."""
    return {
        "name": replica.name,
        "version": int(replica.version),
        "device": replica.device,
        "state": replica.state.value,
        "process": replica.process,
        "threads": replica.threads,
        "attempts": replica.attempts,
        "cause": replica.cause,
    }
