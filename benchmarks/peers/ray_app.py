"""Ray Serve: one replica with batching; its HTTP port is the replica's own (direct ingress)."""

from __future__ import annotations

import signal
import sys
from typing import Any

import orjson
import ray
import torch
from ray import serve
from serving_models import MOST_ROWS, mlp
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(num_replicas=1, max_ongoing_requests=256, ray_actor_options={"num_cpus": 1})
class Classifier:
    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model = mlp()

    @serve.batch(max_batch_size=MOST_ROWS, batch_wait_timeout_s=0.001)
    async def rows(self, x: list[list[float]]) -> list[list[float]]:
        with torch.inference_mode():
            return self.model(torch.tensor(x)).tolist()

    async def __call__(self, request: Request) -> Any:
        x = orjson.loads(await request.body())["x"]
        y = await self.rows(x)  # pyright: ignore - what the decorator makes takes one request's row
        return Response(orjson.dumps({"y": y}), media_type="application/json")


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=sys.argv[2], logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Classifier.bind(), route_prefix="/infer")
    signal.pause()
