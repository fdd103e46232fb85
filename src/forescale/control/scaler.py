"""What ``scaling.step`` is told about the gateway and the crew, and how its decisions are shown."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, Protocol

from forescale.control.scaling import Load, Scale, ScalingRules, ScalingState, step
from forescale.engine.serve.crew import Replica, State
from forescale.engine.serve.gateway import Gateway
from forescale.registry.records import DeploymentSpec, Happening

_BY = "forescale"
_UNKNOWN_LOAD_S = 1.0


class Staff(Protocol):
    """Who holds the replicas; ``Crew`` does.

    Attributes:
        warm_up_s: what a process takes to become a spare.
    """

    @property
    def warm_up_s(self) -> float: ...

    @property
    def devices(self) -> tuple[str, ...]: ...

    def replicas(self) -> tuple[Replica, ...]: ...

    def spares(self) -> int:
        """Processes that could take a model at once."""
        ...


class Scaler:
    """Decides how many replicas the deployed models of one server are to have."""

    def __init__(self, gateway: Gateway, crew: Staff, rules: ScalingRules | None = None) -> None:
        self._gateway = gateway
        self._crew = crew
        self._rules = rules or ScalingRules()
        self._state = ScalingState()
        self._load_s: dict[str, float] = {}

    def loaded(self, model: str, load_s: float) -> None:
        """A replica of a model took so long to load it."""
        self._load_s[model] = load_s

    async def decide(self, wanted: Sequence[DeploymentSpec], now_s: float) -> tuple[Happening, ...]:
        """Look at all models; what changes, to be written down."""
        loads = [self._load(spec) for spec in wanted]
        devices = len(self._crew.devices)
        # In a thread, since forecasting many models takes longer than requests should wait for the loop.
        self._state, decisions = await asyncio.to_thread(
            step, self._state, loads, now_s, devices, self._rules
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

    def counts(self) -> Mapping[str, int]:
        """Replicas that each model is to have."""
        return {model: scale.wanted for model, scale in self._state.models.items()}

    def status(self, spec: DeploymentSpec) -> dict[str, Any]:
        """What is wanted for a model, and why, as JSON."""
        scale = self._state.models.get(spec.model)
        return _as_json(scale or Scale(wanted=max(1, spec.min_replicas), active_s=0.0))

    def _load(self, spec: DeploymentSpec) -> Load:
        versions = [self._gateway.find(spec.model, each) for each in self._gateway.versions(spec.model)]
        mine = next((served for served in versions if served.version == str(spec.number)), None)
        return Load(
            spec=spec,
            arrived_rows=sum(served.metrics.arrived_rows for served in versions),
            waiting_rows=sum(served.gauges().waiting_rows for served in versions),
            batch_times=mine.metrics.batch_times() if mine else (),
            max_rows=mine.max_rows if mine else 1,
            ready=sum(
                replica.state is State.SERVING and replica.model == spec.model
                for replica in self._crew.replicas()
            ),
            start_s=self._load_s.get(spec.model, _UNKNOWN_LOAD_S)
            + (0.0 if self._crew.spares() else self._crew.warm_up_s),
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
