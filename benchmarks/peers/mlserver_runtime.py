"""MLServer: a custom runtime with adaptive batching, in the process that answers HTTP."""

from __future__ import annotations

import torch
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from serving_models import mlp


class Classifier(MLModel):
    async def load(self) -> bool:
        torch.set_num_threads(1)
        self.model = mlp()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        x = torch.as_tensor(NumpyCodec.decode_input(payload.inputs[0]), dtype=torch.float32)
        with torch.inference_mode():
            y = self.model(x).numpy()
        return InferenceResponse(
            id=payload.id, model_name=self.name, outputs=[NumpyCodec.encode_output("y", y)]
        )
