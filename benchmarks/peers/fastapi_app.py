"""FastAPI on uvicorn with uvloop and httptools: one process, the model in it. It has no batching."""

from __future__ import annotations

import sys

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from serving_models import mlp

torch.set_num_threads(1)
app = FastAPI()
model = mlp()


class Pixels(BaseModel):
    x: list[float]


class Scores(BaseModel):
    y: list[float]


@app.post("/infer")
async def infer(pixels: Pixels) -> Scores:  # on the loop: a thread pool costs more than this model
    with torch.inference_mode():
        return Scores(y=model(torch.tensor([pixels.x]))[0].tolist())


if __name__ == "__main__":
    uvicorn.run(
        app, port=int(sys.argv[1]), loop="uvloop", http="httptools", access_log=False, log_level="error"
    )
