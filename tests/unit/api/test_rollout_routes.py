"""Rollouts over HTTP, with the client that the commands use; nothing is served."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest

from forescale.api.client import Client
from forescale.api.management import management
from forescale.core.clock import SystemClock
from forescale.core.errors import InvalidInput, NoRoom, NotFound, ServerFailed
from forescale.core.signature import Signature, TensorSpec
from forescale.registry.artifacts import ArtifactStore
from forescale.registry.records import Deployment, DeploymentSpec
from forescale.registry.registry import Registry

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(None, 4)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(None,)),),
)


class QuietPool:
    """Serves nothing; whoever waits for a change gets one, and the pool's plans for it are carried out."""

    def __init__(self) -> None:
        self.change = 0
        self.is_ending = False
        self.checks = ("quality",)
        self.plans: list[Any] = []
        self.is_full = False

    def inspect(self, path: Path, format: str, options: Mapping[str, Any], declared: Signature | None):  # noqa: A002
        return SIGNATURE

    async def check_room(self, spec: DeploymentSpec) -> str | None:
        if self.is_full:
            raise NoRoom(f"version {spec.number} does not fit")

    def look_again(self) -> None:
        self.change += 1

    def status(self, deployment: Deployment) -> dict[str, Any]:
        return {"state": "serving", "change": self.change}

    async def wait_for_change(self, timeout_s: float) -> None:
        self.change += 1
        if self.plans:
            await asyncio.to_thread(self.plans.pop(0))


class Wire(httpx.BaseTransport):
    """From a client that waits to an application that does not."""

    def __init__(self, app: Any) -> None:
        self._app = httpx.ASGITransport(app)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def ask() -> httpx.Response:
            content = request.read()
            again = httpx.Request(request.method, request.url, headers=request.headers, content=content)
            answer = await self._app.handle_async_request(again)
            return httpx.Response(answer.status_code, headers=answer.headers, content=await answer.aread())

        return asyncio.run(ask())


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(
        f"sqlite:///{tmp_path}/registry.db", ArtifactStore(str(tmp_path / "store")), SystemClock()
    )
    (tmp_path / "file").write_bytes(b"weights")
    for _ in range(2):
        registry.add_version("digits", tmp_path / "file", format="pt2", signature=SIGNATURE, created_by="ada")
    registry.set_alias("digits", "staging", 2, by="ada")
    registry.deploy(DeploymentSpec(model="digits", number=1), by="ada")
    yield registry
    registry.close()


@pytest.fixture
def pool() -> QuietPool:
    return QuietPool()


@pytest.fixture
def client(registry: Registry, pool: QuietPool, tmp_path: Path) -> Iterator[Client]:
    with Client("http://server", user="ada") as client:
        client._http._transport = Wire(management(registry, pool, tmp_path))
        yield client


def test_a_rollout_is_started_shown_promoted_and_taken_back(client: Client, pool: QuietPool) -> None:
    started = client.roll_out("digits", "staging", "canary", [0.1, 0.5], check="quality", stage_s=5.0)
    assert (started["version"], started["stable_version"], started["state"]) == (2, 1, "running")
    assert (started["stage_name"], started["share"], started["stage_s"]) == ("10%", 0.0, 5.0)
    assert client.rollout("digits")["started_by"] == "ada"
    (deployment,) = client.deployments()
    assert (deployment["version"], deployment["rollout"]["strategy"]) == (1, "canary")

    assert client.promote("digits")["stage_name"] == "50%"
    assert client.promote("digits", fully=True)["stage"] == 2
    changes = pool.change
    assert client.roll_back("digits") == 1
    assert pool.change > changes
    ended = client.rollout("digits")
    assert (ended["state"], ended["reason"]) == ("rolled back", "rolled back by ada")


def test_a_version_that_does_not_fit_is_not_rolled_out(client: Client, pool: QuietPool) -> None:
    pool.is_full = True
    with pytest.raises(InvalidInput, match="version 2 does not fit"):
        client.roll_out("digits", 2, "canary", [0.1])
    assert client.deployments()[0]["rollout"] is None


def test_usual_times(client: Client) -> None:
    assert client.roll_out("digits", 2, "blue-green")["stage_s"] == 0.0
    client.roll_back("digits")
    assert client.roll_out("digits", 2, "shadow", [1.0])["stage_s"] == 60.0


def test_going_back_after_a_deployment(client: Client) -> None:
    client.deploy("digits", 2)
    assert client.roll_back("digits") == 1
    (deployment,) = client.deployments()
    assert (deployment["version"], deployment["previous_version"]) == (1, 2)


def test_who_waits_sees_the_end(client: Client, pool: QuietPool) -> None:
    client.roll_out("digits", 2, "canary", [0.5])
    pool.plans = [lambda: client.promote("digits"), lambda: client.roll_back("digits")]
    waiting = client.wait_for_rollout("digits")
    seen = [f"{found['state']}, {found['stage_name']}" for found in islice(waiting, 3)]
    assert seen == [
        "running, 50%",
        "running, 100%, the old version kept",
        "rolled back, 100%, the old version kept",
    ]
    with pytest.raises(ServerFailed, match="digits@2 is rolled back: rolled back by ada"):
        next(waiting)
    client.roll_out("digits", 2, "canary", [0.5])
    with pytest.raises(ServerFailed, match="still being rolled out after 0 s"):
        list(client.wait_for_rollout("digits", timeout_s=0.0))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"version": 1}, "digits@1 is deployed already"),
        ({"version": 7}, "digits has no version 7"),
        ({"shares": []}, "give a share"),
        ({"shares": [1.5]}, "shares are above 0% and at most 100%"),
        ({"strategy": "purple"}, "strategy"),
        ({"check": "speed"}, "knows no check speed .it knows quality.; start it with --check"),
        ({"stage_s": -1.0}, "is not from 0 s to 30 days"),
        ({"max_slowdown": 0.5}, "is not 1 or more"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_wrong_rollouts(client: Client, more: dict[str, Any], said: str) -> None:
    wanted: dict[str, Any] = {"version": 2, "strategy": "canary", "shares": [0.1], **more}
    with pytest.raises(InvalidInput, match=said):
        client.roll_out("digits", **wanted)
    with pytest.raises(NotFound, match="never rolled out"):
        client.rollout("digits")


def test_what_is_not_there(client: Client, registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no new version of digits is being rolled out"):
        client.promote("digits")
    with pytest.raises(NotFound, match="replaced no other version"):
        client.roll_back("digits")
    registry.add_version("words", tmp_path / "file", format="pt2", signature=SIGNATURE, created_by="ada")
    with pytest.raises(NotFound, match="words is not deployed: there is nothing that words@1 could replace"):
        client.roll_out("words", 1, "blue-green")
