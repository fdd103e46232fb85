from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import forescale as fs
from forescale.core.errors import CheckpointMismatch
from forescale.engine.train.shards import Checkpoint, checkpoint_path, complete, latest, write_shard
from forescale.graph.capture import capture
from forescale.graph.model import ModelGraph
from models import GPT


def graph_of(model: nn.Module) -> ModelGraph:
    return capture(model, (torch.zeros(2, 4, dtype=torch.int64),)).graph


@pytest.fixture(scope="module")
def model() -> GPT:
    return GPT(blocks=1, tied=True)


@pytest.fixture(scope="module")
def graph(model: GPT) -> ModelGraph:
    return graph_of(model)


def write(folder: Path, graph: ModelGraph, values: dict[str, Tensor], step: int = 3) -> Path:
    """A checkpoint of two workers; the first has optimiser state for its first parameter."""
    partial = checkpoint_path(folder, step).with_suffix(".partial")
    partial.mkdir(parents=True)
    names = list(values)
    half = len(names) // 2
    state = {names[0]: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "rate": 0.5}}
    shards = [
        write_shard(partial, 0, 2, {n: values[n] for n in names[:half]}, state),
        write_shard(partial, 1, 2, {n: values[n] for n in names[half:]}, {}),
    ]
    complete(partial, checkpoint_path(folder, step), graph, shards, {"step": step})
    return checkpoint_path(folder, step)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_a_checkpoint_gives_back_what_the_workers_wrote(
    model: GPT, graph: ModelGraph, tmp_path: Path
) -> None:
    values = values_of(model)
    checkpoint = Checkpoint(write(tmp_path, graph, values))
    checkpoint.check(graph)
    assert checkpoint.trainer["step"] == 3
    read = checkpoint.model(checkpoint.names())
    assert all(torch.equal(read[name], value) for name, value in values.items())
    first, second, *_ = values
    state = checkpoint.optimizer([first, second])
    assert state[first]["rate"] == 0.5
    assert torch.equal(state[first]["exp_avg"], torch.ones(2))
    assert second not in state


def test_tied_parameters_are_in_the_plain_state_dict_under_all_their_names(
    model: GPT, graph: ModelGraph, tmp_path: Path
) -> None:
    write(tmp_path, graph, values_of(model))
    loaded = fs.load_checkpoint(tmp_path)
    assert set(loaded) == set(model.state_dict())
    GPT(blocks=1, tied=True).load_state_dict(loaded)


def test_the_newest_complete_checkpoint_is_found(model: GPT, graph: ModelGraph, tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    older, newer = (write(tmp_path, graph, values_of(model), step) for step in (9, 10))
    checkpoint_path(tmp_path, 11).with_suffix(".partial").mkdir()
    assert latest(tmp_path) == newer != older


def test_writing_a_step_again_replaces_it(model: GPT, graph: ModelGraph, tmp_path: Path) -> None:
    values = values_of(model)
    write(tmp_path, graph, values)
    path = write(tmp_path, graph, {name: value + 1 for name, value in values.items()})
    name = next(iter(values))
    assert torch.equal(Checkpoint(path).model([name])[name], values[name] + 1)


@pytest.mark.parametrize(
    ("other", "message"),
    [(GPT(blocks=2, tied=True), "lacks blocks.1"), (GPT(blocks=1, tied=True, width=16), "is .* there and")],
    ids=["more layers", "another width"],
)
def test_another_models_checkpoint_is_refused(
    other: GPT, message: str, model: GPT, graph: ModelGraph, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(write(tmp_path, graph, values_of(model)))
    with pytest.raises(CheckpointMismatch, match=message):
        checkpoint.check(graph_of(other))


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="not a complete checkpoint"):
        fs.load_checkpoint(tmp_path)


def test_a_checkpoint_of_a_future_format_is_refused(model: GPT, graph: ModelGraph, tmp_path: Path) -> None:
    path = write(tmp_path, graph, values_of(model))
    record = path / "trainer.json"
    record.write_text(record.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointMismatch, match="format 2"):
        Checkpoint(path)
