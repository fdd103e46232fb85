"""What the management interface answers, as JSON: the OpenAPI document is made of these.

Objects may have more fields than they are declared with here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, cast

from typing_extensions import TypedDict

from forescale.core.signature import signature_as_json
from forescale.registry.records import AliasChange, Event, ModelVersion

Number = int
"""Of a version, from 1 on."""


class TensorShape(TypedDict):
    name: str
    datatype: str
    shape: list[int]


class VersionShape(TypedDict):
    model: str
    version: Number
    sha256: str
    size_bytes: int
    format: str
    inputs: list[TensorShape]
    outputs: list[TensorShape]
    options: Mapping[str, Any]
    metrics: Mapping[str, float]
    created_at_s: float
    created_by: str
    commit: str | None


class AliasChangeShape(TypedDict):
    model: str
    alias: str
    version: Number | None
    at_s: float
    by: str


class ModelLine(TypedDict):
    name: str
    versions: list[Number]
    aliases: dict[str, Number]
    deployed: Number | None


class ModelsShape(TypedDict):
    models: list[ModelLine]


class ModelShape(TypedDict):
    name: str
    versions: list[VersionShape]
    aliases: dict[str, Number]
    alias_history: list[AliasChangeShape]


class RolloutShape(TypedDict):
    model: str
    version: Number
    stable_version: Number
    strategy: Literal["canary", "shadow", "blue-green"]
    state: Literal["running", "promoted", "rolled back"]
    shares: Sequence[float]
    stage: int
    stage_name: str
    is_open: bool
    share: float
    reason: str
    check: str | None
    is_checked: bool
    is_manual: bool
    stage_s: float
    proof_s: float
    min_requests: int
    patience_s: float
    max_error_fraction: float
    max_slowdown: float
    started_at_s: float
    started_by: str
    ended_at_s: float | None
    change: NotRequired[int]


class RolledBackShape(TypedDict):
    model: str
    version: Number


class DeploymentShape(TypedDict):
    model: str
    version: Number
    min_replicas: int
    max_replicas: int
    latency_ms: float | None
    priority: int
    max_batch: int | None
    max_wait_ms: float | None
    timeout_s: float | None
    queue: int | None
    max_threads: int | None
    deployed_at_s: float
    deployed_by: str
    previous_version: Number | None
    rollout: RolloutShape | None
    state: Literal["starting", "serving", "failing"]
    change: int
    error: NotRequired[str | None]
    short: NotRequired[str | None]
    replica_bytes: NotRequired[int]
    scaling: NotRequired[dict[str, Any]]
    replicas: NotRequired[list[dict[str, Any]]]
    requests: NotRequired[dict[str, int]]
    versions: NotRequired[list[dict[str, Any]]]


class DeploymentsShape(TypedDict):
    deployments: list[DeploymentShape]


class UndeployedShape(TypedDict):
    model: str


class EventShape(TypedDict):
    number: int
    at_s: float
    kind: str
    subject: str
    by: str
    detail: Mapping[str, Any]


class EventsShape(TypedDict):
    events: list[EventShape]


def version_as_json(version: ModelVersion) -> VersionShape:
    tensors = cast(Mapping[str, list[TensorShape]], signature_as_json(version.signature))
    return {
        "model": version.model,
        "version": version.number,
        "sha256": version.artifact.sha256,
        "size_bytes": version.artifact.size_bytes,
        "format": version.format,
        "inputs": tensors["inputs"],
        "outputs": tensors["outputs"],
        "options": version.options,
        "metrics": version.metrics,
        "created_at_s": version.created_at_s,
        "created_by": version.created_by,
        "commit": version.commit,
    }


def alias_as_json(change: AliasChange) -> AliasChangeShape:
    return {
        "model": change.model,
        "alias": change.alias,
        "version": change.number,
        "at_s": change.at_s,
        "by": change.by,
    }


def event_as_json(event: Event) -> EventShape:
    happening = event.happening
    return {
        "number": event.number,
        "at_s": event.at_s,
        "kind": happening.kind,
        "subject": happening.subject,
        "by": happening.by,
        "detail": happening.detail,
    }
