"""BentoML: one worker with adaptive batching."""

from __future__ import annotations

import bentoml
import numpy as np
import torch
from serving_models import MOST_ROWS, mlp


@bentoml.service(workers=1, traffic={"timeout": 30})
class Classifier:
    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model = mlp()

    @bentoml.api(batchable=True, max_batch_size=MOST_ROWS, max_latency_ms=1000, route="/infer")
    def infer(self, x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.model(torch.as_tensor(x, dtype=torch.float32)).numpy()
