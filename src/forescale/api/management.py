"""Routes below ``/api/v1``: models, versions, aliases, deployments, status and events."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import orjson
from pydantic import BaseModel, ConfigDict, Field

from forescale.api.http import Answer, Refused, Request, Router
from forescale.core.errors import InvalidInput
from forescale.core.signature import Signature, signature_as_json, signature_from_json
from forescale.registry.records import (
    LAST_PRIORITY,
    AliasChange,
    Deployment,
    DeploymentSpec,
    Event,
    ModelVersion,
    check_name,
)
from forescale.registry.registry import Registry

_ANYBODY = "anonymous"
_LONGEST_WAIT_S = 60.0
_OCTETS = "application/octet-stream"


class Pool(Protocol):
    """What serves the deployments.

    Attributes:
        change: another number whenever a status has changed.
        is_ending: nobody should wait for a change any more.
    """

    @property
    def change(self) -> int: ...

    @property
    def is_ending(self) -> bool: ...

    def inspect(
        self,
        path: Path,
        format: str,  # noqa: A002
        options: Mapping[str, Any],
        declared: Signature | None,
    ) -> Signature:
        """What a model takes and gives, as its file or else its maker says; may take a while.

        Raises:
            InvalidInput: it cannot be served.
        """
        ...

    def look_again(self) -> None:
        """The deployments have changed."""
        ...

    def status(self, deployment: Deployment) -> dict[str, Any]:
        """How far a deployment is, as JSON: ``state`` is starting, serving or failing."""
        ...

    async def wait_for_change(self, timeout_s: float) -> None:
        """Until ``change`` is another, at most so long."""
        ...


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _NewVersion(_Strict):
    format: str
    options: str = "{}"
    metrics: str = "{}"
    signature: str | None = None
    commit: str | None = None
    by: str = _ANYBODY


class _By(_Strict):
    by: str = _ANYBODY


class _NewAlias(_Strict):
    version: int | str


class _NewDeployment(_Strict):
    version: int | str
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int | None = Field(default=None, ge=1)
    latency_ms: float | None = Field(default=None, gt=0.0)
    priority: int = Field(default=10, ge=1, le=LAST_PRIORITY)


class _Waiting(_Strict):
    """``after``: a status's ``change``; the answer waits for another, at most ``timeout_s``."""

    after: int | None = None
    timeout_s: float = Field(default=30.0, ge=0.0, le=_LONGEST_WAIT_S)


class _From(_Strict):
    after: int = Field(default=0, ge=0)
    limit: int = Field(default=1000, ge=1, le=10_000)


def management(registry: Registry, pool: Pool, incoming: Path) -> Router:
    """The application for every path below ``/api/v1``.

    Args:
        incoming: folder for uploads until they are whole.
    """
    routes = _Routes(registry, pool, incoming)
    return Router(
        (
            ("GET", "/api/v1/models", routes.models),
            ("GET", "/api/v1/models/{model}", routes.model),
            ("POST", "/api/v1/models/{model}/versions", routes.add_version),
            ("GET", "/api/v1/models/{model}/versions/{version}", routes.version),
            ("PUT", "/api/v1/models/{model}/aliases/{alias}", routes.set_alias),
            ("DELETE", "/api/v1/models/{model}/aliases/{alias}", routes.remove_alias),
            ("GET", "/api/v1/deployments", routes.deployments),
            ("GET", "/api/v1/deployments/{model}", routes.deployment),
            ("PUT", "/api/v1/deployments/{model}", routes.deploy),
            ("DELETE", "/api/v1/deployments/{model}", routes.undeploy),
            ("GET", "/api/v1/events", routes.events),
        )
    )


class _Routes:
    """Thin: each route reads its request, asks registry or pool, and spells the answer."""

    def __init__(self, registry: Registry, pool: Pool, incoming: Path) -> None:
        self._registry = registry
        self._pool = pool
        self._incoming = incoming

    async def models(self, _request: Request) -> Answer:
        def look() -> list[dict[str, Any]]:
            deployed = {found.spec.model: found.spec.number for found in self._registry.deployments()}
            return [
                {
                    "name": model,
                    "versions": [version.number for version in self._registry.versions(model)],
                    "aliases": self._registry.aliases(model),
                    "deployed": deployed.get(model),
                }
                for model in self._registry.models()
            ]

        return Answer(body={"models": await asyncio.to_thread(look)})

    async def model(self, request: Request) -> Answer:
        model = request.path["model"]

        def look() -> dict[str, Any]:
            return {
                "name": model,
                "versions": [version_as_json(version) for version in self._registry.versions(model)],
                "aliases": self._registry.aliases(model),
                "alias_history": [_alias_as_json(change) for change in self._registry.alias_history(model)],
            }

        return Answer(body=await asyncio.to_thread(look))

    async def version(self, request: Request) -> Answer:
        model, reference = request.path["model"], request.path["version"]
        version = await asyncio.to_thread(self._registry.version, model, reference)
        return Answer(body=version_as_json(version))

    async def add_version(self, request: Request) -> Answer:
        # A web page of another origin can make a browser send text and forms, but not this.
        if request.headers.get("content-type") != _OCTETS:
            raise Refused(415, f"send the model's file as {_OCTETS}")
        model, asked = request.path["model"], request.asked(_NewVersion)
        check_name(model, "a model")  # it names the upload, too
        options = _object(asked.options, "options")
        metrics = _figures(_object(asked.metrics, "metrics"))
        declared = (
            None if asked.signature is None else signature_from_json(_object(asked.signature, "signature"))
        )
        with tempfile.TemporaryDirectory(dir=self._incoming) as folder:
            path = Path(folder, model)
            await _receive(request, path)
            signature = await asyncio.to_thread(self._pool.inspect, path, asked.format, options, declared)
            version = await asyncio.to_thread(
                self._registry.add_version,
                model,
                path,
                format=asked.format,
                signature=signature,
                options=options,
                metrics=metrics,
                commit=asked.commit,
                created_by=asked.by,
            )
        return Answer(status=201, body=version_as_json(version))

    async def set_alias(self, request: Request) -> Answer:
        wanted = await request.body(_NewAlias)
        return await self._alias(request, wanted.version)

    async def remove_alias(self, request: Request) -> Answer:
        return await self._alias(request, None)

    async def _alias(self, request: Request, reference: int | str | None) -> Answer:
        model, alias = request.path["model"], request.path["alias"]
        by = request.asked(_By).by
        change = await asyncio.to_thread(self._registry.set_alias, model, alias, reference, by=by)
        return Answer(body=_alias_as_json(change))

    async def deployments(self, _request: Request) -> Answer:
        found = await asyncio.to_thread(self._registry.deployments)
        return Answer(body={"deployments": [self._with_status(deployment) for deployment in found]})

    async def deployment(self, request: Request) -> Answer:
        model, waiting = request.path["model"], request.asked(_Waiting)
        loop = asyncio.get_running_loop()
        until_s = loop.time() + waiting.timeout_s
        while waiting.after == self._pool.change and loop.time() < until_s and not self._pool.is_ending:
            await self._pool.wait_for_change(until_s - loop.time())
        for deployment in await asyncio.to_thread(self._registry.deployments):
            if deployment.spec.model == model:
                return Answer(body=self._with_status(deployment))
        raise Refused(404, f"{model} is not deployed")

    async def deploy(self, request: Request) -> Answer:
        model, by = request.path["model"], request.asked(_By).by
        wanted = await request.body(_NewDeployment)

        def deploy() -> Deployment:
            number = self._registry.version(model, wanted.version).number
            spec = DeploymentSpec(
                model=model,
                number=number,
                min_replicas=wanted.min_replicas,
                max_replicas=wanted.max_replicas or max(wanted.min_replicas, 1),
                latency_s=None if wanted.latency_ms is None else wanted.latency_ms / 1e3,
                priority=wanted.priority,
            )
            return self._registry.deploy(spec, by=by)

        deployment = await asyncio.to_thread(deploy)
        self._pool.look_again()
        return Answer(body=self._with_status(deployment))

    async def undeploy(self, request: Request) -> Answer:
        model, by = request.path["model"], request.asked(_By).by
        await asyncio.to_thread(self._registry.undeploy, model, by=by)
        self._pool.look_again()
        return Answer(body={"model": model})

    async def events(self, request: Request) -> Answer:
        asked = request.asked(_From)
        found = await asyncio.to_thread(self._registry.events, asked.after, asked.limit)
        return Answer(body={"events": [_event_as_json(event) for event in found]})

    def _with_status(self, deployment: Deployment) -> dict[str, Any]:
        spec = deployment.spec
        return {
            "model": spec.model,
            "version": spec.number,
            "min_replicas": spec.min_replicas,
            "max_replicas": spec.max_replicas,
            "latency_ms": spec.latency_s and spec.latency_s * 1e3,
            "priority": spec.priority,
            "deployed_at_s": deployment.deployed_at_s,
            "deployed_by": deployment.deployed_by,
            **self._pool.status(deployment),
        }


async def _receive(request: Request, path: Path) -> None:
    """Write the body to a file."""
    try:
        with path.open("wb") as file:
            async for chunk in request.chunks():
                file.write(chunk)
    except OSError as error:
        raise Refused(507, f"the model cannot be stored: {error.strerror}") from error


def version_as_json(version: ModelVersion) -> dict[str, Any]:
    return {
        "model": version.model,
        "version": version.number,
        "sha256": version.artifact.sha256,
        "size_bytes": version.artifact.size_bytes,
        "format": version.format,
        **signature_as_json(version.signature),
        "options": version.options,
        "metrics": version.metrics,
        "created_at_s": version.created_at_s,
        "created_by": version.created_by,
        "commit": version.commit,
    }


def _alias_as_json(change: AliasChange) -> dict[str, Any]:
    fields = asdict(change)
    return {**fields, "version": fields.pop("number")}


def _event_as_json(event: Event) -> dict[str, Any]:
    return {"number": event.number, "at_s": event.at_s, **asdict(event.happening)}


def _object(text: str, what: str) -> dict[str, Any]:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"{what}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidInput(f"{what}: give a JSON object")
    return found


def _figures(metrics: dict[str, Any]) -> dict[str, float]:
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidInput(f"metric {name[:80]} is not a number")
    return metrics
