from __future__ import annotations

from collections.abc import Sequence

import pytest

from chain_model import chain_graph
from forescale.core.errors import InvalidInput
from forescale.plan.partition_plan import Shard, Stage, replicas, shards_with
from forescale.plan.replicas import check_replicas
from forescale.plan.schedule import Layout

FIRST, LAST = (0, 1), (2, 3)


def shards(
    devices: str,
    *,
    indices: Sequence[int] | None = None,
    weights: tuple[int, ...] | None = None,
    share: int = 1,
    recompute: bool = False,
) -> list[Stage]:
    return [
        Stage(
            device=device,
            operators=LAST,
            share=share,
            recompute=recompute,
            shard=Shard(index=index, weights=weights or (1,) * len(devices)),
        )
        for device, index in zip(devices, indices or range(len(devices)), strict=True)
    ]


def test_shards_of_one_replica_are_found() -> None:
    stages = [Stage(device="a", operators=FIRST), *shards("bc"), *shards("de", share=2)]
    assert [[s.device for s in replica] for replica in replicas(stages[1:])] == [["b", "c"], ["d", "e"]]
    assert [s.device for s in shards_with(stages, 4)] == ["d", "e"]
    check_replicas(chain_graph(4), stages)


def test_shards_run_the_microbatches_of_their_replica_together() -> None:
    layout = Layout.of([Stage(device="a", operators=FIRST), *shards("bc"), *shards("de", share=2)], 3)
    assert layout.runs_S == ((0, 1, 2), (1,), (1,), (0, 2), (0, 2))
    assert [layout.runners(1, microbatch) for microbatch in range(3)] == [(3, 4), (1, 2), (3, 4)]


def test_shards_may_change_buffers_that_replicas_may_not() -> None:
    graph = chain_graph(4, changes_buffer=True)
    first = Stage(device="a", operators=FIRST)
    check_replicas(graph, [first, *shards("bc")])
    with pytest.raises(InvalidInput, match=r"b and c and d and e cannot be replicas of one stage.*last"):
        check_replicas(graph, [first, *shards("bc"), *shards("de")])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (shards("ab", indices=(1, 0)), r"run the shards \[1, 0\] of 2"),
        (shards("ab", weights=(1, 1, 1)), r"a and b run the shards \[0, 1\] of 3"),
        (shards("ab", indices=(0, 0)), r"a and b run the shards \[0, 0\] of 2"),
        (shards("ab", weights=(1, 0)), r"weights \(1, 0\)"),
        ([*shards("a", weights=(1, 1)), *shards("b", weights=(1, 1), indices=[1], share=2)], "must agree"),
        ([*shards("a", weights=(1, 1)), *shards("b", weights=(1, 1), indices=[1], recompute=True)], "agree"),
        ([*shards("ab"), *shards("cd", weights=(7, 3))], "a and b and c and d split the same operators"),
        ([*shards("ab"), Stage(device="c", operators=LAST)], "split the same operators in different ways"),
        (shards("aa"), "a runs a shard beside another stage"),
    ],
)
def test_incomplete_shards_are_refused(stages: list[Stage], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        check_replicas(chain_graph(4), stages)
