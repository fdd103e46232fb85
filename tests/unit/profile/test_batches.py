from __future__ import annotations

import gc
import itertools
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from forescale.core.errors import InvalidInput, TaskFailed
from forescale.profile.batches import LookAhead, batch_statistics, find_pad_id


def describe(batch: torch.Tensor) -> dict[str, int]:
    return {"s0": batch.shape[0], "s1": batch.shape[1]}


def batches(*lengths: int):
    for length in lengths:
        yield torch.zeros(2, length, dtype=torch.long)


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "forescale-look-ahead"]


def test_delivers_every_batch_in_order_with_its_binding() -> None:
    with LookAhead(batches(3, 5, 7), 2, describe) as ahead:
        seen = [(batch.shape[1], binding) for batch, binding in ahead]
    assert seen == [(n, {"s0": 2, "s1": n}) for n in (3, 5, 7)]
    assert list(ahead) == []


def test_upcoming_shows_what_comes_next_and_never_more_than_depth() -> None:
    with LookAhead(batches(1, 2, 3, 4, 5), 3, describe) as ahead:
        assert [b["s1"] for b in ahead.upcoming(at_least=99)] == [1, 2, 3]
        next(ahead)
        assert [b["s1"] for b in ahead.upcoming(at_least=3)] == [2, 3, 4]


def test_reads_no_further_than_depth() -> None:
    read: list[int] = []

    def source():
        for number in itertools.count():
            read.append(number)
            yield torch.zeros(1, 1)

    with LookAhead(source(), 4, describe) as ahead:
        ahead.upcoming(at_least=4)
        next(ahead)
        ahead.upcoming(at_least=4)
        assert len(read) <= 5
    assert len(read) <= 5


def test_an_error_of_the_source_comes_after_the_batches_before_it() -> None:
    def source():
        yield from batches(4, 5)
        raise OSError("disk gone")

    with LookAhead(source(), 8, describe, first=10) as ahead:
        ahead.upcoming(at_least=8)
        assert next(ahead)[1]["s1"] == 4
        assert next(ahead)[1]["s1"] == 5
        expected = r"batch 12 .*OSError: disk gone \(at .*test_batches.py:\d+\)"
        with pytest.raises(TaskFailed, match=expected) as caught:
            next(ahead)
        assert isinstance(caught.value.__cause__, OSError)
        with pytest.raises(StopIteration):
            next(ahead)


def test_an_iterable_that_cannot_even_start_is_reported() -> None:
    with LookAhead(7, 1, describe) as ahead, pytest.raises(TaskFailed, match="not iterable"):  # type: ignore[arg-type]
        next(ahead)


def test_an_infinite_source_stops_with_its_consumer() -> None:
    closed = threading.Event()

    def source():
        try:
            while True:
                yield torch.zeros(1, 1)
        finally:
            closed.set()

    with LookAhead(source(), 2, describe) as ahead:
        next(ahead)
    assert closed.is_set()
    assert reading_threads() == []
    ahead.close()


def test_the_thread_ends_when_the_look_ahead_is_garbage() -> None:
    ahead = LookAhead(itertools.repeat(torch.zeros(1, 1)), 2, describe)
    next(ahead)
    (thread,) = reading_threads()
    gone = weakref.ref(ahead)
    del ahead
    gc.collect()
    assert gone() is None
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_data_loaders_work() -> None:
    loader = DataLoader(TensorDataset(torch.arange(10).reshape(5, 2)), batch_size=2)
    with LookAhead(loader, 2, lambda batch: describe(batch[0])) as ahead:
        assert [binding["s0"] for _, binding in ahead] == [2, 2, 1]


def test_depth_must_be_positive() -> None:
    with pytest.raises(InvalidInput):
        LookAhead([], 0, describe)


def test_statistics_count_padding_by_mask() -> None:
    masks = [torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), torch.ones(2, 2, dtype=torch.long)]
    source = [{"input_ids": torch.ones_like(mask), "attention_mask": mask} for mask in masks]
    found = batch_statistics(source, limit=10)
    assert (found.batches, found.rows, found.tokens) == (2, 4, 12)
    assert found.padded_fraction == pytest.approx(2 / 12)
    assert found.size_bytes == 2 * 12 * 8
    assert found.parts[0].name == "input_ids"
    assert found.parts[0].dtype == "int64"
    assert (found.parts[0].smallest, found.parts[0].largest) == ((2, 2), (2, 4))


def test_statistics_count_padding_by_id_and_only_where_it_can_be_told() -> None:
    batch = (torch.tensor([[5, 0, 0]]), torch.zeros(1))
    assert batch_statistics([batch], limit=1, pad_id=0).padded_fraction == pytest.approx(2 / 3)
    assert batch_statistics([batch], limit=1).padded_fraction is None
    assert batch_statistics([(torch.zeros(2, 3),)], limit=1, pad_id=0).padded_fraction is None


def test_statistics_of_nothing_are_refused() -> None:
    with pytest.raises(InvalidInput, match="no batch"):
        batch_statistics([], limit=3)
    with pytest.raises(InvalidInput, match="no tensor"):
        batch_statistics([{"a": 1}], limit=3)


def test_pad_id_is_found_in_the_model() -> None:
    assert find_pad_id(nn.Sequential(nn.Embedding(4, 2, padding_idx=3))) == 3
    assert find_pad_id(nn.Linear(2, 2)) is None
