from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from forescale.core.errors import TaskFailed
from forescale.engine.train.task import TrainingTask, batch_rows, microbatch_rows, split_rows


class Model(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return ids


class Anything(nn.Module):
    def forward(self, **named: Any) -> Tensor:
        return next(iter(named.values()))


def task(model: nn.Module | None = None, **more: Any) -> TrainingTask:
    return TrainingTask(
        model=model or Model(),
        loss=lambda output, batch: output.sum(),
        optimizer=torch.optim.SGD,
        batches=[],
        **more,
    )


def test_a_tensor_is_the_only_argument() -> None:
    x = torch.zeros(3)
    assert task().call(x) == ((x,), {})


def test_a_tuple_gives_its_first_items_to_the_required_arguments() -> None:
    assert task().call(("x", "y", "z")) == (("x",), {})


def test_a_dict_gives_what_the_signature_names() -> None:
    assert task().call({"labels": 1, "mask": 2, "ids": 3}) == ((), {"mask": 2, "ids": 3})
    assert task(Anything()).call({"a": 1, "b": 2}) == ((), {"a": 1, "b": 2})


@pytest.mark.parametrize(
    ("inputs", "batch", "expected"),
    [
        (["mask"], {"ids": 1, "mask": 2}, ((), {"mask": 2})),
        ([1, 0], ("x", "y"), (("y", "x"), {})),
        (lambda batch: ([batch["ids"]], {"mask": 2}), {"ids": 1}, ((1,), {"mask": 2})),
    ],
    ids=["names", "positions", "callable"],
)
def test_inputs_overrides_the_signature(inputs: Any, batch: Any, expected: Any) -> None:
    assert task(inputs=inputs).call(batch) == expected


@pytest.mark.parametrize(
    ("more", "batch", "message"),
    [
        ({}, {"labels": 1}, r"takes \(ids, mask\) but the batch holds \(labels\)"),
        ({}, (), "takes 1 arguments but the batch holds 0"),
        ({}, 3, "not int"),
        ({"inputs": ["words"]}, {"ids": 1}, "words"),
        ({"inputs": [2]}, ("x", "y"), "names what the batch does not hold"),
    ],
)
def test_a_batch_that_does_not_fit_the_model_is_refused(more: Any, batch: Any, message: str) -> None:
    with pytest.raises(TaskFailed, match=message):
        task(**more).call(batch)


def test_rows_are_those_of_the_first_tensor() -> None:
    assert batch_rows((torch.tensor(1.0), torch.zeros(5, 2)), {"mask": torch.zeros(7)}) == 5
    with pytest.raises(TaskFailed, match="no tensor with rows"):
        batch_rows((torch.tensor(1.0), 3), {})


@given(rows=st.integers(1, 200), microbatches=st.integers(1, 64))
def test_microbatches_are_even_and_never_empty(rows: int, microbatches: int) -> None:
    parts = microbatch_rows(rows, microbatches)
    assert sum(parts) == rows
    assert len(parts) == min(rows, microbatches)
    assert list(parts) == sorted(parts, reverse=True)
    assert parts[0] - parts[-1] <= 1
    assert parts[-1] >= 1


def test_what_has_rows_is_split_and_the_rest_goes_everywhere() -> None:
    batch = {
        "x": torch.arange(5),
        "weights": torch.ones(3),
        "name": "b",
        "pair": (torch.arange(10).view(5, 2), 1),
    }
    parts = split_rows(batch, (3, 2))
    assert torch.equal(parts[1]["x"], torch.tensor([3, 4]))
    assert torch.equal(parts[0]["pair"][0], torch.tensor([[0, 1], [2, 3], [4, 5]]))
    assert [part["weights"].numel() for part in parts] == [3, 3]
    assert [(part["name"], part["pair"][1]) for part in parts] == [("b", 1)] * 2
