from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional

from forescale.graph.capture import capture
from forescale.graph.cost import cost_table
from forescale.graph.kernels import measure_loss_memory, measure_peak_bytes, measure_workspace
from forescale.graph.peak import StageMemory, peak_bytes
from forescale.graph.saved import measure_saved
from models import GPT, ResNet


def test_the_peak_counts_what_was_there_at_once() -> None:
    def run() -> None:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = torch.empty(300)
        del second, third

    before = torch.empty(10_000)
    assert measure_peak_bytes(run) == 6000
    del before


def test_workspace_is_what_convolutions_take_and_linear_layers_do_not() -> None:
    captured = capture(ResNet(width=16), (torch.rand(2, 3, 16, 16),))
    graph = measure_saved(captured.graph)
    before = {name: value.clone() for name, value in captured.state.items()}
    samples = [{graph.inputs[0]: torch.rand(rows, 3, 16, 16)} for rows in (2, 4)]
    workspace = measure_workspace(graph, captured.state, samples)
    backward_O = workspace.backward.at(cost_table(graph)(graph.example).backward_bytes_O)
    taken = {
        kind: [backward_O[o.index] for o in graph.operators if f".{kind}." in o.target]
        for kind in ("conv2d", "linear")
    }
    assert taken["linear"] == [0.0]
    assert max(taken["conv2d"]) > 0
    # The model itself was not touched: no gradient, no running statistic.
    assert all(torch.equal(value, before[name]) for name, value in captured.state.items())
    assert all(value.grad is None for value in captured.state.values())


def test_a_loss_that_keeps_the_output_and_one_that_replaces_it() -> None:
    logits = torch.rand(64, 100)

    def squares(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return (outputs[0] ** 2).mean()

    def entropy(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return functional.cross_entropy(outputs[0], torch.zeros(64, dtype=torch.long))

    assert measure_loss_memory(squares, [logits]).kept_ratio == pytest.approx(1, rel=0.01)
    # Log-probabilities instead of the logits, and the targets.
    assert measure_loss_memory(entropy, [logits]).kept_ratio == pytest.approx(1, rel=0.05)
    both = measure_loss_memory(lambda outputs: squares(outputs) + entropy(outputs), [logits])
    assert both.kept_ratio == pytest.approx(2, rel=0.05)
    assert both.backward_ratio > both.kept_ratio


@pytest.mark.gpu
def test_predicts_the_peak_on_a_gpu() -> None:
    device = torch.device("cuda")
    model = GPT(width=256, blocks=4, context=512)
    captured = capture(model, (torch.randint(0, 64, (4, 128)),))
    graph = measure_saved(captured.graph, device=device)
    (source,) = graph.inputs
    samples = [{source: torch.randint(0, 64, (rows, 128))} for rows in (4, 8)]
    workspace = measure_workspace(graph, captured.state, samples, device)
    stage = StageMemory(graph, range(len(graph.operators)), workspace=workspace)
    batch = torch.randint(0, 64, (12, 256)).to(device)
    binding = graph.bind({source: tuple(batch.shape)})

    def step() -> None:
        own = GPT(width=256, blocks=4, context=512).to(device)
        output = own(batch.clone())
        output.backward(torch.empty_like(output))

    step()
    predicted = peak_bytes(stage.measure(binding), microbatches=1, in_flight=1)
    assert predicted == pytest.approx(measure_peak_bytes(step, device), rel=0.03)
