"""Routes below ``/api/v1``: models, versions, aliases, deployments, status and events."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import orjson
from pydantic import Field

from forescale.api.deployment_requests import NewDeployment
from forescale.api.http import Answer, Refused, Request, Route, Router, Strict, route
from forescale.api.openapi import openapi
from forescale.api.rollouts import Pool as RolloutPool
from forescale.api.rollouts import rollout_as_json, rollout_routes
from forescale.api.shapes import (
    AliasChangeShape,
    DeploymentShape,
    DeploymentsShape,
    EventsShape,
    ModelShape,
    ModelsShape,
    UndeployedShape,
    VersionShape,
    alias_as_json,
    event_as_json,
    version_as_json,
)
from forescale.core.errors import InvalidInput
from forescale.core.signature import Signature, signature_from_json
from forescale.engine.serve.app import App
from forescale.registry.records import (
    Deployment,
    DeploymentSpec,
    check_name,
)
from forescale.registry.registry import Registry
from forescale.registry.rollout import Rollout

_ANYBODY = "anonymous"
_LONGEST_WAIT_S = 60.0
_OCTETS = "application/octet-stream"


class Pool(RolloutPool, Protocol):
    """What serves the deployments."""

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

    def status(self, deployment: Deployment) -> dict[str, Any]:
        """How far a deployment is, as JSON: ``state`` is starting, serving or failing."""
        ...


class _NewVersion(Strict):
    format: str
    options: str = "{}"
    metrics: str = "{}"
    signature: str | None = None
    commit: str | None = None
    by: str = _ANYBODY


class _By(Strict):
    by: str = _ANYBODY


class _NewAlias(Strict):
    version: int | str


class _Waiting(Strict):
    """``after``: a status's ``change``; the answer waits for another, at most ``timeout_s``."""

    after: int | None = None
    timeout_s: float = Field(default=30.0, ge=0.0, le=_LONGEST_WAIT_S)


class _From(Strict):
    after: int = Field(default=0, ge=0, lt=1 << 31)  # what the registry's numbers can be
    limit: int = Field(default=1000, ge=1, le=10_000)


def management(registry: Registry, pool: Pool, incoming: Path, more: Iterable[Route] = ()) -> Router:
    """The application for every path below ``/api/v1``, and for ``/openapi.json``.

    Args:
        incoming: folder for uploads until they are whole.
        more: routes of others; the document has them, too.
    """
    routes = (*_Routes(registry, pool, incoming).all(), *rollout_routes(registry, pool), *more)
    return Router((*routes, openapi((*App.operations, *routes))))


class _Routes:
    """Thin: each route reads its request, asks registry or pool, and spells the answer."""

    def __init__(self, registry: Registry, pool: Pool, incoming: Path) -> None:
        self._registry = registry
        self._pool = pool
        self._incoming = incoming

    def all(self) -> tuple[Route, ...]:
        """The routes.

        To add one, declare it here or give it to ``management``: what it takes and gives is read from the
        declaration when a request comes, and by the OpenAPI document.
        """
        model, alias = "/api/v1/models/{model}", "/api/v1/models/{model}/aliases/{alias}"
        deployments, deployment = "/api/v1/deployments", "/api/v1/deployments/{model}"
        return (
            route("GET /api/v1/models", "All models.", self.models, gives=ModelsShape),
            route(f"GET {model}", "A model, its versions and aliases.", self.model, gives=ModelShape),
            route(
                f"POST {model}/versions",
                "Adds a file as the next version.",
                self.add_version,
                takes=bytes,
                query=_NewVersion,
                gives=VersionShape,
                status=201,
                refuses=(415, 507),
            ),
            route(
                f"GET {model}/versions/{{version}}",
                "A version, by number or alias.",
                self.version,
                gives=VersionShape,
            ),
            route(
                f"PUT {alias}",
                "Lets an alias point to a version.",
                self.set_alias,
                takes=_NewAlias,
                query=_By,
                gives=AliasChangeShape,
            ),
            route(
                f"DELETE {alias}",
                "Takes an alias away.",
                self.remove_alias,
                query=_By,
                gives=AliasChangeShape,
            ),
            route(f"GET {deployments}", "All deployments.", self.deployments, gives=DeploymentsShape),
            route(
                f"GET {deployment}",
                "A deployment, now or when it has changed.",
                self.deployment,
                query=_Waiting,
                gives=DeploymentShape,
            ),
            route(
                f"PUT {deployment}",
                "Asks for a version to be served.",
                self.deploy,
                takes=NewDeployment,
                query=_By,
                gives=DeploymentShape,
                refuses=(409,),
            ),
            route(
                f"DELETE {deployment}",
                "Asks for a model not to be served any longer.",
                self.undeploy,
                query=_By,
                gives=UndeployedShape,
            ),
            route("GET /api/v1/events", "What happened.", self.events, query=_From, gives=EventsShape),
        )

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
                "alias_history": [alias_as_json(change) for change in self._registry.alias_history(model)],
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
        return Answer(body=alias_as_json(change))

    async def deployments(self, _request: Request) -> Answer:
        found = await asyncio.to_thread(self._registry.deployments)
        rollouts = await asyncio.to_thread(self._registry.rollouts.latest_of_all)
        shown = [self._with_status(each, rollouts.get(each.spec.model)) for each in found]
        return Answer(body={"deployments": shown})

    async def deployment(self, request: Request) -> Answer:
        model, waiting = request.path["model"], request.asked(_Waiting)
        loop = asyncio.get_running_loop()
        until_s = loop.time() + waiting.timeout_s
        while waiting.after == self._pool.change and loop.time() < until_s and not self._pool.is_ending:
            await self._pool.wait_for_change(until_s - loop.time())
        for deployment in await asyncio.to_thread(self._registry.deployments):
            if deployment.spec.model == model:
                rollout = await asyncio.to_thread(self._registry.rollouts.latest, model)
                return Answer(body=self._with_status(deployment, rollout))
        raise Refused(404, f"{model} is not deployed")

    async def deploy(self, request: Request) -> Answer:
        model, by = request.path["model"], request.asked(_By).by
        wanted = await request.body(NewDeployment)

        def spec_of() -> DeploymentSpec:
            number = self._registry.version(model, wanted.version).number
            return wanted.spec(model, number)

        spec = await asyncio.to_thread(spec_of)
        short = await self._pool.check_room(spec)
        deployment = await asyncio.to_thread(self._registry.deploy, spec, by=by)
        self._pool.look_again()
        shown = self._with_status(deployment)
        return Answer(body={**shown, "short": short} if short else shown)

    async def undeploy(self, request: Request) -> Answer:
        model, by = request.path["model"], request.asked(_By).by
        await asyncio.to_thread(self._registry.undeploy, model, by=by)
        self._pool.look_again()
        return Answer(body={"model": model})

    async def events(self, request: Request) -> Answer:
        asked = request.asked(_From)
        found = await asyncio.to_thread(self._registry.events, asked.after, asked.limit)
        return Answer(body={"events": [event_as_json(event) for event in found]})

    def _with_status(self, deployment: Deployment, rollout: Rollout | None = None) -> dict[str, Any]:
        spec = deployment.spec
        return {
            "model": spec.model,
            "version": spec.number,
            "min_replicas": spec.min_replicas,
            "max_replicas": spec.max_replicas,
            "latency_ms": spec.latency_s and spec.latency_s * 1e3,
            "priority": spec.priority,
            "max_batch": spec.max_batch,
            "max_wait_ms": spec.max_wait_s and spec.max_wait_s * 1e3,
            "timeout_s": spec.timeout_s,
            "queue": spec.queue,
            "max_threads": spec.max_threads,
            "deployed_at_s": deployment.deployed_at_s,
            "deployed_by": deployment.deployed_by,
            "previous_version": deployment.previous,
            "rollout": rollout and rollout_as_json(rollout),
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
