"""Mosec: its server in Rust, one worker process with batching, bodies read and written by orjson."""

from __future__ import annotations

from typing import Any

import orjson
import torch
from mosec import Server, Worker
from serving_models import MOST_ROWS, mlp


class Classifier(Worker):
    def __init__(self) -> None:
        super().__init__()
        torch.set_num_threads(1)
        self.model = mlp()

    def deserialize(self, data: bytes) -> Any:
        return orjson.loads(data)

    def serialize(self, data: Any) -> bytes:
        return orjson.dumps(data)

    def forward(self, data: list[Any]) -> list[Any]:
        with torch.inference_mode():
            y = self.model(torch.tensor([one["x"] for one in data])).tolist()
        return [{"y": row} for row in y]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Classifier, num=1, max_batch_size=MOST_ROWS, max_wait_time=1, route="/infer")
    server.run()
