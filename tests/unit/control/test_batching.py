"""From what a deployment says, and what was measured, to how requests are put into batches."""

from __future__ import annotations

from math import inf

import pytest

from forescale.control.batching import queue_policy
from forescale.control.capacity import rows_in_time
from forescale.core.errors import InvalidInput
from forescale.engine.serve.policy import QueuePolicy
from forescale.registry.records import DeploymentSpec


def test_what_is_not_said_holds_for_all() -> None:
    assert queue_policy(DeploymentSpec(model="m", number=1)) == QueuePolicy()


def test_what_is_said_holds() -> None:
    spec = DeploymentSpec(model="m", number=1, max_batch=8, max_wait_s=0.0, timeout_s=2.0, queue=5)
    policy = queue_policy(spec, 4)
    assert policy == QueuePolicy(max_rows=8, batch_rows=4, max_wait_s=0.0, timeout_s=2.0, max_requests=5)
    assert policy.full_rows == 4
    assert queue_policy(spec, 16).full_rows == 8


@pytest.mark.parametrize(
    ("times", "latency_s", "expected"),
    [
        ((), 1.0, None),
        (((1.0, 0.05),), 1.0, 32),  # no larger one was seen: it is tried
        (((1.0, 0.05), (4.0, 0.2)), 0.5, 4),  # 8 would take 0.4 s
        (((1.0, 0.05), (4.0, 0.2)), inf, 32),
        (((1.0, 0.05), (4.0, 0.2)), 0.01, 1),  # none is in time; the least is late by least
    ],
)
def test_two_batches_fit_in_the_latency(
    times: tuple[tuple[float, float], ...], latency_s: float, expected: int | None
) -> None:
    assert rows_in_time(times, 32, latency_s) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_batch": 0},
        {"max_batch": 1 << 20},
        {"max_wait_s": -1.0},
        {"max_wait_s": inf},
        {"timeout_s": 0.0},
        {"queue": 0},
        {"max_threads": 0},
        {"max_threads": 1025},
    ],
)
def test_figures_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match="m: "):
        DeploymentSpec(model="m", number=1, **wrong)  # pyright: ignore[reportArgumentType]
