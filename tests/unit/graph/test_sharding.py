from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from forescale.graph.capture import CapturedModel, capture
from forescale.graph.sharding import Sharded
from models import GPT, ResNet, TwoHeads, UNet
from sharded_run import assert_shards_are_the_whole

WEIGHTS = [(1, 1), (3, 1), (7, 3), (2, 1, 1)]


class Fused(nn.Module):
    """A block of GPT-2: one projection that is split in three, added to what came in."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        query, key, value = (
            part.view(rows, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        scores = (query @ key.transpose(-2, -1)) / 3.0
        mixed = scores.softmax(-1) @ value
        x = x + self.project(mixed.transpose(1, 2).contiguous().view(rows, length, width))
        return x + self.down(functional.gelu(self.up(x)))


class Grouped(nn.Module):
    """A block of Llama: heads that share keys, a gated product of two projections, a norm of each head."""

    def __init__(self, width: int = 32, heads: int = 4, keys: int = 2) -> None:
        super().__init__()
        self.heads, self.keys, self.each = heads, keys, width // heads
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(width, keys * self.each, bias=False) for _ in range(2))
        self.norm = nn.RMSNorm(self.each)
        self.project = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)

    def _heads(self, x: Tensor, number: int) -> Tensor:
        rows, length, _ = x.shape
        return x.view(rows, length, number, self.each).transpose(1, 2)

    def _repeated(self, x: Tensor) -> Tensor:
        rows, keys, length, each = x.shape
        many = x[:, :, None].expand(rows, keys, self.heads // keys, length, each)
        return many.reshape(rows, self.heads, length, each)

    def forward(self, x: Tensor) -> Tensor:
        query = self.norm(self._heads(self.query(x), self.heads))
        key = self._repeated(self._heads(self.key(x), self.keys))
        value = self._repeated(self._heads(self.value(x), self.keys))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.silu(self.gate(x)) * self.up(x))


def perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 60, shape)


MODELS: dict[str, tuple[Any, Any]] = {
    "gpt": (lambda: GPT(blocks=2), lambda: ids(3, 6)),
    "gpt with dropout": (lambda: GPT(blocks=1, dropout=0.2), lambda: ids(3, 6)),
    "tied gpt": (lambda: GPT(blocks=1, tied=True), lambda: ids(3, 6)),
    "fused": (Fused, lambda: torch.randn(3, 6, 32)),
    "grouped": (Grouped, lambda: torch.randn(3, 6, 32)),
    "perceptron": (lambda: perceptron(24, 80, 24, 96, 12), lambda: torch.randn(5, 24)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(500, 32), nn.Linear(32, 8)), lambda: ids(3, 4)),
    "resnet": (ResNet, lambda: torch.randn(3, 3, 8, 8)),
    "unet": (lambda: UNet(16), lambda: torch.randn(3, 3, 16, 16)),
    "two heads": (TwoHeads, lambda: torch.randn(4, 8)),
}


def captured_of(name: str) -> tuple[CapturedModel, Tensor]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, batch = MODELS[name]
    example = batch()
    return capture(model(), (example,)), example


def collectives_of(shard: Sharded) -> Counter[str]:
    kinds = (o.target for o in shard.graph.operators if o.target.startswith("collective:"))
    return Counter(kind.removeprefix("collective:") for kind in kinds)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_shards_together_are_the_whole_model(name: str, weights: Sequence[int]) -> None:
    captured, example = captured_of(name)
    assert_shards_are_the_whole(captured, weights, example)
