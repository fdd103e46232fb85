"""Models and batches the benchmarks train."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

import forescale as fs

VOCABULARY = 128


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        rows, length, width = x_BTD.shape
        heads = self.qkv(self.norm1(x_BTD)).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.proj(attended.transpose(1, 2).reshape(rows, length, width))
        return x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD))))


class GPT(nn.Module):
    """Decoder-only transformer over characters."""

    def __init__(self, *, width: int, layers: int, heads: int = 8, context: int = 1024) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids_BT) + self.positions(torch.arange(ids_BT.shape[1], device=ids_BT.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def next_token_loss(logits_BTV: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1), batch[1].flatten())


def token_batches(
    *, count: int, rows: int, length: int, seed: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(0, VOCABULARY, (rows, length + 1), generator=generator)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def gpt_task(*, width: int, layers: int, rows: int, length: int, count: int) -> fs.TrainingTask:
    """A GPT with AdamW on random tokens; about ``12 * layers * width**2`` parameters."""
    torch.manual_seed(0)
    return fs.TrainingTask(
        GPT(width=width, layers=layers),
        next_token_loss,
        lambda parameters: torch.optim.AdamW(parameters, lr=3e-4),
        token_batches(count=count, rows=rows, length=length),
    )


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
