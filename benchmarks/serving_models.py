"""Models and request bodies of the serving benchmarks. In the peers' environments, too: needs torch alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

PIXELS = 784
WIDTH, TOKENS, LAYERS = 256, 64, 8
"""Of the transformer: 6.3 million weights, 25 MB."""

MOST_ROWS = 32
"""Of a batch, everywhere."""


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(PIXELS, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    ).eval()


def encoder(layers: int) -> nn.Module:
    """A transformer: rows of tokens of ``WIDTH`` values."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()


def save(model: nn.Module, example: torch.Tensor, path: Path) -> Path:
    """Write a model as an archive that takes any number of rows."""
    rows = torch.export.Dim("rows", min=1, max=256)
    names = json.dumps({"inputs": ["x"], "outputs": ["y"]})
    program = torch.export.export(model, (example,), dynamic_shapes=({0: rows},))
    torch.export.save(program, path, extra_files={"signature.json": names})
    return path


def pixels() -> list[float]:
    """One row for the MLP, with four digits a value."""
    return np.random.default_rng(0).random(PIXELS).round(4).tolist()


def v2_body(values: list[float], shape: tuple[int, ...], **parameters: int) -> bytes:
    """A request of the Open Inference Protocol with one tensor as JSON."""
    tensor = {"name": "x", "shape": shape, "datatype": "FP32", "data": values}
    return json.dumps({"inputs": [tensor], **({"parameters": parameters} if parameters else {})}).encode()


def v2_binary_body(array: np.ndarray, **parameters: int | bool) -> tuple[bytes, int]:
    """The same with the tensor as bytes; also the length of the JSON before it."""
    tensor = {
        "name": "x",
        "shape": array.shape,
        "datatype": "FP32",
        "parameters": {"binary_data_size": array.nbytes},
    }
    head = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
    return head + array.tobytes(), len(head)
