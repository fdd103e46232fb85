"""A character-level GPT, trained on the source text of Python's standard library.

forescale profile examples/tiny_gpt.py
forescale plan examples/tiny_gpt.py --devices 2 --svg plan.svg
forescale train examples/tiny_gpt.py --devices 2 --steps 200
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import forescale as fs

WIDTH, HEADS, LAYERS = 128, 4, 4
ROWS, LENGTH = 16, 128


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each behind a layer norm and beside a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        heads = self.queries_keys_values(self.attention_norm(x)).view(rows, length, 3, HEADS, width // HEADS)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4).unbind()
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.feed_forward(x)


class TinyGPT(nn.Module):
    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight  # tied

    def forward(self, characters: Tensor) -> Tensor:
        positions = torch.arange(characters.shape[1], device=characters.device)
        x = self.embedding(characters) + self.positions(positions)
        return self.head(self.norm(self.blocks(x)))


class Windows:
    """Endless batches of random windows of a text: characters, and for each the one that follows."""

    def __init__(self, text: str) -> None:
        self.alphabet = sorted(set(text))
        numbers = {character: number for number, character in enumerate(self.alphabet)}
        self.text = torch.tensor([numbers[character] for character in text])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        chance = torch.Generator().manual_seed(0)  # the same batches every time, so that a run can be resumed
        while True:
            starts = torch.randint(len(self.text) - LENGTH, (ROWS, 1), generator=chance)
            windows = self.text[starts + torch.arange(LENGTH + 1)]
            yield windows[:, :-1], windows[:, 1:]


def library_text(modules: int = 40) -> str:
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:modules]
    return "".join(path.read_text(encoding="utf-8") for path in paths)


def loss(logits: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


def task() -> fs.TrainingTask:
    torch.manual_seed(0)
    windows = Windows(library_text())
    return fs.TrainingTask(
        model=TinyGPT(len(windows.alphabet)),
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        batches=windows,
        clip_norm=1.0,
    )
