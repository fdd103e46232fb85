from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from forescale.graph.capture import CapturedModel, capture
from forescale.graph.sharding import Sharded, Slice, shard_operators, share_units
from models import GPT, ResNet, TwoHeads, UNet
from sharded_run import assert_shards_are_the_whole, shards_of

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


torch.set_num_threads(1)

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


@cache
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


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_what_enters_a_stage_are_whole(name: str) -> None:
    captured, example = captured_of(name)
    for first in (1, len(captured.graph.operators) // 3, len(captured.graph.operators) // 2):
        assert_shards_are_the_whole(captured, (2, 1), example, first)


EXPECTED = {
    # Each block sums twice, and twice in backward; the embeddings' columns and the logits are gathered.
    "gpt": {"spread": 5, "total": 4, "gather": 2},
    # Attention draws random numbers, so its operands are gathered.
    "gpt with dropout": {"spread": 4, "total": 1, "gather": 4},
    # The weight that is read whole at one end stays whole at the other; the positions' columns are gathered.
    "tied gpt": {"spread": 2, "total": 2, "gather": 1},
    "fused": {"spread": 1, "total": 2},  # what comes in is no result of this stage, so nothing flows back
    "grouped": {"spread": 2, "total": 2},  # the norm of each head is whole, and its gradient summed
    "perceptron": {"spread": 1, "total": 2},
    "embedding": {"total": 1},
    "resnet": {"spread": 4, "total": 3, "gather": 1},
    "unet": {"spread": 3, "total": 3, "gather": 2},
    "two heads": {"spread": 2, "total": 3},
}


@pytest.mark.parametrize("name", MODELS)
def test_what_the_shards_exchange(name: str) -> None:
    captured, _ = captured_of(name)
    for shard in shards_of(captured, (7, 3)):
        assert collectives_of(shard) == EXPECTED[name]


def test_heads_and_columns_are_shared_out_unevenly() -> None:
    captured, _ = captured_of("gpt")
    first, last = shards_of(captured, (3, 1))
    assert first.slices["blocks.0.qkv.weight"] == Slice(axis=0, outer=3, units=4, inner=8, start=0, stop=3)
    assert last.slices["blocks.0.qkv.bias"] == Slice(axis=0, outer=3, units=4, inner=8, start=3, stop=4)
    assert last.slices["blocks.0.project.weight"] == Slice(axis=1, outer=1, units=4, inner=8, start=3, stop=4)
    assert last.slices["blocks.0.down.weight"] == Slice(
        axis=1, outer=1, units=128, inner=1, start=96, stop=128
    )
    assert "blocks.0.down.bias" not in last.slices
    assert last.graph.parameters["blocks.0.qkv.weight"].shape == (24, 32)
    attention = [o for o in captured.graph.operators if "attention" in o.target]
    assert [first.fraction_O[first.origin_O.index(o.index)] for o in attention] == [0.75, 0.75]


def test_shards_run_the_same_operators() -> None:
    captured, _ = captured_of("grouped")
    first, last = shards_of(captured, (7, 3))
    assert [o.target for o in first.graph.operators] == [o.target for o in last.graph.operators]
    assert first.origin_O == last.origin_O
    assert [o.index for o in first.graph.operators] == list(range(len(first.origin_O)))
    assert sorted(k for k in first.origin_O if k >= 0) == list(range(len(captured.graph.operators)))


def test_more_shards_than_heads_do_not_share_them_out() -> None:
    captured, example = captured_of("fused")
    shards = assert_shards_are_the_whole(captured, (1,) * 5, example)
    assert {part.units for part in shards[0].slices.values()} == {8, 128}  # parts of each head; columns


def test_a_part_is_read_whole_by_another_stage() -> None:
    captured, _ = captured_of("perceptron")
    graph = captured.graph
    wide = next(o.index for o in graph.operators if "gelu" in o.target)
    name = graph.operators[wide].outputs[0]
    assert name is not None
    shard = shard_operators(graph, range(wide + 1), 0, (1, 1), (name,))
    assert shard.graph.operators[-1].target == "collective:gather"
    assert shard.graph.outputs == shard.graph.operators[-1].outputs == (name,)
    assert shard.graph.tensors[name].shape == graph.tensors[name].shape


def test_what_costs_more_to_exchange_than_to_compute_is_not_split() -> None:
    captured = capture(perceptron(4, 4, 4), (torch.randn(4000, 4),))
    assert not shards_of(captured, (1, 1))[0].slices


@given(
    widths=st.lists(st.integers(2, 40), min_size=3, max_size=5),
    weights=st.lists(st.integers(1, 9), min_size=2, max_size=3),
)
@settings(max_examples=8)
def test_perceptrons_of_any_width(widths: list[int], weights: list[int]) -> None:
    torch.manual_seed(0)
    example = torch.randn(2, widths[0])
    captured = capture(perceptron(*widths), (example,))
    first = next(o.index for o in captured.graph.operators if "gelu" in o.target)
    assert_shards_are_the_whole(captured, weights, example)
    assert_shards_are_the_whole(captured, weights, example, first)


@given(st.integers(1, 60), st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_units_are_shared_out_in_proportion(units: int, weights: list[int]) -> None:
    units += len(weights)
    bounds = share_units(units, weights)
    counts = [b - a for a, b in pairwise(bounds)]
    assert (bounds[0], bounds[-1]) == (0, units)
    assert min(counts) >= 1
    quotas = [units * weight / sum(weights) for weight in weights]
    if min(quotas) >= 1:
        assert all(abs(count - quota) < 1 for count, quota in zip(counts, quotas, strict=True))


def models_of_transformers() -> dict[str, tuple[nn.Module, int]]:
    """With the number of sums in a forward: two per block."""
    from transformers import (  # noqa: PLC0415 - slow to import
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    gpt = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    bert = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=32,
    )  # fmt: skip
    llama = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return {
        "gpt": (GPT2LMHeadModel(gpt), 4),
        "bert": (BertModel(bert), 4),
        "llama": (LlamaForCausalLM(llama), 4),
    }


@pytest.mark.parametrize("name", ["gpt", "bert", "llama"])
def test_models_of_transformers(name: str) -> None:
    torch.manual_seed(0)
    model, sums = models_of_transformers()[name]
    example = ids(2, 6)
    captured = capture(model, (example,))
    shards = assert_shards_are_the_whole(captured, (3, 1), example)
    assert collectives_of(shards[0])["total"] == sums
