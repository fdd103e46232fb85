"""The whole HTTP surface on a real port, in a thread: the registry is real, replicas and pool are not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fake_replicas import DOUBLING, FakeLink
from forescale.api.management import management
from forescale.core.clock import SystemClock
from forescale.core.signature import Signature
from forescale.engine.serve.app import App
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.routing import Route
from forescale.engine.serve.server import Server, listen
from forescale.registry.artifacts import ArtifactStore
from forescale.registry.records import Deployment, DeploymentSpec
from forescale.registry.registry import Registry


class IdlePool:
    """Says that everything serves."""

    change = 1
    is_ending = False
    checks = ("quality",)

    def inspect(
        self,
        path: Path,
        format: str,  # noqa: A002
        options: Mapping[str, Any],
        declared: Signature | None,
    ) -> Signature:
        return declared or DOUBLING

    async def check_room(self, spec: DeploymentSpec) -> str | None:
        return None

    def look_again(self) -> None: ...

    def status(self, deployment: Deployment) -> dict[str, Any]:
        return {"state": "serving", "change": self.change, "error": None, "replicas": [], "requests": {}}

    async def wait_for_change(self, timeout_s: float) -> None:
        self.change += 1


@contextmanager
def served_app(folder: Path) -> Generator[str]:
    """URL of a server of "double", versions 1 and 2 (the default), which doubles ``x``."""
    store = ArtifactStore(str(folder / "store"))
    registry = Registry(f"sqlite:///{folder}/registry.db", store, SystemClock())
    (folder / "double").write_bytes(b"weights")
    for _ in range(2):
        registry.add_version("double", folder / "double", format="pt2", signature=DOUBLING, created_by="ada")
    (folder / "incoming").mkdir()
    ready, ending = threading.Event(), asyncio.Event()
    found: list[Any] = []

    async def serve() -> None:
        link = FakeLink(prompt=True)
        gateway = Gateway(link, clock=SystemClock())
        for version in ("1", "2"):
            gateway.serve("double", version, DOUBLING)
            link.join(f"replica-{version}", model="double", version=version)
        gateway.set_route("double", Route(version="2"))
        listener = listen("127.0.0.1", 0)
        port = listener.getsockname()[1]
        async with Server(App(gateway, api=management(registry, IdlePool(), folder / "incoming")), listener):
            found.extend((f"http://127.0.0.1:{port}", asyncio.get_running_loop()))
            ready.set()
            await ending.wait()
            gateway.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    ready.wait(20)
    url, loop = found
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join()
        registry.close()
