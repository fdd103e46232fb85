"""Collectives in a forward and its backward, with threads for the shards' workers."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from forescale.engine.train.collectives import Shards
from forescale.engine.train.stopwatch import Activity, Stopwatch
from unit.engine.threads import on_workers

BOUNDS = {2: [0, 5, 8], 3: [0, 3, 4, 8]}
CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operators(peers: Any, count: int) -> Any:
    return Shards(range(count), peers, Stopwatch(CPU)).operators()


@pytest.mark.parametrize("count", [2, 3])
def test_spread_and_total_split_a_pair_of_matrices(count: int) -> None:
    """Columns of the first, rows of the second, in parts of different sizes."""
    first, second = random(6, 8, seed=1), random(8, 6, seed=2)

    def run(peers: Any) -> Any:
        found = operators(peers, count)
        x = random(3, 6).requires_grad_()
        start, stop = BOUNDS[count][peers.rank : peers.rank + 2]
        a = first[:, start:stop].clone().requires_grad_()
        b = second[start:stop].clone().requires_grad_()
        y = found["collective:total"](torch.tanh(found["collective:spread"](x) @ a) @ b)
        (y**2).sum().backward()
        return y.detach(), x.grad, a.grad, b.grad

    results, _ = on_workers(count, run)
    x, a, b = random(3, 6).requires_grad_(), first.clone().requires_grad_(), second.clone().requires_grad_()
    y = torch.tanh(x @ a) @ b
    (y**2).sum().backward()
    for own_y, own_x, _, _ in results:
        torch.testing.assert_close(own_y, y.detach())
        torch.testing.assert_close(own_x, x.grad)
        assert torch.equal(own_y, results[0][0])
        assert torch.equal(own_x, results[0][1])
    torch.testing.assert_close(torch.cat([a for _, _, a, _ in results], 1), a.grad)
    torch.testing.assert_close(torch.cat([b for _, _, _, b in results], 0), b.grad)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("shape", "axis"), [((2, 48, 3), 1), ((48,), 0), ((5, 2, 48), 2)])
def test_parts_are_gathered_and_whole_gradients_parted(count: int, shape: tuple[int, ...], axis: int) -> None:
    """An axis of 3 x 8 units x 2, as that of queries, keys and values in one."""
    whole, scale = random(*shape), random(*shape, seed=1)
    layout = (axis, 3, 2, BOUNDS[count])

    def run(peers: Any) -> Any:
        found = operators(peers, count)
        x = whole.clone().requires_grad_()
        part = found["collective:part"](x, *layout)
        leaf = part.detach().clone().requires_grad_()
        y = found["collective:gather"](leaf, *layout)
        (y * scale).sum().backward()
        part.backward(leaf.grad)
        return part.detach(), y.detach(), x.grad

    results, _ = on_workers(count, run)
    units = whole.unflatten(axis, (3, 8, 2))
    for (part, y, gradient), (start, stop) in zip(results, pairwise(BOUNDS[count]), strict=True):
        expected = units.narrow(axis + 1, start, stop - start).flatten(axis, axis + 2)
        assert torch.equal(part, expected)
        assert torch.equal(y, whole)
        assert torch.equal(gradient, scale)


def test_integers_are_gathered() -> None:
    whole = torch.arange(8)
    results, _ = on_workers(
        2,
        lambda peers: operators(peers, 2)["collective:gather"](
            whole[:5] if peers.rank == 0 else whole[5:], 0, 1, 1, [0, 5, 8]
        ),
    )
    assert all(torch.equal(result, whole) for result in results)


def test_messages_among_shards_are_not_those_of_the_pipeline() -> None:
    """gloo tells messages of two workers apart by their tags; those of a pipeline's tensors are small."""
    tags: list[int] = []

    def run(peers: Any) -> None:
        send = peers.send
        peers.send = lambda tensor, to, *, tag=0: (tags.append(tag), send(tensor, to, tag=tag))[1]
        operators(peers, 2)["collective:total"](torch.ones(3))

    on_workers(2, run)
    assert min(tags) >= 1 << 30


def test_waiting_for_other_shards_is_not_counted_as_computing_too() -> None:
    def run(peers: Any) -> tuple[dict[Activity, float], float]:
        stopwatch = Stopwatch(CPU)
        found = Shards(range(2), peers, stopwatch).operators()
        start_s = time.perf_counter()
        with stopwatch.time(Activity.FORWARD):
            found["collective:total"](torch.ones(3))
        return stopwatch.reset(), time.perf_counter() - start_s

    for spent, elapsed_s in on_workers(2, run)[0]:
        assert spent[Activity.WAIT] > 0
        assert 0 < spent[Activity.FORWARD] < elapsed_s - spent[Activity.WAIT]
