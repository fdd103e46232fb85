from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest

from fake_replicas import DOUBLING, FakeLink, settle
from forescale.core.clock import SystemClock
from forescale.engine.serve.app import App
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.queues import QueuePolicy

INFER = "/v2/models/m/infer"
GOOD: dict[str, Any] = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Calls an application as a server would."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(
        self, method: str, path: str, body: object = b"", *, chunks: int = 1, **headers: str
    ) -> Answer:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
        }
        size = -(-len(content) // chunks) or 1
        parts = [content[start : start + size] for start in range(0, len(content), size)] or [b""]
        sent: list[Any] = []

        async def receive() -> Any:
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        start, *rest = sent
        whole = b"".join(bytes(part["body"]) for part in rest)
        assert [part.get("more_body", False) for part in rest] == [True] * (len(rest) - 1) + [False]
        answered = {name.decode(): value.decode() for name, value in start["headers"]}
        assert int(answered["content-length"]) == len(whole)
        return Answer(status=start["status"], headers=answered, body=whole)


def run(test: Callable[[Client, FakeLink, Gateway], Awaitable[None]], **options: Any) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            link = FakeLink(prompt=True)
            gateway = Gateway(link, clock=SystemClock())
            gateway.serve("m", "1", DOUBLING, QueuePolicy(timeout_s=10.0))
            await test(Client(App(gateway, **options)), link, gateway)

    asyncio.run(bounded())


def test_json_goes_in_and_out() -> None:
    async def test(call: Client, link: FakeLink, _: Gateway) -> None:
        link.join()
        answer = await call("POST", INFER, {**GOOD, "id": "7"})
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        assert answer.json["outputs"][0]["data"] == [2, 4]
        assert (answer.json["id"], answer.json["model_version"]) == ("7", "1")
        versioned = await call("POST", "/v2/models/m/versions/1/infer", GOOD)
        assert versioned.json["outputs"] == answer.json["outputs"]

    run(test)


def test_bytes_go_in_and_out() -> None:
    async def test(call: Client, link: FakeLink, _: Gateway) -> None:
        link.join()
        entry = {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}
        head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
        body = head + np.array([3, 4], np.float32).tobytes()
        for chunks in (1, 5):
            answer = await call(
                "POST", INFER, body, chunks=chunks, inference_header_content_length=str(len(head))
            )
            assert (answer.status, answer.headers["content-type"]) == (200, "application/octet-stream")
            at = int(answer.headers["inference-header-content-length"])
            assert np.frombuffer(answer.body[at:], np.float32).tolist() == [6, 8]

    run(test)


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("GZIP", gzip.compress)]
)
def test_compressed_bodies_are_taken(encoding: str, pack: Callable[[bytes], bytes]) -> None:
    async def test(call: Client, link: FakeLink, _: Gateway) -> None:
        link.join()
        body = pack(json.dumps(GOOD).encode())
        answer = await call("POST", INFER, body, content_encoding=encoding)
        assert answer.json["outputs"][0]["data"] == [2, 4]

    run(test)


def test_large_answers_are_compressed_for_those_who_take_it() -> None:
    rows = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [32, 2], "data": [0.123] * 64}]}

    async def test(call: Client, link: FakeLink, _: Gateway) -> None:
        link.join()
        rows["inputs"][0].update(shape=[30, 2], data=[1 / 3 + n for n in range(60)])
        plain = await call("POST", INFER, {**rows, "id": "x" * 900})
        assert "content-encoding" not in plain.headers
        packed = await call("POST", INFER, {**rows, "id": "x" * 900}, accept_encoding="br, gzip;q=0.5")
        assert packed.headers["content-encoding"] == "gzip"
        assert gzip.decompress(packed.body) == plain.body
        refused = await call("POST", INFER, {**rows, "id": "x" * 900}, accept_encoding="gzip;q=0, br")
        assert refused.body == plain.body
        small = await call("POST", INFER, GOOD, accept_encoding="gzip")
        assert "content-encoding" not in small.headers

    run(test)


@pytest.mark.parametrize(
    ("body", "headers", "status", "says"),
    [
        (b"", {}, 400, "not JSON"),
        (b"nonsense", {}, 400, "not JSON"),
        ({}, {}, 400, "'inputs'"),
        (GOOD, {"inference_header_content_length": "99999"}, 400, "JSON part"),
        (GOOD, {"inference_header_content_length": "-1"}, 400, "number of bytes"),
        (GOOD, {"inference_header_content_length": "9" * 5000}, 400, "number of bytes"),
        (GOOD, {"content_encoding": "br"}, 415, "'br'"),
        (GOOD, {"content_encoding": "gzip"}, 400, "not gzip"),
        (gzip.compress(b"{}", mtime=0)[:-3], {"content_encoding": "gzip"}, 400, "whole gzip"),
        (gzip.compress(b"{}", mtime=0) + b"more", {"content_encoding": "gzip"}, 400, "whole gzip"),
        (gzip.compress(b" " * 5000, mtime=0), {"content_encoding": "gzip"}, 413, "1,000 bytes"),
        (b" " * 1001, {}, 413, "1,000 bytes"),
        (b" ", {"content_length": "1001", "expect": "100-continue"}, 413, "1,000 bytes"),
    ],
)
def test_bad_bodies_are_refused_and_harm_nobody(
    body: object, headers: dict[str, str], status: int, says: str
) -> None:
    async def test(call: Client, link: FakeLink, gateway: Gateway) -> None:
        link.join()
        answer = await call("POST", INFER, body, chunks=3, **headers)
        assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
        assert says in answer.json["error"]
        assert set(answer.json) == {"error"}
        assert answer.headers.get("connection") == ("close" if status == 413 else None)
        assert (await call("POST", INFER, GOOD)).status == 200

    run(test, body_limit_bytes=1000)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v2/models/x/infer", 404),
        ("POST", "/v2/models/m/versions/2/infer", 404),
        ("POST", "/v2/models/../infer", 404),
        ("POST", "/v2/models/m/n/infer", 404),
        ("POST", "/v2/infer", 404),
        ("GET", INFER, 405),
        ("POST", "/v2/models/m", 405),
        ("GET", "/v2/models/x", 404),
        ("GET", "/v2/models/x/ready", 404),
        ("GET", "/v2/nothing", 404),
        ("GET", "/v2x", 404),
        ("GET", "/", 404),
        ("GET", "/nothing", 404),
    ],
)
def test_what_is_not_there_is_said_in_the_protocols_words(method: str, path: str, status: int) -> None:
    async def test(call: Client, link: FakeLink, _: Gateway) -> None:
        link.join()
        answer = await call(method, path, GOOD)
        assert answer.status == status
        assert answer.json["error"]

    run(test)


def test_the_server_and_its_models_describe_themselves() -> None:
    async def test(call: Client, link: FakeLink, gateway: Gateway) -> None:
        gateway.serve("m", "2", DOUBLING)
        assert (await call("GET", "/v2/health/live")).json == {"live": True}
        assert (await call("GET", "/v2/health/ready")).json == {"ready": True}
        assert "binary_tensor_data" in (await call("GET", "/v2")).json["extensions"]
        assert (await call("GET", "/v2/models/m")).json["versions"] == ["1", "2"]
        assert (await call("GET", "/v2/models/m/versions/2/")).json["inputs"][0]["shape"] == [-1, 2]
        assert (await call("GET", "/v2/models/m/ready")).status == 503
        link.join()
        assert (await call("GET", "/v2/models/m/ready")).json == {"name": "m", "ready": True}
        assert (await call("GET", "/v2/models/m/versions/2/ready")).status == 503

    run(test)


def test_who_comes_too_late_is_told_when_to_come_again() -> None:
    async def test(call: Client, link: FakeLink, gateway: Gateway) -> None:
        answer = await call("POST", INFER, {**GOOD, "parameters": {"timeout": 1000}})
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json["error"]

    run(test)


def test_metrics_count_what_happened() -> None:
    async def test(call: Client, link: FakeLink, gateway: Gateway) -> None:
        link.join()
        for _ in range(3):
            await call("POST", INFER, GOOD)
        text = (await call("GET", "/metrics")).body.decode()
        assert 'forescale_requests_total{model="m",version="1",outcome="ok"} 3' in text
        assert 'forescale_request_duration_seconds_count{model="m",version="1"} 3' in text
        assert 'forescale_batch_rows_bucket{model="m",version="1",le="1.0"} 3' in text
        assert 'forescale_replicas{model="m",version="1"} 1' in text

    run(test)


def test_other_paths_are_the_apis() -> None:
    seen: list[str] = []

    async def api(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        await send({"type": "http.response.start", "status": 418, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def test(call: Client, link: FakeLink, _: Gateway) -> None:
        assert (await call("GET", "/api/v1/models")).status == 418
        assert (await call("GET", "/v2")).status == 200
        assert seen == ["/api/v1/models"]

    run(test, api=api)


def test_a_fault_of_ours_is_not_shown_and_ends_nothing() -> None:
    async def test(call: Client, link: FakeLink, gateway: Gateway) -> None:
        link.join()
        served = gateway.find("m")
        served.signature = cast(Any, None)
        answer = await call("POST", INFER, GOOD)
        assert answer.status == 500
        assert "NoneType" not in answer.json["error"]
        served.signature = DOUBLING
        assert (await call("POST", INFER, GOOD)).status == 200

    run(test)


def test_a_client_that_leaves_while_it_sends_is_forgotten() -> None:
    async def test(call: Client, link: FakeLink, gateway: Gateway) -> None:
        messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            raise AssertionError("there is nobody to tell")

        await call.app({"type": "http", "method": "POST", "path": INFER, "headers": []}, receive, send)
        await settle()
        assert gateway.find("m").gauges().waiting == 0

    run(test)
