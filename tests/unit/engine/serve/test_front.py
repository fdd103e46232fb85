"""What stands before the application: the check of names, the access log, traces."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fake_replicas import DOUBLING, FakeLink, settle
from forescale.core.clock import SystemClock
from forescale.engine.serve.access_log import AccessLog
from forescale.engine.serve.app import App, AsgiApp
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.hosts import HostCheck
from forescale.engine.serve.tracing import Tracing

BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}).encode()
INFER = "/v2/models/m/infer"


async def call(app: AsgiApp, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    """Status and body of the answer to a POST of the body, or to a GET; status 0: it was not awaited."""
    scope = {
        "type": "http",
        "method": "POST" if body else "GET",
        "path": path,
        "client": ("10.1.2.3", 5),
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return (sent[0]["status"], b"".join(part["body"] for part in sent[1:])) if sent else (0, b"")


def served() -> tuple[App, FakeLink]:
    link = FakeLink(prompt=True)
    gateway = Gateway(link, clock=SystemClock())
    gateway.serve("m", "1", DOUBLING)
    link.join("m.1.0")
    return App(gateway), link


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8080", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8080", 200),
        ("10.0.0.7:80", 200),
        ("Models.Example:8080", 200),
        ("evil.example", 421),
        ("localhost.evil.example:8080", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
    ],
)
def test_only_names_of_this_machine_are_answered(host: str, status: int) -> None:
    async def test() -> None:
        app = HostCheck(served()[0], ["models.example"])
        for _ in range(2):  # the second time it is remembered
            answered, body = await call(app, "/v2/health/live", host=host)
            assert answered == status
            assert (b"--allow-host" in body) is (status == 421)
        assert (await call(app, "/v2"))[0] == 200  # an old client; browsers always say it

    asyncio.run(test())


def test_each_request_becomes_a_line(tmp_path: Path) -> None:
    async def test() -> None:
        log = AccessLog(served()[0], tmp_path / "access.log", SystemClock())
        size = str(len(BODY))
        _, body = await call(log, INFER, BODY, content_length=size, user_agent="a\nb", x_request_id="7")
        await call(log, "/v2/models/absent")
        (tmp_path / "access.log").rename(tmp_path / "access.log.1")
        await log.close()
        first, second = map(json.loads, (tmp_path / "access.log").read_text().splitlines())
        assert (first["method"], first["path"], first["status"], first["client"]) == (
            "POST",
            INFER,
            200,
            "10.1.2.3",
        )
        assert (first["received_bytes"], first["sent_bytes"]) == (len(BODY), len(body))
        assert (first["user_agent"], first["request_id"]) == ("a\nb", "7")
        assert 0 < first["seconds"] < 60
        assert first["at"].endswith("Z")
        assert (second["method"], second["path"], second["status"]) == ("GET", "/v2/models/absent", 404)

    asyncio.run(test())


def test_faults_and_clients_that_leave_become_lines_too(tmp_path: Path) -> None:
    async def fail(*_: Any) -> None:
        raise ZeroDivisionError

    async def say_nothing(*_: Any) -> None: ...

    async def test() -> None:
        path = tmp_path / "access.log"
        log = AccessLog(fail, path, SystemClock())
        with pytest.raises(ZeroDivisionError):
            await call(log, "/a")
        await log.close()
        log = AccessLog(say_nothing, path, SystemClock())
        await call(log, "/b")
        await log.close()
        assert [json.loads(line)["status"] for line in path.read_text().splitlines()] == [500, 499]

    asyncio.run(test())


def test_an_access_log_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    async def say_nothing(*_: Any) -> None: ...

    with pytest.raises(FileNotFoundError):
        AccessLog(say_nothing, tmp_path / "no" / "access.log", SystemClock())


def test_a_request_is_traced_from_gateway_over_queue_to_replicas() -> None:
    async def test() -> None:
        app, link = served()
        exporter = InMemorySpanExporter()
        tracing = Tracing(app, exporter, SystemClock())
        trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        link.prompt = False
        asking = asyncio.create_task(call(tracing, INFER, BODY, traceparent=f"00-{trace_id}-{parent_id}-01"))
        await settle()
        link.fail("m.1.0")  # alone, so it is told; with others it would go again
        assert (await asking)[0] == 500
        link.prompt = True
        await call(tracing, "/v2/models/m/versions/1", traceparent="nonsense")
        await call(tracing, INFER, BODY, traceparent=f"00-{trace_id}-{parent_id}-00")  # not to be sampled
        tracing.close()
        queue, replica, infer, metadata = exporter.get_finished_spans()
        assert [span.name for span in (queue, replica, infer, metadata)] == [
            "queue",
            "replica",
            "POST /v2/models/{model}/infer",
            "GET /v2/models/{model}/versions/{version}",
        ]
        assert infer.parent is not None
        assert infer.context is not None
        assert (f"{infer.context.trace_id:032x}", f"{infer.parent.span_id:016x}") == (trace_id, parent_id)
        for child in (queue, replica):
            assert child.parent is not None
            assert child.parent.span_id == infer.context.span_id
        assert dict(replica.attributes or {}) == {"forescale.replica": "m.1.0", "forescale.batch_rows": 1}
        assert (infer.attributes or {})["http.response.status_code"] == 500
        assert not infer.status.is_ok
        times = [infer.start_time, queue.start_time, queue.end_time, replica.end_time]
        assert sorted(times, key=lambda time: time or 0) == times
        assert queue.end_time == replica.start_time
        assert replica.end_time == infer.end_time
        assert metadata.parent is None

    asyncio.run(test())
