"""Repeated blocks of real models; random graphs are in ``tests/property/test_repeats.py``."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from forescale.graph.capture import capture
from forescale.graph.model import ModelGraph
from forescale.graph.repeats import Repetition, disjoint, repetitions
from models import GPT, Residual, ResNet, UNet


def captured(model: nn.Module, *inputs: Tensor) -> ModelGraph:
    return capture(model, inputs, {}, None).graph


def longest(graph: ModelGraph) -> Repetition:
    return max(disjoint(repetitions(graph)), key=lambda found: found.length)


@pytest.mark.parametrize("blocks", [2, 5])
def test_the_blocks_of_a_gpt(blocks: int) -> None:
    graph = captured(GPT(width=8, heads=2, blocks=blocks), torch.zeros(2, 6, dtype=torch.int64))
    found = longest(graph)
    paths = [operator.module_path for operator in graph.operators]
    first = [index for index, path in enumerate(paths) if path.startswith("blocks.0")]
    assert found.per_block == len(first)
    assert found.start <= first[0]
    assert found.count == blocks


def test_a_block_of_another_width_is_not_equal() -> None:
    equal = [layer for _ in range(2) for layer in (nn.Linear(8, 8), nn.ReLU())]
    layers = [nn.Linear(8, 8), nn.Tanh(), *equal, nn.Linear(8, 4), nn.ReLU()]
    (found,) = disjoint(repetitions(captured(nn.Sequential(*layers), torch.zeros(3, 8))))
    assert (found.per_block, found.count) == (2, 2)


def test_equal_operators_that_are_wired_otherwise_do_not_repeat() -> None:
    class Alternating(nn.Module):
        """Every other addition skips one."""

        def forward(self, x: Tensor) -> Tensor:
            made = [x * 1.0, x * 2.0]
            for index in range(8):
                made.append(made[-1] + made[-2 - index % 2 * 1])
            return made[-1]

    found = longest(captured(Alternating(), torch.zeros(2, 2)))
    assert found.per_block == 2


def test_what_all_blocks_read_is_the_same() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(4, 4)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            entered = self.enter(x)
            mask, x = torch.sigmoid(entered), torch.tanh(entered)
            for layer in self.layers:
                x = layer(x) * mask
            return x

    found = longest(captured(Masked(), torch.zeros(2, 4)))
    assert (found.per_block, found.count) == (2, 6)


def test_stages_of_a_resnet_repeat_within_themselves() -> None:
    model = ResNet(4)
    model.layers = nn.Sequential(*(Residual(4, 4, 1) for _ in range(3)), *list(model.layers)[1:])
    graph = captured(model, torch.zeros(2, 3, 8, 8))
    found = longest(graph)
    inside = [o.module_path for o in graph.operators[found.start : found.start + found.length]]
    assert found.count == 3
    assert {path.split(".")[1] for path in inside if path.startswith("layers.")} >= {"0", "1", "2"}


def test_a_u_net_has_no_repeated_blocks() -> None:
    """Every level has its own width."""
    graph = captured(UNet(4), torch.zeros(1, 3, 16, 16))
    assert all(found.per_block == 1 for found in repetitions(graph))


def test_overlaps_are_cut_off() -> None:
    long, short = Repetition(start=0, per_block=3, length=30), Repetition(start=28, per_block=2, length=10)
    assert disjoint([short, long]) == (long, replace(short, start=30, length=8))
    assert disjoint([long, Repetition(start=28, per_block=2, length=5)]) == (long,)
    apart = disjoint([short, long])
    assert all(a.start + a.length <= b.start for a, b in pairwise(apart))
