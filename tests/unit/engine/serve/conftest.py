"""Small models, exported once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn


class TwoHeads(nn.Module):
    """Tokens and a mask to logits and a length; has a buffer, a constant and control of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 3)
        self.register_buffer("shift", torch.ones(4))
        self.scale = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            x = (self.embed(ids) * mask[..., None]).mean(1).reshape(
                ids.shape[0], -1
            ) * self.scale + self.shift
        return {"logits": nn.functional.gelu(self.head(x), approximate="tanh"), "length": mask.sum(1)}


@pytest.fixture(scope="package")
def two_heads() -> TwoHeads:
    torch.manual_seed(0)
    return TwoHeads().eval()


@pytest.fixture(scope="package")
def dynamic_pt2(two_heads: TwoHeads, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows from 1 to 64, any number of tokens."""
    rows, tokens = torch.export.Dim("rows", min=1, max=64), torch.export.Dim.AUTO
    program = torch.export.export(
        two_heads,
        (torch.ones(3, 5, dtype=torch.long), torch.ones(3, 5)),
        dynamic_shapes={"ids": {0: rows, 1: tokens}, "mask": {0: rows, 1: tokens}},
    )
    path = tmp_path_factory.mktemp("dynamic") / "model.pt2"
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="package")
def fixed_pt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exactly 4 rows, with names of its own for its tensors."""
    program = torch.export.export(nn.Linear(2, 2).eval(), (torch.ones(4, 2),))
    path = tmp_path_factory.mktemp("fixed") / "model.pt2"
    names = {"inputs": ["point"], "outputs": ["image"]}
    torch.export.save(program, path, extra_files={"signature.json": json.dumps(names)})
    return path
