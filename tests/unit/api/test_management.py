"""The management interface over HTTP, without replicas: what is asked, answered and refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from forescale.api.http import Answer, Request, Router, route
from forescale.api.management import management
from forescale.core.clock import SystemClock
from forescale.core.errors import InvalidInput, NoRoom
from forescale.core.signature import Signature, TensorSpec
from forescale.registry.artifacts import ArtifactStore
from forescale.registry.records import Deployment, DeploymentSpec
from forescale.registry.registry import Registry

SIGNATURE = Signature(
    inputs=(TensorSpec(name="image", datatype="FP32", shape=(None, 64)),),
    outputs=(TensorSpec(name="scores", datatype="FP32", shape=(None, 10)),),
)
OCTETS = {"content-type": "application/octet-stream"}
Ask = Callable[..., httpx.Response]


class QuietPool:
    """Takes every file that is not "broken"; a deployment serves after so many changes."""

    def __init__(self) -> None:
        self.change = 0
        self.is_ending = False
        self.looked = 0
        self.checks = ("quality",)

    def inspect(
        self,
        path: Path,
        format: str,  # noqa: A002
        options: Mapping[str, Any],
        declared: Signature | None,
    ) -> Signature:
        if path.read_bytes() == b"broken":
            raise InvalidInput(f"{path.name} is broken")
        return declared or SIGNATURE

    async def check_room(self, spec: DeploymentSpec) -> str | None:
        if spec.min_replicas > 100:
            raise NoRoom("it is too large")
        return "2 must wait" if spec.min_replicas > 10 else None

    def look_again(self) -> None:
        self.looked += 1

    def status(self, deployment: Deployment) -> dict[str, Any]:
        return {"state": "serving" if self.change else "starting", "change": self.change}

    async def wait_for_change(self, timeout_s: float) -> None:
        self.change += 1


@pytest.fixture
def pool() -> QuietPool:
    return QuietPool()


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    folder = tmp_path / "incoming"
    folder.mkdir()
    return folder


@pytest.fixture
def ask(tmp_path: Path, incoming: Path, pool: QuietPool) -> Iterator[Ask]:
    registry = Registry(
        f"sqlite:///{tmp_path}/registry.db", ArtifactStore(str(tmp_path / "store")), SystemClock()
    )
    app = management(registry, pool, incoming)
    yield lambda method, path, **more: asyncio.run(_ask(app, method, path, **more))
    registry.close()


async def _ask(app: Router, method: str, path: str, **more: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app)  # pyright: ignore[reportArgumentType]
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.request(method, f"/api/v1{path}", **more)


def add(ask: Ask, model: str = "digits", content: bytes = b"weights", **query: Any) -> httpx.Response:
    query = {"format": "pt2", "by": "ada", **query}
    return ask("POST", f"/models/{model}/versions", params=query, content=content, headers=OCTETS)


def refusal(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    return answer.json()["error"]


def test_a_file_becomes_a_version(ask: Ask, incoming: Path) -> None:
    answer = add(ask, metrics='{"accuracy": 0.97}', options='{"threads": 2}', commit="4f2a9c1")
    assert answer.status_code == 201
    version = answer.json()
    assert version["version"] == 1
    assert version["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 64]}]
    assert (version["metrics"], version["options"]) == ({"accuracy": 0.97}, {"threads": 2})
    assert (version["created_by"], version["commit"]) == ("ada", "4f2a9c1")
    assert ask("GET", "/models/digits/versions/1").json() == version
    assert ask("GET", "/models/digits").json()["versions"] == [version]
    assert list(incoming.iterdir()) == []


def test_a_signature_may_be_given(ask: Ask) -> None:
    inputs = [{"name": "ids", "datatype": "INT64", "shape": [-1, -1]}]
    outputs = [{"name": "logits", "datatype": "FP32", "shape": [-1, 2]}]
    version = add(ask, signature=json.dumps({"inputs": inputs, "outputs": outputs})).json()
    assert (version["inputs"], version["outputs"]) == (inputs, outputs)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"metrics": "[1]"}, "metrics: give a JSON object"),
        ({"metrics": "{"}, "metrics: not JSON"),
        ({"metrics": '{"accuracy": "good"}'}, "metric accuracy is not a number"),
        ({"metrics": '{"accuracy": true}'}, "metric accuracy is not a number"),
        ({"options": "7"}, "options: give a JSON object"),
        ({"colour": "red"}, "colour: Extra inputs"),
        ({"signature": '{"inputs": []}'}, "lists of 'inputs' and 'outputs'"),
        ({"signature": '{"inputs": [], "outputs": []}'}, "a model needs an input"),
        ({"format": "a/b"}, "cannot name a format"),
        ({"by": ""}, "the maker's name"),
    ],
)
def test_wrong_versions(ask: Ask, incoming: Path, query: dict[str, Any], said: str) -> None:
    assert said in refusal(add(ask, **query), 400)
    assert ask("GET", "/models").json() == {"models": []}
    assert list(incoming.iterdir()) == []


def test_wrong_files(ask: Ask, incoming: Path) -> None:
    assert refusal(add(ask, content=b"broken"), 400) == "digits is broken"
    assert "is empty" in refusal(add(ask, content=b""), 400)
    assert list(incoming.iterdir()) == []


def test_names_cannot_lead_elsewhere(ask: Ask) -> None:
    assert "cannot name a model" in refusal(add(ask, "..%2Fdigits"), 400)
    assert "cannot name a model" in refusal(add(ask, "%2e%2e"), 400)
    assert "there is nothing at" in refusal(add(ask, "a/b"), 404)


def test_a_browser_is_not_made_to_add_models_by_another_page(ask: Ask) -> None:
    answer = ask("POST", "/models/digits/versions", params={"format": "pt2"}, content=b"weights")
    assert "octet-stream" in refusal(answer, 415)


def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path, incoming: Path, pool: QuietPool) -> None:
    registry = Registry(
        f"sqlite:///{tmp_path}/registry.db", ArtifactStore(str(tmp_path / "store")), SystemClock()
    )
    sent: list[Any] = []
    messages = iter(
        [{"type": "http.request", "body": b"wei", "more_body": True}, {"type": "http.disconnect"}]
    )

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    path = "/api/v1/models/digits/versions"
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"format=pt2",
        "headers": [(b"content-type", b"application/octet-stream")],
    }
    asyncio.run(management(registry, pool, incoming)(scope, receive, send))
    assert (sent, registry.models(), list(incoming.iterdir())) == ([], (), [])
    registry.close()


def test_aliases(ask: Ask) -> None:
    add(ask)
    add(ask)
    ask("PUT", "/models/digits/aliases/production", params={"by": "ada"}, json={"version": 1})
    assert ask("GET", "/models/digits/versions/production").json()["version"] == 1
    ask("PUT", "/models/digits/aliases/production", json={"version": "2"})
    model = ask("GET", "/models/digits").json()
    assert model["aliases"] == {"production": 2}
    changes = [(change["version"], change["by"]) for change in model["alias_history"]]
    assert changes == [(1, "ada"), (2, "anonymous")]
    assert ask("DELETE", "/models/digits/aliases/production").json()["version"] is None
    assert "no version production" in refusal(ask("DELETE", "/models/digits/aliases/production"), 404)


def test_a_deployment_and_its_end(ask: Ask, pool: QuietPool) -> None:
    add(ask)
    wanted = {"version": "1", "min_replicas": 2}
    deployed = ask("PUT", "/deployments/digits", params={"by": "ada"}, json=wanted).json()
    assert (deployed["version"], deployed["min_replicas"], deployed["max_replicas"]) == (1, 2, 2)
    assert (deployed["state"], deployed["deployed_by"]) == ("starting", "ada")
    assert ask("GET", "/deployments").json()["deployments"] == [deployed]
    assert ask("GET", "/models").json()["models"][0]["deployed"] == 1
    assert ask("DELETE", "/deployments/digits").status_code == 200
    assert pool.looked == 2
    assert refusal(ask("GET", "/deployments/digits"), 404) == "digits is not deployed"
    kinds = [event["kind"] for event in ask("GET", "/events").json()["events"]]
    assert kinds == ["version_added", "deployed", "undeployed"]
    assert len(ask("GET", "/events", params={"after": 1}).json()["events"]) == 2


def test_what_the_pool_has_no_room_for_is_refused_or_says_so(ask: Ask) -> None:
    add(ask)
    wanted = {"version": 1, "min_replicas": 101}
    assert refusal(ask("PUT", "/deployments/digits", json=wanted), 409) == "it is too large"
    assert ask("GET", "/deployments").json()["deployments"] == []
    answer = ask("PUT", "/deployments/digits", json={"version": 1, "min_replicas": 11})
    assert (answer.status_code, answer.json()["short"]) == (200, "2 must wait")


def test_how_requests_are_queued_is_part_of_a_deployment(ask: Ask) -> None:
    add(ask)
    batching = {"max_batch": 8, "max_wait_ms": 2.5, "timeout_s": 3.0, "queue": 100, "max_threads": 2}
    deployed = ask("PUT", "/deployments/digits", json={"version": 1, **batching}).json()
    assert {name: deployed[name] for name in batching} == batching
    deployed = ask("PUT", "/deployments/digits", json={"version": 1}).json()
    assert [deployed[name] for name in batching] == [None] * 5


def test_who_asks_again_waits_for_a_change(ask: Ask, pool: QuietPool) -> None:
    add(ask)
    first = ask("PUT", "/deployments/digits", json={"version": 1}).json()
    then = ask("GET", "/deployments/digits", params={"after": first["change"], "timeout_s": 5}).json()
    assert (first["state"], then["state"]) == ("starting", "serving")
    pool.is_ending = True
    again = ask("GET", "/deployments/digits", params={"after": then["change"], "timeout_s": 5}).json()
    assert again["change"] == then["change"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "Invalid JSON"),
        (b"[]", "should be an object"),
        (b"{}", "version: Field required"),
        (b'{"version": 1, "min_replicas": -1}', "min_replicas: "),
        (b'{"version": 1, "min_replicas": 2, "max_replicas": 1}', "is not possible"),
        (b'{"version": 1, "max_batch": 0}', "max_batch: "),
        (b'{"version": 1, "max_threads": 0}', "max_threads: "),
        (b'{"version": 1, "max_wait_ms": 1e9}', "a batch waits from 0 to 10 s"),
        (b'{"version": 1, "minimum": 2}', "minimum: Extra inputs"),
        (b'{"version": 1.5}', "version"),
    ],
)
def test_wrong_deployments(ask: Ask, pool: QuietPool, body: bytes, said: str) -> None:
    add(ask)
    assert said in refusal(ask("PUT", "/deployments/digits", content=body), 400)
    assert pool.looked == 0


def test_what_is_not_there(ask: Ask) -> None:
    add(ask)
    assert refusal(ask("GET", "/models/words"), 404) == "there is no model words"
    assert "it has 1" in refusal(ask("PUT", "/deployments/digits", json={"version": 9}), 404)
    assert "there is nothing at" in refusal(ask("GET", "/nothing"), 404)
    assert "there is nothing at" in refusal(ask("GET", "/models/a%00b"), 404)
    assert "it has 1" in refusal(ask("PUT", "/deployments/digits", json={"version": "a\0"}), 404)
    assert "after:" in refusal(ask("GET", f"/events?after={1 << 70}"), 400)
    wanted = {"version": 1, "min_replicas": 1 << 70}
    assert "min_replicas:" in refusal(ask("PUT", "/deployments/digits", json=wanted), 400)
    answer = ask("PATCH", "/models/digits")
    assert "GET is" in refusal(answer, 405)
    assert answer.headers["allow"] == "GET"
    assert "longer than" in refusal(ask("PUT", "/deployments/digits", content=b" " * (1 << 20) + b"{}"), 413)


def test_a_fault_is_an_answer_and_not_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    async def fail(_request: Request) -> Answer:
        raise ZeroDivisionError("a secret")

    broken = route("GET /api/v1/fail", "Fails.", fail, gives=dict)
    answer = asyncio.run(_ask(Router([broken]), "GET", "/fail"))
    assert "unexpected" in refusal(answer, 500)
    assert "secret" not in answer.text
    assert "ZeroDivisionError" in capsys.readouterr().out
