"""What the demo trains: a character-level GPT on the Python standard library's own source text.

Its lower blocks mix neighbouring characters by a causal convolution, its upper ones by attention: the
first cost grows with the sequence's length, the second with its square, so the best split of the model
depends on the length.

Axes: B = row of the batch, T = position, C = channel.
"""

from __future__ import annotations

import string
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from forescale.core.errors import InvalidInput
from forescale.engine.train.task import TrainingTask

ALPHABET = string.printable
"""Characters the model knows; any other becomes the one number behind them."""

_TEXT_CHARACTERS = 4_000_000
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the model and of its batches."""

    channels: int = 256
    heads: int = 16
    convolutions: int = 5
    attentions: int = 9
    rows: int = 8
    length: int = 128


class Convolution(nn.Module):
    """Mixes every position with the three before it, as one matrix product."""

    WIDTH = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Linear(self.WIDTH * channels, channels)

    def forward(self, hidden_BTC: Tensor) -> Tensor:
        length = hidden_BTC.shape[1]
        before = [functional.pad(hidden_BTC, (0, 0, back, 0))[:, :length] for back in range(1, self.WIDTH)]
        return self.mix(torch.cat([hidden_BTC, *before], dim=-1))


class Attention(nn.Module):
    """Causal self-attention whose heads share one key and value.

    Shazeer, *Fast Transformer Decoding: One Write-Head is All You Need*, 2019.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels // heads)
        self.out = nn.Linear(channels, channels)

    def forward(self, hidden_BTC: Tensor) -> Tensor:
        query = self.query(hidden_BTC).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        shared = self.key_value(hidden_BTC).unsqueeze(1).expand(-1, self.heads, -1, -1)
        key, value = shared.chunk(2, dim=-1)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Residual(nn.Module):
    """A layer behind a norm and beside a skip."""

    def __init__(self, channels: int, layer: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.layer = layer

    def forward(self, hidden_BTC: Tensor) -> Tensor:
        return hidden_BTC + self.layer(self.norm(hidden_BTC))


class CharacterGpt(nn.Module):
    """Predicts every next character of a text."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        channels, symbols = shape.channels, len(ALPHABET) + 1
        self.characters = nn.Embedding(symbols, channels)
        self.positions = nn.Parameter(0.02 * torch.randn(2 * shape.length, channels))
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(
                    Residual(channels, Convolution(channels)), Residual(channels, feed_forward(channels))
                )
                for _ in range(shape.convolutions)
            )
        )
        self.attentions = nn.Sequential(
            *(Residual(channels, Attention(channels, shape.heads)) for _ in range(shape.attentions))
        )
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, symbols)

    def forward(self, characters_BT: Tensor) -> Tensor:
        hidden_BTC = self.characters(characters_BT) + self.positions[: characters_BT.shape[1]]
        return self.head(self.norm(self.attentions(self.convolutions(hidden_BTC))))


def feed_forward(channels: int) -> nn.Module:
    return nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))


def next_character_loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy, in nats per character."""
    return functional.cross_entropy(output.flatten(0, 1), batch[1].flatten())


def source_text() -> tuple[str, Path]:
    """The first few million characters of the standard library's source, and where it lies.

    The same on every machine with the same Python: files in the order of their names, without tests.

    Raises:
        InvalidInput: this Python comes without its source.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    texts: list[str] = []
    missing = _TEXT_CHARACTERS
    for path in sorted(folder.rglob("*.py")):
        if missing <= 0:
            break
        if not _LEFT_OUT & set(path.relative_to(folder).parts):
            texts.append(path.read_text(encoding="utf-8", errors="replace")[:missing])
            missing -= len(texts[-1])
    if missing > _TEXT_CHARACTERS // 2:
        raise InvalidInput(f"the Python standard library's source is not in {folder}; the demo trains on it")
    return "".join(texts), folder


def batches(text: Tensor, shape: Shape, *, long_from: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows from random places of the text, twice as long from step ``long_from`` on; without end."""
    random = torch.Generator().manual_seed(seed)
    step = 0
    while True:
        length = shape.length * (2 if step >= long_from else 1)
        starts = torch.randint(len(text) - length - 1, (shape.rows,), generator=random)
        rows = torch.stack([text[start : start + length + 1] for start in starts.tolist()])
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        step += 1


def encode(text: str) -> Tensor:
    """Every character as its place in ``ALPHABET``."""
    numbers = {character: number for number, character in enumerate(ALPHABET)}
    return torch.tensor([numbers.get(character, len(ALPHABET)) for character in text])


def demo_task(text: Tensor, shape: Shape, *, long_from: int, seed: int = 0) -> TrainingTask:
    """The same task every time: model, batches and their order depend on ``seed`` alone."""
    torch.manual_seed(seed)
    return TrainingTask(
        model=CharacterGpt(shape),
        loss=next_character_loss,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        batches=batches(text, shape, long_from=long_from, seed=seed),
        clip_norm=1.0,
        seed=seed,
    )
