"""Small models of many architectures, for tests and for the benchmark of losses.

Weights have realistic scales (0.02 where that is customary), so that rounding differences show as they
would in real training.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """A transformer block with pre-normalisation; attention has dropout of its own."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        packed = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)
        mixed = self.project(mixed.transpose(1, 2).reshape(rows, length, width))
        x = x + functional.dropout(mixed, self.dropout, self.training)
        expanded = self.down(functional.gelu(self.up(self.norm2(x))))
        return x + functional.dropout(expanded, self.dropout, self.training)


class GPT(nn.Module):
    def __init__(
        self,
        *,
        vocabulary: int = 64,
        width: int = 32,
        blocks: int = 3,
        heads: int = 4,
        context: int = 128,
        dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.skip(x)
        return self.relu(y)


class ResNet(nn.Module):
    """Images with 3 channels to 10 classes."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.layers = nn.Sequential(
            Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 2 * width, 1)
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(images)).mean((2, 3)))


class UNet(nn.Module):
    """Images with 3 channels to 2 classes per pixel; what goes down is read again on the way up."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.mix = nn.ModuleList(nn.Conv2d(2 * a, a, 3, padding=1) for a in widths[-2::-1])
        self.norms = nn.ModuleList(nn.GroupNorm(4, a) for a in widths[-2::-1])
        self.leave = nn.Conv2d(width, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        skips = [functional.relu(self.enter(images))]
        for down in self.down:
            skips.append(functional.relu(down(skips[-1])))
        x = skips.pop()
        for up, mix, norm in zip(self.up, self.mix, self.norms, strict=True):
            x = functional.relu(norm(mix(torch.cat([up(x), skips.pop()], 1))))
        return self.leave(x)


class TwoHeads(nn.Module):
    """Returns what an early layer says, what a late one says, and something the loss does not use."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))
        self.early, self.late, self.unread = nn.Linear(width, 4), nn.Linear(width, 4), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        early = unread = x
        for index, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if index == 1:
                early, unread = self.early(x), self.unread(x)
        return {"heads": (early, self.late(x)), "unread": unread, "name": "two heads"}


class RunningMean(nn.Module):
    """Keeps an exponential mean of what passes, counts the calls, and subtracts the mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.calls: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
            self.calls += 1
        return (x - self.mean) * self.scale


class Mixture(nn.Module):
    """Experts chosen per row by a router; every row is read by all, weighted by what the router says."""

    def __init__(self, width: int = 8, experts: int = 4, chosen: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.Parameter(torch.randn(experts, width, width) * 0.3)
        self.chosen = chosen

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = self.router(x).softmax(-1).topk(self.chosen, -1)
        picked = self.experts[indices]
        return torch.einsum("rk,rkio,ri->ro", weights / weights.sum(-1, keepdim=True), picked, x)


class Moody(nn.Module):
    """Branches on what it is given, so that nothing inside it can be traced; counts and averages too."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.level: Tensor
        self.register_buffer("level", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.level = 0.9 * self.level + 0.1 * x.detach().mean()
        if x.sum() > 0:
            return x + torch.tanh(self.layer(self.norm(x)))
        return torch.tanh(self.layer(x)) - self.level
