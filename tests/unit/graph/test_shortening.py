"""The memory of deep models, found by running some of their blocks, against running all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from forescale.graph.capture import CapturedModel, capture
from forescale.graph.model import MemoryEvent, ModelGraph, SavedStorage
from forescale.graph.saved import measure_saved, measure_whole
from forescale.graph.shortening import shortened
from models import GPT


class Layers(nn.Module):
    """Equal layers that may share one weight, all read a mask, and be read again behind the last."""

    def __init__(self, *, count: int = 8, shared: bool = False, masked: bool = False, again: int = 0) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(1 if shared else count))
        self.count, self.masked, self.again = count, masked, again

    def forward(self, x: Tensor) -> Tensor:
        entered = self.enter(x)
        mask, x = torch.sigmoid(entered), torch.tanh(entered)
        made: list[Tensor] = []
        for index in range(self.count):
            x = functional.gelu(self.layers[index % len(self.layers)](x)) + x
            x = x * mask if self.masked else torch.tanh(x)
            made.append(x)
        return x + made[-self.again] if self.again else x


def captured(model: nn.Module, *inputs: Tensor) -> CapturedModel:
    return capture(model, inputs, {}, None)


def events(graph: ModelGraph) -> list[tuple[object, ...]]:
    """With storages that no tensor names numbered as they come."""
    number: dict[str, int] = {}

    def name(event: MemoryEvent) -> str | int:
        if not event.storage.startswith("#"):
            return event.storage
        return number.setdefault(event.storage, len(number))

    return [(e.operator, e.backward, name(e), e.size_bytes, e.begins) for e in graph.memory]


def saved(graph: ModelGraph) -> set[SavedStorage]:
    return set(graph.saved)


@pytest.mark.parametrize(
    "model",
    [
        Layers(),
        Layers(masked=True),
        Layers(shared=True),
        Layers(again=1),
        Layers(again=2),
        Layers(count=6, masked=True, again=2),
    ],
    ids=["plain", "masked", "shared", "read again", "last but one read again", "all"],
)
def test_running_some_blocks_is_like_running_all(model: Layers) -> None:
    found = captured(model, torch.zeros(3, 4))
    assert shortened(found.graph) is not None
    whole = measure_whole(found.graph, found.modules)
    quick = measure_saved(found.graph, found.modules)
    assert events(quick) == events(whole)
    assert saved(quick) == saved(whole)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_deep_gpt_is_run_with_four_blocks(dropout: float) -> None:
    model = GPT(width=8, heads=2, blocks=7, dropout=dropout, tied=True)
    found = captured(model, torch.zeros(2, 6, dtype=torch.int64))
    shallow = shortened(found.graph)
    assert shallow is not None
    left_out = len(found.graph.operators) - len(shallow.short.operators)
    assert left_out == 3 * shallow.blocks.per_block
    lengthened = shallow.lengthened(measure_whole(shallow.short, found.modules))
    whole = measure_whole(found.graph, found.modules)
    assert lengthened is not None
    assert events(lengthened) == events(whole)
    assert saved(lengthened) == saved(whole)


def test_a_block_that_others_read_from_afar_is_not_left_out() -> None:
    graph = captured(Layers(again=5), torch.zeros(3, 4)).graph
    assert shortened(graph) is None
    found = captured(Layers(again=5), torch.zeros(3, 4))
    assert saved(measure_saved(found.graph)) == saved(measure_whole(found.graph, {}))


def test_few_blocks_are_all_run() -> None:
    assert shortened(captured(Layers(count=4), torch.zeros(3, 4)).graph) is None
