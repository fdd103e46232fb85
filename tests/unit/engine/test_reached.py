from __future__ import annotations

import torch
from torch import Tensor, nn

from forescale.engine.train.reached import reached_parameters
from forescale.graph.capture import CapturedModel, capture
from models import TwoHeads


def outputs_of(captured: CapturedModel) -> dict[str, str]:
    """Names of the two heads' and the unread output."""
    template = captured.output.template
    early, late = template["heads"]
    return {"early": early.name, "late": late.name, "unread": template["unread"].name}


def test_parameters_behind_an_output_are_reached() -> None:
    captured = capture(TwoHeads(), (torch.randn(4, 8),))
    outputs = outputs_of(captured)
    early = reached_parameters(captured.graph, [outputs["early"]])
    both = reached_parameters(captured.graph, [outputs["early"], outputs["late"]])
    assert early == {
        f"{layer}.{kind}" for layer in ("layers.0", "layers.1", "early") for kind in ("weight", "bias")
    }
    assert frozenset(captured.graph.parameters) - both == {"unread.weight", "unread.bias"}
    assert reached_parameters(captured.graph, []) == frozenset()


def test_no_gradient_flows_through_detach() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.before(x).detach())

    graph = capture(Detached(), (torch.randn(4, 8),)).graph
    assert reached_parameters(graph, graph.outputs) == {"after.weight", "after.bias"}
