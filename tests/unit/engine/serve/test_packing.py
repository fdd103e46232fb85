"""Weights laid out anew: the same answers, and only where nothing else reads them."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from forescale.engine.serve.formats.packing import pack

WIDTH = 256


class Mixed(nn.Module):
    """A layer used twice under two names, a weight tied to an embedding, a bias with gaps, a small layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, WIDTH)
        self.first = self.second = nn.Linear(WIDTH, WIDTH)
        self.gapped = nn.Linear(WIDTH, WIDTH)
        self.gapped.bias = nn.Parameter(torch.randn(2 * WIDTH)[::2])
        self.plain = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 300, bias=False)
        self.head.weight = self.embedding.weight
        self.small = nn.Linear(300, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(self.embedding(tokens)).relu())
        return self.small(self.head(self.plain(self.gapped(x)).transpose(0, 1)))


def exported(model: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(model.eval(), (example,), dynamic_shapes=({0: rows},))
    return program.module(check_guards=False)


@pytest.fixture(scope="module")
def model() -> Mixed:
    torch.manual_seed(0)
    return Mixed()


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_answers_stay_the_same(model: Mixed, rows: int) -> None:
    program = exported(model, torch.zeros(2, 8, dtype=torch.int64))
    pack(program)
    tokens = torch.randint(300, (rows, 8))
    with torch.inference_mode():
        torch.testing.assert_close(program(tokens), model(tokens), rtol=1e-4, atol=1e-5)


def test_what_others_read_and_what_would_not_gain_stays_as_it_was(model: Mixed) -> None:
    program = exported(model, torch.zeros(2, 8, dtype=torch.int64))
    pack(program)
    packed = {name for name, values in program.named_buffers() if values.is_mkldnn}
    assert packed == {"second.weight", "plain.weight"}


def test_no_weight_is_kept_in_both_layouts(model: Mixed) -> None:
    program = exported(model, torch.zeros(2, 8, dtype=torch.int64))
    pack(program)
    assert "first.weight" not in dict(program.named_parameters())


def test_doubles_are_left_alone() -> None:
    layer = nn.Linear(WIDTH, WIDTH).double()
    program = exported(layer, torch.zeros(2, WIDTH, dtype=torch.float64))
    pack(program)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(program(x), layer(x))
