"""LitServe: one API process, one worker, batching, its queue over ZeroMQ."""

from __future__ import annotations

import sys
from typing import Any

import litserve
import torch
from serving_models import MOST_ROWS, mlp


class Classifier(litserve.LitAPI):
    def setup(self, *_: Any) -> None:
        torch.set_num_threads(1)
        self.model = mlp()

    def decode_request(self, request, **_: Any) -> list[float]:  # an annotation would make it a query
        return request["x"]

    def batch(self, inputs: list[Any]) -> torch.Tensor:
        return torch.tensor(inputs)

    def predict(self, x: torch.Tensor, **_: Any) -> list[list[float]]:
        with torch.inference_mode():
            return self.model(x).tolist()

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        return output

    def encode_response(self, output: list[float], **_: Any) -> Any:
        return {"y": output}


if __name__ == "__main__":
    api = Classifier(max_batch_size=MOST_ROWS, batch_timeout=0.001, api_path="/infer")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        generate_client_file=False,
        log_level="error",
        access_log=False,
    )
