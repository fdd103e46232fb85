"""Training tasks as a user's file has them, for the tests of the command line."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import forescale as fs

WIDTH = 256
ROWS = 8

print("a task file may print")  # noqa: T201 - which must not mix with results


class Noise:
    """Endless random batches, the same every time."""

    def __init__(self, bad_batch: int | None = None) -> None:
        self.bad_batch = bad_batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        chance = torch.Generator().manual_seed(0)
        number = 0
        while True:
            x = torch.randn(ROWS, WIDTH, generator=chance)
            yield (x if number != self.bad_batch else x * torch.nan), torch.zeros(ROWS, WIDTH)
            number += 1


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that the error names
            x = self.linear(x)
        return x


def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(output, batch[1])


def make(model: nn.Module, batches: Noise | None = None) -> fs.TrainingTask:
    return fs.TrainingTask(
        model=model,
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        batches=batches or Noise(),
    )


def chain(layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(layers)))


task = make(chain(4))


def longer() -> fs.TrainingTask:
    return make(chain(5))


def spoilt() -> fs.TrainingTask:
    return make(chain(4), Noise(bad_batch=5))


def one_operator() -> fs.TrainingTask:
    return make(nn.Linear(WIDTH, WIDTH))


def branching() -> fs.TrainingTask:
    return make(Branching())
